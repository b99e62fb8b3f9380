"""Features depend on the image and the named model, not on the other images of the batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear
from torch import Tensor

from contradiff.features import models as feature_models
from contradiff.features.batches import CleanBatch, stored_batches
from contradiff.features.cache import ModelFolders
from contradiff.features.models import DiffusionFeatures, LabelledFeatures, compute_features
from contradiff.method.lora import disable_lora
from contradiff.method.model import ContraDiffModel, build_model
from contradiff.method.params import Architecture
from tests.settings import features_params

CPU = torch.device("cpu")
Build = Callable[..., ContraDiffModel]


@pytest.fixture
def model(build_tiny: Build) -> ContraDiffModel:
    return build_tiny()


def batches_of(tiny_data: Path, *, split: str = "val", batch_size: int = 8) -> list[CleanBatch]:
    folders = tiny_data / "images", tiny_data / "latents"
    return list(stored_batches(*folders, split=split, batch_size=batch_size))


def features_of(
    model: ContraDiffModel, batches: list[CleanBatch], *, seed: int = 0, **changes: Any
) -> LabelledFeatures:
    told: list[int] = []
    features = DiffusionFeatures(model, features_params(**changes), seed, CPU)
    found = compute_features(features, batches, on_progress=told.append)
    assert told == [len(batch.keys) for batch in batches]
    return found


@pytest.mark.parametrize(
    ("noising", "condition"),
    [
        ("direct", "image"),
        ("direct", "noise"),
        pytest.param("ddim_chain", "image", marks=pytest.mark.slow),  # it inverts in 20 passes
    ],
)
def test_batch_size_has_no_say(
    model: ContraDiffModel, tiny_data: Path, noising: str, condition: str
):
    settings = {"noising": noising, "condition": condition}
    expected = features_of(model, batches_of(tiny_data, split="train"), **settings)
    assert expected.features.std(dim=0).min() > 1e-2
    for batch_size in (1, 7, 24):
        batches = batches_of(tiny_data, split="train", batch_size=batch_size)
        shown = features_of(model, batches, **settings)
        assert (shown.keys, shown.labels.tolist()) == (expected.keys, expected.labels.tolist())
        torch.testing.assert_close(shown.features, expected.features, atol=1e-4, rtol=1e-4)


def test_levels_and_condition_count_and_the_order_does_not(model: ContraDiffModel, tiny_data: Path):
    """The noisiest timestep gives the query, in any order of features.timesteps."""
    batches = batches_of(tiny_data)
    first = features_of(model, batches, timesteps=[401, 201, 101]).features
    assert features_of(model, batches, timesteps=[101, 401, 201]).features.equal(first)
    for changes, least in (({"timesteps": [402, 201, 101]}, 1e-6), ({"condition": "image"}, 1e-4)):
        assert (features_of(model, batches, **changes).features - first).abs().max() > least


@pytest.mark.parametrize("noising", ["direct", "ddim_chain"])
def test_only_direct_noising_is_random(model: ContraDiffModel, tiny_data: Path, noising: str):
    """With direct noising, the noise differs between images and between seeds."""
    (batch,) = batches_of(tiny_data)
    latents, pixels = (each[:1].repeat(2, 1, 1, 1) for each in (batch.latents, batch.pixels))
    twins = CleanBatch((0, 1), latents, pixels, batch.labels[:2], batch.keys[:2])
    settings = {"noising": noising, "pool": "mean", "condition": "image"}
    first, second = features_of(model, [twins], **settings).features
    other, _ = features_of(model, [twins], seed=1, **settings).features
    for changed in (second, other):
        difference = (first - changed).abs().max()
        assert difference > 1e-2 if noising == "direct" else difference < 1e-5


def test_pooling(model: ContraDiffModel, tiny_data: Path):
    params = features_params(pool="mean", more_blocks=["up.1"])
    features = DiffusionFeatures(model, params, 0, CPU, keep_maps=True)
    (batch,) = batches_of(tiny_data)
    found = features(batch)
    maps = found["maps"]
    assert maps.shape == (8, 3, 32, 2, 2)
    mean = found["mean:mid@401-201-101"]
    torch.testing.assert_close(mean, maps.mean(dim=(3, 4)).reshape(8, 3 * 32))
    assert found["mean:up.1@401-201-101"].shape == (8, 3 * 32)
    with torch.no_grad():
        expected = model.attention(maps)
    attended = features_of(model, [batch], pool="attention").features
    torch.testing.assert_close(attended, expected, atol=1e-5, rtol=1e-5)


CHANGED_HEAD = {"self_conditioning": True, "block": "mid+up.1"}


@pytest.mark.parametrize(
    ("head", "noising"), [({}, "direct"), (CHANGED_HEAD, "direct"), (CHANGED_HEAD, "ddim_chain")]
)
def test_the_base_alone_is_the_model_before_training(  # noqa: PLR0917
    build_tiny: Build,
    save_tiny: Callable[..., None],
    tiny_base: Path,
    tiny_params: dict[str, Any],
    tiny_data: Path,
    tmp_path: Path,
    head: dict[str, Any],
    noising: str,
):
    """Before training, the conditioner's tokens are zero, as the base's always are."""
    save_tiny(tmp_path / "c", build_tiny(head=head), head=tiny_params["head"] | head)
    params = features_params(noising=noising, pool="mean", more_blocks=["up.1"])
    folders = ModelFolders(tmp_path / "c", tiny_base, tmp_path)
    alone = params.model_copy(update={"model": "base"})
    base = feature_models.load_feature_model(alone, folders, 0, CPU)
    base.model.block = "mid"
    shapes = Architecture.model_validate(tiny_params)
    untrained = build_model(tiny_base, shapes, image_size=32, seed=1).eval()
    (batch,) = batches_of(tiny_data)
    found, expected = base(batch), DiffusionFeatures(untrained, params, 0, CPU)(batch)
    assert list(found) == list(expected) == ["mean:mid@401-201-101", "mean:up.1@401-201-101"]
    assert all(found[name].equal(expected[name]) for name in found)


@pytest.mark.parametrize("condition", ["image", "noise"])
def test_untrained_features_are_those_of_a_model_without_a_step(
    tiny_base: Path, tiny_params: dict[str, Any], tiny_data: Path, condition: str
):
    shapes, pools = Architecture.model_validate(tiny_params), ("cleanest", "attention", "unpooled")
    params = features_params(condition=condition, more_blocks=["up.1"], more_triples=[[9, 5, 1]])
    options = {"image_size": 32, "more_pools": pools, "seed": 1, "device": CPU}
    features = feature_models.untrained_features(params, tiny_base, shapes, **options)
    untrained = build_model(tiny_base, shapes, image_size=32, seed=1).eval()
    own = features_params(condition=condition)  # with conditioner and LoRA
    (batch,) = batches_of(tiny_data)
    found = features(batch)
    expected = DiffusionFeatures(untrained, own, 1, CPU, keep_maps=True)(batch)
    maps = expected["maps"]
    assert found["attention:mid@401-201-101"].equal(expected["attention:mid@401-201-101"])
    assert found["mean:mid@401-201-101"].equal(maps.mean(dim=(3, 4)).flatten(1))
    assert found["cleanest:mid@401-201-101"].equal(maps[:, 2].mean(dim=(2, 3)))
    assert found["unpooled:mid@401-201-101"].equal(maps[:, 2].flatten(1))
    assert [column.pool for column in features.columns] == ["mean", *pools]


@pytest.mark.parametrize(("precision", "is_merged"), [("fp32", True), ("bf16", False)])
def test_lora_is_merged_only_in_float32(  # noqa: PLR0917
    build_tiny: Build,
    save_tiny: Callable[..., None],
    tiny_base: Path,
    tiny_data: Path,
    tmp_path: Path,
    precision: str,
    is_merged: bool,
):
    network = build_tiny()
    save_tiny(tmp_path / "c", network)
    params = features_params(precision=precision)
    folders = ModelFolders(tmp_path / "c", tiny_base, tmp_path)
    model = feature_models.load_feature_model(params, folders, 0, CPU)
    layers = [each for each in model.model.unet.modules() if isinstance(each, Linear)]
    assert layers
    assert all(layer.merged == is_merged for layer in layers)
    (batch,) = batches_of(tiny_data)
    [found] = model(batch).values()
    apart = DiffusionFeatures(network, params, 0, CPU)
    expected = apart(batch)[apart.columns[0].name].float()
    tolerance = 1e-5 if is_merged else 0.0
    assert (found.float() - expected).norm() <= tolerance * expected.norm()
    disable_lora(network.unet)
    without = apart(batch)[apart.columns[0].name].float()
    assert (without - expected).norm() > 0.01 * expected.norm()


@pytest.mark.parametrize("kind", ["contradiff", "base", "diffeed"])
def test_frozen_weights_in_half_precision_are_autocast_s_own(  # noqa: PLR0917
    build_tiny: Build,
    tiny_base: Path,
    tiny_data: Path,
    save_tiny: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
):
    """Casting weights once, or by autocast at every batch, gives the same features bit for bit."""
    save_tiny(tmp_path / "checkpoint", build_tiny())
    (batch,) = batches_of(tiny_data)
    pool = "attention" if kind == "contradiff" else "mean"

    def features(precision: str) -> tuple[torch.dtype, Tensor]:
        params = features_params(model=kind, pool=pool, precision=precision)
        folders = ModelFolders(tmp_path / "checkpoint", tiny_base, tmp_path)
        model = feature_models.load_feature_model(params, folders, 0, CPU)
        return model.model.unet.conv_in.weight.dtype, model(batch)[model.columns[0].name]

    dtype, cast = features("bf16")
    assert dtype == torch.bfloat16
    exact = features("fp32")[1]
    monkeypatch.setattr(feature_models, "cast_frozen_weights", lambda _: None)
    dtype, uncast = features("bf16")
    assert dtype == torch.float32
    assert torch.equal(cast, uncast)
    assert not torch.equal(cast.float(), exact)
