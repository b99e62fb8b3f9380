"""The whole parameter file, checked at once."""

from stages.runtime.run import Run

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from contradiff.config import read_params
from stages import validate
from stages.validate import check, check_with_base

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def content() -> dict[str, Any]:
    return copy.deepcopy(read_params(ROOT / "presets/tiny.yaml"))


def test_all_faults_are_listed_once(content: dict[str, Any]):
    content["lose"] = {"lambda": 0.1}
    content["seed"] = "zero"
    content["loss"]["lamda"] = 0.5
    content["runtime"]["device"] = "tpu"
    del content["lora"]["rank"]
    with pytest.raises(ValueError, match="unknown") as caught:
        check(content, source="params.yaml")
    keys = [line.split(": ")[1] for line in str(caught.value).splitlines()]
    assert sorted(keys) == ["lora.rank", "lose", "loss.lamda", "runtime.device", "seed"]


@pytest.mark.parametrize("section", ["runtime", "seed", "data"])
def test_missing_section_is_named(content: dict[str, Any], section: str):
    del content[section]
    with pytest.raises(ValueError, match=f"params.yaml: {section}: missing"):
        check(content, source="params.yaml")


@pytest.mark.parametrize("value", [None, True, "abc", float("nan"), float("inf")])
def test_what_dvc_lets_pass_is_refused(content: dict[str, Any], value: object):
    """`dvc exp run -S loss.lambda=abc`, and `=null`, `=true`, are nothing to DVC."""
    content["loss"]["lambda"] = value
    with pytest.raises(ValueError, match=r"loss\.lambda"):
        check(content, source="params.yaml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss.lambda", -0.1),
        ("loss.temperature", 0.0),
        ("loss.temperature", -0.1),
        ("lora.rank", 0),
        ("lora.targets", []),
        ("features.timesteps", [401, 401, 101]),
        ("features.timesteps", [401, 201]),
        ("features.timesteps", [401, 201, -1]),
    ],
)
def test_impossible_value_is_refused_by_its_key(content: dict[str, Any], key: str, value: object):
    section, name = key.split(".")
    content[section][name] = value
    with pytest.raises(ValueError, match=r"params\.yaml: ") as caught:
        check(content, source="params.yaml")
    assert all(key in line for line in str(caught.value).splitlines())


def test_a_seed_that_overflows_is_refused(content: dict[str, Any]):
    content["seed"] = 2**32
    with pytest.raises(ValueError, match=r"^params\.yaml: seed: .* less than 4294967296"):
        check(content, source="params.yaml")
    content["seed"] -= 1
    check(content, source="params.yaml")


def test_classes_need_a_table(content: dict[str, Any]):
    content["generate"]["condition"] = "class"
    expected = r"generate\.condition: class .* class_condition\.epochs 1 or more"
    with pytest.raises(ValueError, match=expected):
        check(content, source="params.yaml")
    content["class_condition"]["epochs"] = 1
    check(content, source="params.yaml")


@pytest.mark.parametrize(
    ("loss", "refused"),
    [
        ({"latent_views": "same"}, True),
        ({"recon_passes": 4}, True),
        ({"recon_passes": 3}, False),
    ],
)
def test_distorted_colours_are_never_reconstructed(
    content: dict[str, Any], loss: dict[str, Any], *, refused: bool
):
    content["loss"] |= loss
    if refused:
        with pytest.raises(ValueError, match=r"latents\.colour_jitter: .* set it to 0"):
            check(content, source="params.yaml")
        content["latents"]["colour_jitter"] = 0
    check(content, source="params.yaml")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"generate": {"num_samples": 9}}, r"score\.splits: more than generate\.num_samples"),
        ({"generate": {"num_samples": 499}}, r"score\.kid_subset_size: more than generate"),
        ({"reference": {"num_kept": 499}}, r"score\.kid_subset_size: more than .*num_kept"),
        ({"extractor": {"width": 502}}, r"generate\.num_samples: fewer than the 1004 feature"),
        (
            {"extractor": {"kind": "inception", "weights": "x", "resizers": ["clean"]}},
            r"generate\.num_samples: fewer than the 2048 feature dimensions of extractor\.kind inc",
        ),
    ],
)
def test_scores_that_cannot_be_made_are_refused_before_sampling(
    content: dict[str, Any], changes: dict[str, dict[str, Any]], fault: str
):
    for section, values in changes.items():
        content[section] |= values
    with pytest.raises(ValueError, match=fault):
        check(content, source="params.yaml")


@pytest.mark.parametrize(
    ("generate", "fault"),
    [
        ({"condition": "noise"}, r"conditioner\.drop: 0 never trains the null condition"),
        ({"condition": "image", "guidance": 2.0}, r"conditioner\.drop: 0 never trains"),
        ({"condition": "class", "guidance": 2.0}, r"class_condition\.drop: 0 never trains"),
        ({"condition": "image"}, None),
        ({"condition": "class"}, None),
    ],
)
def test_a_null_condition_that_is_sampled_has_been_trained(
    content: dict[str, Any], generate: dict[str, Any], fault: str | None
):
    content["generate"] |= generate
    content["class_condition"]["epochs"] = 1
    check(content, source="params.yaml")
    for section in ("conditioner", "class_condition"):
        content[section]["drop"] = 0.0
    if fault is not None:
        with pytest.raises(ValueError, match=fault):
            check(content, source="params.yaml")
        content["conditioner"]["drop"] = content["class_condition"]["drop"] = 0.1
    check(content, source="params.yaml")


