"""The whole parameter file, checked at once: each rule between sections is tested here, once."""

from stages.runtime.run import Run

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from contradiff.config import parse, read_params
from stages import prepare, validate
from stages.validate import check
from tests.settings import TINY, override

ROOT = Path(__file__).resolve().parents[2]
HUB = {"source": "hub", "path": "somebody/model", "revision": "a" * 40}

Content = dict[str, Any]


@pytest.fixture
def content(tiny_base: Path) -> Content:
    """The embedded default, on the tests' base."""
    content = copy.deepcopy(TINY)
    content["base"]["path"] = str(tiny_base)
    return content


@pytest.fixture
def run(run_of: Callable[[str], Run]) -> Run:
    return run_of("validate")


def faults(content: Content, *, run: Run | None = None) -> list[str]:
    """The messages, without the file's name."""
    try:
        check(content, source="params.yaml", run=run)
    except ValueError as error:
        lines = str(error).splitlines()
        assert all(line.startswith("params.yaml: ") for line in lines)
        return [line.removeprefix("params.yaml: ") for line in lines]
    return []


def keys(messages: list[str]) -> list[str]:
    return [message.split(": ")[0] for message in messages]


def test_all_faults_are_listed_once(content: Content):
    content["lose"] = {"lambda": 0.1}
    content["loss"]["lamda"] = 0.5
    override(content, "seed=4294967296 runtime.device=tpu")
    del content["lora"]["rank"], content["data"]
    found = sorted(faults(content))
    assert keys(found) == ["data", "lora.rank", "lose", "loss.lamda", "runtime.device", "seed"]
    assert found[0].startswith("data: missing")
    assert found[2].startswith("lose: unknown key; see presets/tiny.yaml")
    assert found[5].endswith("less than 4294967296 (got 4294967296)")


@pytest.mark.parametrize(
    "change",
    [
        *(f"loss.lambda={value}" for value in ("null", "true", "abc", ".nan", "-0.1")),
        *("loss.temperature=0.0", "lora.rank=0", "lora.targets=[]", "pretrain.batch_size=1"),
        "pretrain.grad_accumulation=64",  # microbatches of one image have no negatives
        *(
            f"features.timesteps={value}"
            for value in ("[401,401,101]", "[401,201]", "[401,201,-1]")
        ),
    ],
)
def test_an_impossible_value_is_refused_by_its_key(content: Content, change: str):
    override(content, change)
    [message] = faults(content)
    assert message.startswith(change.partition("=")[0])


