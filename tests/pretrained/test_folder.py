"""An export is loaded unchanged, part by part, and by stock diffusers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from torch import nn

from contradiff import export
from contradiff.base.config import SHIPPED_CONFIGS
from contradiff.data.shards import INDEX_NAME
from contradiff.method.lora import add_lora
from contradiff.method.params import LoraParams
from contradiff.method.unet import SplitUNet
from contradiff.pretrained.folder import LORA_NAME, Parts, load_part, read_folder, write_lora
from contradiff.pretrained.model import ContraDiff
from tests.pretrained.conftest import copy_project
from tests.settings import TINY

PARTS = ["attention", "class_table", "conditioner", "probe_logistic", "probe_sgd"]


@pytest.fixture(scope="module")
def exported(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "mine"
    (project / "build/report").mkdir()
    rows = [["Probe top-1 ↑", "56.7% — 95% interval"], ["a|b", "1"]]
    (project / "build/report/summary.json").write_text(json.dumps({"rows": rows}))
    export(folder, root=project, with_base=True, licence="apache-2.0")
    return folder


@torch.no_grad()
def test_a_loaded_export_is_the_model(exported: Path, parts: Parts):
    names = {path.name for path in exported.iterdir()}
    files = {f"{name}.safetensors" for name in (*PARTS, "projector")}
    assert names == files | {LORA_NAME, "config.json", "README.md", "base"}
    found = read_folder(exported, exported / "base")
    torch.testing.assert_close(
        found.network.state_dict(), parts.network.state_dict(), atol=0, rtol=0
    )
    assert found.config.model_dump(exclude={"scores"}) == parts.config.model_dump(
        exclude={"scores"}
    )
    for name, module in parts.more.items():
        torch.testing.assert_close(
            found.more[name].state_dict(), module.state_dict(), rtol=0, atol=0
        )
    state = torch.random.get_rng_state()
    for name in PARTS:
        own = getattr(parts.network, name, None) or parts.more[name]
        torch.testing.assert_close(load_part(exported, name).state_dict(), own.state_dict())
    assert torch.random.get_rng_state().equal(state)
    with pytest.raises(ValueError, match="there is no part 'unet'"):
        load_part(exported, "unet")


def test_the_card_says_what_was_measured_and_how(exported: Path, project: Path):
    from huggingface_hub import ModelCard

    card = ModelCard.load(exported / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "diffusers")
    top1 = json.loads((project / "metrics/probe.json").read_text())["probe"]["top1"]
    assert [result.metric_value for result in card.data.eval_results or []] == [top1]
    for text in ("| a\\|b | 1 |", "95% interval", '"rank": 4', "a, b, c", "## Limits"):
        assert text in card.content


def test_a_failed_export_leaves_no_trace_and_no_other_folder_is_replaced(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="no exported model; choose another folder"):
        export(tmp_path, root=project)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("full")

    monkeypatch.setattr("contradiff.pretrained.folder.write_lora", fail)
    with pytest.raises(OSError, match="full"):
        export(tmp_path / "new", root=project)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut(folder: Path) -> None:
    path = folder / "attention.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change(f, format=2), r"newer contradiff \(format 2; this one reads 1\)"),
        (lambda f: change(f, format=None), "no format number"),
        (lambda f: change(f, seed="x"), r"config\.json: seed: "),
        (
            lambda f: (f / "config.json").write_text("{"),
            r"config\.json: damaged .*; export or download it again",
        ),
        (
            lambda f: (f / "config.json").unlink(),
            r"no exported model, because it has no config\.json",
        ),
        (lambda f: (f / LORA_NAME).unlink(), r"weights\.safetensors: no such file; export or"),
        (cut, r"attention\.safetensors: damaged .*; export or download it again"),
        (lambda f: shutil.rmtree(f / "base"), "the base model is not in it. .* base=PATH"),
    ],
)
def test_a_damaged_export_is_refused(
    exported: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str
):
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    damage(folder)
    with pytest.raises(ValueError, match=message):
        ContraDiff.from_pretrained(folder, device="cpu")


def test_another_base_is_named_by_its_digest(exported: Path, tmp_path: Path):
    base = Path(shutil.copytree(exported / "base", tmp_path / "base"))
    (weights,) = (base / "vae").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"not the base .*: the vae of models/tiny has the sha256 [0-9a-f]{64}"
    ):
        ContraDiff.from_pretrained(exported, base=base, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": {"timesteps": [9, 5, 1]}}, "trained on other features .*dvc repro probe"),
        ({"features": {"model": "base", "pool": "mean"}}, r"features\.model: .*\"contradiff\""),
        ({"head": {"width": 32}}, r"head\.width: params\.yaml has 32"),
    ],
)
def test_results_of_other_parameters_are_not_exported(
    project: Path, tmp_path: Path, changes: dict[str, Any], message: str
):
    copy = copy_project(project, tmp_path / "project", **changes)
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "new", root=copy)
    assert not (tmp_path / "new").exists()


def test_images_without_labels_give_a_model_without_a_probe(project: Path, tmp_path: Path):
    copy = copy_project(project, tmp_path / "project")
    shutil.rmtree(copy / "build/probe")
    index = json.loads((copy / "build/shards" / INDEX_NAME).read_text())
    index["facts"]["class_ids"] = ["all"]
    (copy / "build/shards").unlink()
    (copy / "build/shards").mkdir()
    (copy / "build/shards" / INDEX_NAME).write_text(json.dumps(index))
    export(tmp_path / "new", root=copy)
    assert ".classify(" not in (tmp_path / "new/README.md").read_text()
    model = ContraDiff.from_pretrained(tmp_path / "new", base=project / "build/base", device="cpu")
    image = Image.new("RGB", (40, 40))
    assert model.features(image).shape == (1, model.width)
    with pytest.raises(ValueError, match="no probe, because it was trained on images without"):
        model.classify(image)


@pytest.fixture(scope="module")
def shrunken() -> Callable[[], UNet2DConditionModel]:
    """Stable Diffusion v1.4's UNet with a tenth of the channels."""
    folder = SHIPPED_CONFIGS["CompVis/stable-diffusion-v1-4"]
    config = json.loads((folder / "unet/config.json").read_text())
    config |= {"block_out_channels": [32, 64, 128, 128], "cross_attention_dim": 24}

    def build() -> UNet2DConditionModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            unet = UNet2DConditionModel.from_config(config)
        assert isinstance(unet, UNet2DConditionModel)
        return unet.eval()

    return build