def test_a_second_view_of_noise_trains_the_null_condition_where_it_is_reconstructed(
    content: dict[str, Any],
):
    content["conditioner"] |= {"drop": 0.0, "cond_view": "noise"}
    with pytest.raises(ValueError, match=r"conditioner\.drop: 0"):
        check(content, source="params.yaml")
    content["loss"]["recon_passes"] = 6
    content["latents"]["colour_jitter"] = 0.0
    check(content, source="params.yaml")


def test_noise_has_nothing_to_guide(content: dict[str, Any]):
    content["generate"]["guidance"] = 1.5
    expected = r"generate\.guidance is 1\.5, but generate\.condition: noise"
    with pytest.raises(ValueError, match=expected):
        check(content, source="params.yaml")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"lora": {"targets": ["attn3.to_q"]}}, r"^lora\.targets: .*attn3\.to_q"),
        ({"features": {"timesteps": [401, 201, 1000]}}, r"^features\.timesteps: "),
        (
            {"features": {"timesteps": [401, 201, 100], "noising": "ddim_chain"}},
            r"^features\.timesteps: .*20-step grid",
        ),
        ({"features": {"more_triples": [[5, 201, 1000]]}}, r"^features\.more_triples: 1000 is"),
        ({"generate": {"num_inference_steps": 1001}}, r"^generate\.num_inference_steps: "),
        ({"data": {"image_size": 36}}, r"^data\.image_size: "),
        (
            {"conditioner": {"input": "latents", "patch_size": 3}},
            r"^conditioner\.patch_size: .* side of 8 ",
        ),
    ],
)
def test_what_the_base_cannot_serve_is_refused(
    tiny_base: Path, tmp_path: Path, changes: dict[str, dict[str, Any]], fault: str
):
    content = read_params(ROOT / "presets/tiny.yaml")
    content["base"]["path"] = str(tiny_base)
    check_with_base(content, root=tmp_path)
    for section, values in changes.items():
        content[section] |= values
    with pytest.raises(ValueError, match=fault):
        check_with_base(content, root=tmp_path)


def test_all_that_the_base_cannot_serve_is_named_at_once(
    content: dict[str, Any], tiny_base: Path, run_of: Callable[[str], Run]
):
    content["base"]["path"] = str(tiny_base)
    content["lora"]["targets"] = ["nothing", "attn2.to_q", "nil"]
    content["features"] |= {"noising": "ddim_chain", "timesteps": [101, 1000, 401]}
    content["features"]["more_triples"] = [[5, 1002, 1001]]
    content["generate"]["num_inference_steps"] = 1001
    content["conditioner"] |= {"input": "latents", "patch_size": 3}
    YAML().dump(content, Path("params.yaml"))
    with pytest.raises(ValueError, match="nothing") as caught:
        validate.main(validate.Params(), run_of("validate"))
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == [
        "lora.targets",
        "lora.targets",
        "generate.num_inference_steps",
        "features.timesteps",
        "features.more_triples",
        "features.more_triples",
        "features.timesteps",
        "features.more_triples",
        "conditioner.patch_size",
    ]
    assert str(caught.value).count("params.yaml: ") == 9


def test_a_local_base_that_is_not_there_is_refused(tmp_path: Path):
    content = read_params(ROOT / "presets/tiny.yaml")
    content["base"]["path"] = "models/nowhere"
    with pytest.raises(ValueError, match=r"^base\.path: there is no folder models/nowhere"):
        check_with_base(content, root=tmp_path)


def test_a_base_of_the_hub_whose_configuration_is_unknown_is_not_asked(tmp_path: Path):
    content = read_params(ROOT / "presets/tiny.yaml")
    content["base"] = {"source": "hub", "path": "somebody/model", "revision": "a" * 40}
    content["lora"]["targets"] = ["nothing"]
    check_with_base(content, root=tmp_path)


@pytest.mark.parametrize("section", ["pretrain", "class_condition"])
def test_a_batch_beyond_the_drawn_images_is_refused(content: dict[str, Any], section: str):
    content["class_condition"]["epochs"] = 1
    check(content, source="params.yaml")
    content[section]["batch_size"] = 4002
    with pytest.raises(ValueError, match=rf"^params.yaml: {section}\.batch_size: 4002 is more"):
        check(content, source="params.yaml")


def test_the_papers_base_is_known_without_weights():
    content = read_params(ROOT / "presets/paper.yaml")
    check_with_base(content, root=ROOT)
    content["conditioner"] |= {"input": "latents", "patch_size": 3}
    with pytest.raises(ValueError, match=r"^conditioner\.patch_size: .* side of 32 "):
        check_with_base(content, root=ROOT)


def test_the_stage_writes_its_out_only_when_all_is_well(
    content: dict[str, Any], tiny_base: Path, run_of: Callable[[str], Run]
):
    run = run_of("validate")
    content["base"]["path"] = str(tiny_base)
    content["lora"]["targets"] = ["nothing"]
    YAML().dump(content, Path("params.yaml"))
    with pytest.raises(ValueError, match=r"^params\.yaml: lora\.targets: 'nothing'"):
        validate.main(validate.Params(), run)
    assert not Path("build/validated").exists()
    content["lora"]["targets"] = ["attn2.to_q"]
    YAML().dump(content, Path("params.yaml"))
    validate.main(validate.Params(), run)
    assert Path("build/validated").is_file()