NOISE_UNTRAINED = r"conditioner\.drop: 0 never trains the null condition"
NULL_FEATURES = r'features\.condition: "noise" .* never trained; .* features\.condition to "image"'
CROP = "conditioner.cond_view=crop"
SAME, LATENTS = "loss.latent_views=same", "conditioner.input=latents"
BATCH, TUNE = "class_condition.batch_size=4002", "transfer.finetune_epochs=1"
CHAIN, SIX_PASSES = "features.noising=ddim_chain", "loss.recon_passes=6 latents.colour_jitter=0.0"
INCEPTION = "extractor.kind=inception extractor.weights=x extractor.resizers=[clean]"
NO_DROP = "conditioner.drop=0.0"
CLASSES = "generate.condition=class class_condition.epochs=1 class_condition.drop=0.0"
ONE_VIEW = "latents.views=1 latents.colour_jitter=0.0"
TIMM = "features.model=timm features.timm_name=x features.timm_pretrained=true features.pool=mean"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ("ingest.resize=31", r"ingest\.resize: 31 must be null or at least"),
        ("conditioner.patch_size=5", r"conditioner\.patch_size: 5 must divide data\.image"),
        (ONE_VIEW, r'loss\.latent_views: "two" .* set latents\.views to 2 or more'),
        (
            f"{ONE_VIEW} {SAME} {LATENTS} {CROP}",
            r'conditioner\.cond_view: "crop" .* latents\.views to 2 or',
        ),
        (
            f"latents.views=1 {SAME}",
            r"latents\.colour_jitter: only random .* latents\.colour_jitter to 0",
        ),
        (SAME, r"latents\.colour_jitter: .* set latents\.colour_jitter to 0"),
        ("loss.recon_passes=4", r"latents\.colour_jitter: .* latents\.colour_jitter to 0"),
        ("loss.recon_passes=3", None),
        ("pretrain.batch_size=4002", r"pretrain\.batch_size: 4002 .*num_train \(4000\)"),
        (
            f"{BATCH} class_condition.epochs=1",
            r"class_condition\.batch_size: 4002 .*num_train \(4000\)",
        ),
        (BATCH, None),  # with no epochs there are no batches
        (
            f"{TIMM} probe.head=attentive probe.headline=sgd",
            r'probe\.head: "attentive" .* probe\.head to "linear"',
        ),
        (
            f"{TUNE} features.pool=mean",
            r'transfer\.finetune_epochs: .*pool to "attention", or .* to 0',
        ),
        (
            f"{TUNE} {CHAIN}",
            r'transfer\.finetune_epochs: .*features\.noising to "direct", or .* to 0',
        ),
        ("features.pool=mean", None),
        (NO_DROP, NOISE_UNTRAINED),  # although the second view's condition is null
        (f"{NO_DROP} generate.condition=image generate.guidance=2.0", NOISE_UNTRAINED),
        (f"{NO_DROP} generate.condition=image", None),
        (f"{NO_DROP} {CROP} pretrain.epochs=0", None),
        (f"{NO_DROP} {SIX_PASSES} loss.lambda=0.0", None),
        (f"{NO_DROP} generate.condition=image {CROP}", NULL_FEATURES),
        (f"{NO_DROP} generate.condition=image loss.lambda=0.0", NULL_FEATURES),
        (f"{NO_DROP} generate.condition=image {CROP} features.condition=image", None),
        (f"{NO_DROP} generate.condition=image {CROP} features.model=base features.pool=mean", None),
        (
            f"{CLASSES} generate.guidance=2.0",
            r"class_condition\.drop: 0 never trains the null clas",
        ),
        (CLASSES, None),
        (
            "generate.condition=class",
            r'generate\.condition: "class" .* class_condition\.epochs to 1',
        ),
        ("generate.num_samples=499", r"score\.kid_subset_size: 500 .*num_samples \(499\)"),
        ("reference.num_kept=499", r"score\.kid_subset_size: 500 .*num_kept \(499\)"),
        ("score.splits=1001", r"score\.splits: 1001 is more than generate\.num_samples"),
        ("extractor.width=502", r'generate\.num_samples: .* FID .* "classifier"; .* 1004 or more'),
        (INCEPTION, r'generate\.num_samples: .* FID .* "inception"; .* 2048 or more'),
        # within one section, for --dry-run's sake
        (
            "generate.guidance=1.5",
            r'generate\.guidance: .* generate\.condition "noise"; set',
        ),
    ],
)
def test_sections_agree(content: Content, changes: str, fault: str | None):
    assert faults(content) == []
    override(content, changes)
    if fault is None:
        assert faults(content) == []
    else:
        with pytest.raises(ValueError, match=f"^params.yaml: {fault}[^\n]*$"):
            check(content, source="params.yaml")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ("lora.targets=[attn3.to_q]", r"lora\.targets: 'attn3\.to_q' .* such as '.*attn"),
        ("lora.targets=[o_q]", r"lora\.targets: 'o_q' matches no linear layer"),
        ("features.timesteps=[401,201,1000]", r"features\.timesteps: \[1000\] .* 999"),
        ("features.timesteps=[401,201,999]", None),
        ("features.more_triples=[[5,1,1000]]", r"features\.more_triples: \[1000\] exceed"),
        (
            f"features.timesteps=[401,201,99] {CHAIN}",
            r"features\.timesteps: .* 20-step.* \[1, 51, ",
        ),
        # Stable Diffusion's steps_offset would make the first of 1000 steps timestep 1000.
        ("generate.num_inference_steps=1000", r"generate\.num_inference_steps: 1000 is"),
        ("generate.num_inference_steps=1001", r"generate\.num_inference_steps: 1001 is"),
        ("generate.num_inference_steps=999", None),
        (
            "generate.num_inference_steps=150",  # DDIM would begin at timestep 895
            r"generate\.num_inference_steps: 150 steps of DDIM .*; set it to 125, or set gen",
        ),
        ("generate.num_inference_steps=150 generate.solver=unipc", None),
        # The VAE makes 4x, the UNet 4x smaller: 8 latents a side, 2 at the bottleneck.
        ("data.image_size=40", r"data\.image_size: 40 must be a multiple of 16"),
        (
            f"{LATENTS} conditioner.patch_size=3",
            r"conditioner\.patch_size: 3 must .* side of a latent \(8\)",
        ),
    ],
)
def test_the_base_can_serve_the_parameters(
    content: Content, run: Run, changes: str, fault: str | None
):
    override(content, changes)
    if fault is None:
        assert faults(content, run=run) == []
    else:
        with pytest.raises(ValueError, match=f"^params.yaml: {fault}[^\n]*$"):
            check(content, source="params.yaml", run=run)


