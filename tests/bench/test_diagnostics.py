"""python -m bench diagnostics: blocks, labels, kept checkpoints, and the choice among them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from bench import diagnostics
from bench._diagnostics_figures import plot_blocks, plot_training
from contradiff.evaluation.classifier import ResidualClassifier
from contradiff.evaluation.extractors import save_classifier
from contradiff.features.batches import CleanBatch
from contradiff.features.models import DiffusionFeatures, image_noise
from contradiff.method.checkpoint import read_checkpoint_card
from tests.settings import TINY, features_params

TIMESTEP = 101


@pytest.fixture
def model(build_tiny: Callable[..., Any]) -> DiffusionFeatures:
    return DiffusionFeatures(build_tiny(), features_params(), seed=3, device=torch.device("cpu"))


def test_block_means_are_those_of_the_halves_of_the_unet(model: DiffusionFeatures):
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    no_pixels, labels = torch.empty(4, 3, 0, 0), torch.arange(4)
    batch = CleanBatch((0, 1, 2, 3), latents, no_pixels, labels, tuple("abcd"))
    found = diagnostics.block_means(model, batch, TIMESTEP)
    assert list(found) == ["down.0", "down.1", "down.2", "mid", "up.0", "up.1", "up.2"]
    noise = image_noise((3, 4, 8, 8), batch.indices, seed=3).transpose(0, 1)
    with torch.inference_mode():
        maps = model.model.level_maps(
            latents,
            model.tokens(batch),
            timesteps=[TIMESTEP, 401, 201],
            noise=noise,
            blocks=["mid", "up.1"],
        )
    for block in ("mid", "up.1"):
        cleanest = maps[block][:, -1].mean(dim=(2, 3))
        torch.testing.assert_close(found[block], cleanest, rtol=1e-4, atol=1e-5)
    assert not model.model.unet.mid_block._forward_hooks


def test_classifiers_see_no_dev_image_before_the_test():
    labels = torch.arange(60) % 3
    is_dev = torch.arange(60) >= 50
    params: Any = type("Params", (), {"seed": 0})
    params.probe = type("Probe", (), {"cs": [1.0]})
    params.separability = type("Separability", (), {"num_neighbours": 5})
    run = diagnostics.FinishedRun(params, [], labels, is_dev)
    assert [len(run.labelled(share)) for share in (0.1, 1.0)] == [6, 50]
    assert int(run.labelled(1.0).max()) < 50
    features = torch.nn.functional.one_hot(labels).float()
    features += 0.01 * torch.rand(60, 3, generator=torch.Generator().manual_seed(0))
    wrong = features.clone()
    wrong[is_dev] = features[is_dev].roll(1, dims=1)  # a dev image looks like another class
    for classify in (run.logistic, run.neighbours, lambda each, _share=0: run.ridge(each)):
        assert (classify(features, 1.0), classify(wrong, 1.0)) == (1.0, 0.0)


def test_only_checkpoints_of_this_training_are_found(
    build_tiny: Callable[..., Any],
    save_tiny: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(diagnostics, "CHECKPOINT", tmp_path / "final")
    model, kept = build_tiny(), tmp_path / "kept"
    save_tiny(tmp_path / "final", model, num_steps=9)
    for name, changes in (("one", {}), ("two", {"seed": 5})):
        for step in (0, 3, 6):
            save_tiny(kept / name / f"{step:08}", model, num_steps=step, **changes)
    found = diagnostics.kept_checkpoints(kept)
    assert found == {step: kept / "one" / f"{step:08}" for step in (0, 3, 6)}
    assert read_checkpoint_card(found[3]).num_steps == 3
    assert diagnostics.kept_checkpoints(tmp_path / "none") == {}


ROWS = [
    {"step": step, "h.top1": top1, "maps.top1": 0.5, "fid": fid, "kid": 0.1}
    for step, top1, fid in ((0, 0.7, 12.0), (4, 0.82, 11.5), (8, 0.81, 11.0), (12, 0.8, 11.3))
]


def test_tables_and_pictures_say_which_checkpoint_is_best():
    blocks = {"mid": {10: 0.5, 800: 0.25}, "up.0": {10: 0.6, 800: 0.3}}
    found: dict[str, Any] = {"num_fit": 3600, "num_dev": 400, "training": ROWS}
    found["blocks"] = {"base": blocks, "contradiff": blocks}
    found["few_labels"] = {"nearest neighbours": {"h": {0.01: 0.4, 1.0: 0.8}}}
    lines = list(diagnostics.tables(found))
    for line in (
        "| nearest neighbours, labels | 1% | 100% |",
        "| h | 40.0% | 80.0% |",
        "| up.0 | 60.0 → 60.0 | 30.0 → 30.0 |",
        "| step | 0 | 4 | 8 | 12 |",
        "| fid | 12 | 11.5 | 11 | 11.3 |",
        "| best probe | 4 | 82.0% | 11.50 |",
        "| best FID | 8 | 81.0% | 11.00 |",
        "| the last | 12 | 80.0% | 11.30 |",
    ):
        assert line in lines
    for picture in (plot_blocks(found["blocks"]), plot_training(ROWS)):
        assert picture.startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_finished_run_is_measured_from_its_files(  # noqa: PLR0917
    tiny_base: Path,
    tiny_data: Path,
    tiny_params: dict[str, Any],
    build_tiny: Callable[..., Any],
    save_tiny: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    build = tmp_path / "build"
    build.mkdir()
    sources = {"base": tiny_base, "shards": tiny_data / "images", "latents": tiny_data / "latents"}
    for name, folder in sources.items():
        (build / name).symlink_to(folder)
    for number, folder in enumerate((".work/checkpoints/key/00000000", "build/pretrain")):
        save_tiny(tmp_path / folder, build_tiny(seed=number), num_steps=3 * number)
    facts = {"image_size": 32, "val_accuracy": 0.9, "val_count": 8, "val_chance": 0.4}
    save_classifier(build / "extractor", ResidualClassifier(width=4, num_classes=3), **facts)
    content = TINY | tiny_params
    content["score"] = TINY["score"] | {"kid_subset_size": 6, "kid_subsets": 2}
    YAML().dump(content, tmp_path / "params.yaml")
    diagnostics.main(["--samples", "8", "--steps", "2"])
    found = json.loads((build / "diagnostics/diagnostics.json").read_text())
    assert (found["num_fit"], found["num_dev"]) == (20, 4)
    assert [row["step"] for row in found["training"]] == [0, 3]
    assert all(set(row) == set(found["training"][0]) for row in found["training"])
    timesteps = ["10", "50", "100", "200", "300", "400", "600", "800"]
    assert list(found["blocks"]["base"]["mid"]) == timesteps
    made = {file.name for file in (build / "diagnostics").iterdir()}
    assert made == {"diagnostics.json", "tables.md", "blocks.png", "training.png"}
    with pytest.raises(SystemExit, match="--samples: FID needs at least 8"):
        diagnostics.main(["--samples", "7"])