@torch.no_grad()
def test_stock_diffusers_takes_the_lora_and_predicts_the_same_noise(
    shrunken: Callable[[], UNet2DConditionModel], tmp_path: Path
):
    ours = shrunken()
    params = LoraParams(rank=4, alpha=6.0, targets=TINY["lora"]["targets"])
    add_lora(ours, params)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    write_lora(tmp_path, ours, params)
    with safe_open(tmp_path / LORA_NAME, framework="pt") as file:
        example = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q.lora_A.weight"
        assert f"unet.{example}" in file.keys()  # noqa: SIM118 - no mapping
    latents, tokens = (
        torch.randn(2, *shape, generator=generator) for shape in ((4, 16, 16), (5, 24))
    )
    steps = torch.tensor([3, 700])
    split = SplitUNet(ours)
    expected = split.predict(split.down(latents, steps, tokens))
    unet, in_pipeline = shrunken(), shrunken()
    assert (unet(latents, steps, tokens).sample - expected).abs().max() > 1e-2
    unet.load_lora_adapter(tmp_path, prefix="unet", weight_name=LORA_NAME)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    others = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(
        vae=vae,
        unet=in_pipeline,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        **others,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(tmp_path)
    stock: list[nn.Module] = [unet, pipeline.unet]
    for each in stock:
        found = each(latents, steps, tokens).sample
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