def test_the_second_up_block_must_be_there_where_it_is_asked_for(
    content: Content, tiny_base: Path, run: Run
):
    base = Path(shutil.copytree(tiny_base, run.root / "base"))
    unet = json.loads((base / "unet/config.json").read_text()) | {"block_out_channels": [16]}
    unet |= {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    (base / "unet/config.json").write_text(json.dumps(unet))
    content["base"]["path"] = str(base)
    assert faults(content, run=run) == []
    for change in (
        "head.block=up.1",
        "features.more_blocks=[mid,mid+up.1]",
        "features.model=diffeed features.pool=mean",
    ):
        changed = copy.deepcopy(content)
        override(changed, change)
        [fault] = faults(changed, run=run)
        assert fault.startswith(change.partition("=")[0])
        assert fault.endswith("has only 1; use only the mid block, or choose another base")


def test_all_rules_are_asked_before_the_stage_writes_its_out(content: Content, run: Run):
    """At once, except that the base is looked at only if the file itself is valid."""
    YAML().dump(content, Path("params.yaml"))
    validate.main(validate.Params(), run)
    assert Path("build/validated").is_file()
    assert "sections are valid" in validate.describe(validate.Params())
    Path("build/validated").unlink()
    override(content, "lora.targets=[nothing,attn2.to_q,nil] generate.num_inference_steps=1001")
    override(content, "features.timesteps=[101,1000,401]")
    of_base = ["lora.targets", "lora.targets", "features.timesteps"]
    of_base.append("generate.num_inference_steps")
    for change, expected in (
        ("ingest.resize=8 score.splits=1001", ["ingest.resize", "score.splits"]),
        ("ingest.resize=null score.splits=10", of_base),
    ):
        override(content, change)
        YAML().dump(content, Path("params.yaml"))
        with pytest.raises(ValueError, match=expected[0]) as caught:
            validate.main(validate.Params(), run)
        assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == expected
    assert not Path("build/validated").exists()


def test_a_local_base_that_is_missing_or_broken_is_refused(content: Content, run: Run):
    content["base"]["path"] = "models/nowhere"
    [fault] = faults(content, run=run)
    assert fault.startswith("base.path: there is no folder models/nowhere")
    content["base"]["path"] = str(run.root)
    [fault] = faults(content, run=run)
    assert "has no vae/config.json" in fault


@pytest.mark.parametrize(
    ("component", "changes", "reason"),
    [
        ("unet/config", {"addition_embed_type": "text_time"}, "as SDXL's"),
        ("unet/config", {"num_class_embeds": 10}, "features must not know it"),
        ("unet/config", {"in_channels": 9}, "a mask (inpainting)"),
        ("unet/config", {"mid_block_type": None}, "the feature h (Eq. 4) reads"),
        ("unet/config", {"down_block_types": [], "up_block_types": [], "mid_block_type": "X"}, "w"),
        ("unet/config", {"cross_attention_dim": [16, 32, 32]}, "one conditioner"),
        ("scheduler/scheduler_config", {"prediction_type": "sample"}, "has another scale"),
        ("scheduler/scheduler_config", {"rescale_betas_zero_snr": True}, "must predict v"),
    ],
)
def test_a_base_that_cannot_work_is_refused_with_the_reason(  # noqa: PLR0917
    content: Content, tiny_base: Path, run: Run, component: str, changes: Content, reason: str
):
    """Stage `prepare` lists it among all else that is wrong."""
    base = Path(shutil.copytree(tiny_base, run.root / "base"))
    path = base / f"{component}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    override(content, "base.path=base data.root=nowhere data.source=auto")
    content["data"] |= {"num_train": None, "num_val": None}
    found = faults(content, run=run)
    assert all(fault.startswith("base.path: ") for fault in found)
    assert any(reason in fault for fault in found)
    with pytest.raises(ValueError, match=r"data\.root: ") as caught:
        prepare.main(parse(prepare.Params, content, source="params.yaml"), run)
    assert set(found) <= set(str(caught.value).splitlines())


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_needs_even_steps_and_says_whose_spacing_it_is(
    content: Content, tiny_base: Path, run: Run, spacing: str
):
    base = Path(shutil.copytree(tiny_base, run.root / "base"))
    path = base / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"timestep_spacing": spacing}))
    override(content, "base.path=base generate.num_inference_steps=20")
    found = faults(content, run=run)
    if spacing == "linspace":
        assert keys(found) == ["generate.num_inference_steps"]
        assert 'spacing is "linspace")' in found[0]
        assert found[0].endswith("is told; set generate.solver to dpmsolver++")
        override(content, "generate.solver=dpmsolver++")
    assert faults(content, run=run) == []


@pytest.mark.parametrize("preset", ["paper", "stable-diffusion-1-5", "stable-diffusion-2-1"])
def test_the_bases_of_presets_are_known_without_weights(run: Run, preset: str):
    content = read_params(ROOT / f"presets/{preset}.yaml")
    assert faults(content, run=run) == []
    override(content, "conditioner.input=latents conditioner.patch_size=3")
    assert keys(faults(content, run=run)) == ["conditioner.patch_size"]


def test_the_configuration_of_another_base_of_the_hub_is_fetched_once(
    content: Content, tiny_base: Path, run: Run, monkeypatch: pytest.MonkeyPatch
):
    def download(_name: str, *, local_dir: Path, **_: object) -> None:
        shutil.copytree(tiny_base, local_dir, dirs_exist_ok=True)

    content["base"] = HUB
    override(content, "lora.targets=[nothing]")
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", download)
        assert keys(faults(content, run=run)) == ["lora.targets"]
    assert keys(faults(content, run=run)) == ["lora.targets"]


def test_a_hub_that_cannot_be_reached_stops_nobody(
    content: Content, run: Run, capsys: pytest.CaptureFixture[str]
):
    """The base may come from DVC's cache; the tests have no network."""
    content["base"] = HUB
    assert faults(content, run=run) == []
    message = "validate: the parameters could not be checked against the base: base.path: somebody"
    assert capsys.readouterr().err.startswith(message)


HEAVY = """
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from stages.validate import check
from tests.settings import TINY, override

names = {"diffusers", "mlflow", "peft", "sklearn", "torchvision", "transformers", "torch._dynamo"}
names |= {"accelerate", "dvc", "matplotlib", "scipy", "timm"}
for change in sys.argv[2:]:
    content = deepcopy(TINY)
    override(content, f"base.path={sys.argv[1]} {change}")
    try:
        check(content, source="params.yaml", run=SimpleNamespace(root=Path()))
        print("no fault")
    except ValueError as error:
        print(error)
    print(sorted(names & set(sys.modules)))
"""


def test_no_check_needs_a_heavy_library(tiny_base: Path):
    changes = ["seed=1", "conditioner.drop=0.0", "lora.targets=[nothing]"]
    command = [sys.executable, "-c", HEAVY, str(tiny_base), *changes]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    first, second, third, rest = out.split("\n[]\n")
    assert first == "no fault"
    fault = "params.yaml: conditioner.drop: 0 never trains the null condition"
    assert second.startswith(fault)
    assert third.startswith("params.yaml: lora.targets: 'nothing' matches no linear layer")
    assert rest == ""


@pytest.mark.parametrize(
    ("edited", "root", "is_told"), [(True, ".", True), (False, ".", False), (True, "..", False)]
)
def test_a_refusal_tells_how_to_restore_params(
    run: Run, monkeypatch: pytest.MonkeyPatch, *, edited: bool, root: str, is_told: bool
):
    """But not if nothing has changed, and not in the copy of a queued experiment."""
    monkeypatch.setenv("DVC_ROOT", root)
    Path("params.yaml").write_text("a: 1\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init"], ["add", "."], ["commit", "-m", "a"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    Path("params.yaml").write_text("a: 2\n" if edited else "a: 1\n")
    with pytest.raises(ValueError, match=r"a: unknown key") as refusal:
        validate.main(validate.Params(), run)
    assert str(refusal.value).endswith("commit's file: git checkout params.yaml") == is_told
