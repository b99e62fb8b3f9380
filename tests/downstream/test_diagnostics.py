"""Closed forms, and one transcription: whose partner is found, pair by pair."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contradiff.base.loading import NoiseSchedule
from contradiff.data.subsets import is_dev
from contradiff.downstream import diagnostics
from contradiff.downstream.diagnostics import (
    alignment,
    denoising_error,
    partners,
    two_views,
    uniformity,
    view_metrics,
)
from contradiff.features.batches import CleanBatch, stored_batches
from contradiff.features.models import DiffusionFeatures
from contradiff.features.spread import effective_rank
from contradiff.method.model import ContraDiffModel
from tests.settings import features_params

CPU = torch.device("cpu")
AXES = torch.eye(5)


@given(st.integers(2, 30), st.integers(1, 9), st.integers(0, 99))
def test_partners_are_those_of_a_search_pair_by_pair(count: int, width: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    queries, candidates = torch.randn(2, count, width, generator=generator).double()
    for query, found in zip(queries, partners(queries, candidates), strict=True):
        cosines = [float(torch.cosine_similarity(query, each, dim=0)) for each in candidates]
        assert cosines[int(found)] == pytest.approx(max(cosines))
    assert partners(queries, queries * 3).tolist() == list(range(count)) or width == 1


def test_closed_forms():
    assert alignment(AXES, 2 * AXES) == 0
    assert alignment(AXES, -AXES) == pytest.approx(4)
    assert alignment(AXES, AXES.roll(1, 0)) == pytest.approx(2)
    # orthogonal unit vectors have distance sqrt(2), opposite ones 2, equal ones 0
    assert uniformity(3 * AXES) == pytest.approx(-4)
    assert uniformity(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx(-8)
    assert uniformity(torch.ones(4, 3)) == pytest.approx(0)
    isotropic = torch.cat([AXES, -AXES]) + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert effective_rank(isotropic) == pytest.approx(5, rel=1e-5)
    assert effective_rank(torch.arange(6.0)[:, None] * torch.ones(3)) == pytest.approx(1, abs=1e-4)
    # singular values 3 and 1: shares 3/4 and 1/4
    cross = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert effective_rank(cross) == pytest.approx(math.exp(entropy))


def test_views_are_the_dev_images_with_the_centre_crop_s_pixels(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch
):
    folders = tiny_data / "images", tiny_data / "latents"
    views = two_views(*folders)
    assert views is not None
    [every] = stored_batches(*folders, split="train", batch_size=24)
    dev = [row for row, key in enumerate(every.keys) if is_dev(key)]
    for view in views:
        assert view.keys == tuple(every.keys[row] for row in dev)
        assert view.pixels.equal(every.pixels[dev])
    assert views[0].latents.equal(every.latents[dev])
    assert not (views[1].latents == views[0].latents).all(dim=(1, 2, 3)).any()
    monkeypatch.setattr(diagnostics, "is_dev", lambda key: key == every.keys[3])
    assert two_views(*folders) is None


def of(model: ContraDiffModel, **changes: object) -> DiffusionFeatures:
    return DiffusionFeatures(model, features_params(**changes), 0, CPU)


def stub(monkeypatch: pytest.MonkeyPatch, *, latent: float, condition: float) -> None:
    """Let features be a sum of the latent's and the condition's pixels, with these weights."""

    def call(
        self: DiffusionFeatures, batch: CleanBatch, shown: CleanBatch | None = None
    ) -> dict[str, torch.Tensor]:
        is_null = self.params.condition == "noise"
        pixels = 0 if is_null else condition * (shown or batch).pixels.flatten(1)
        table = latent * batch.latents.flatten(1) + pixels
        return {"h": table, "maps": table}

    monkeypatch.setattr(DiffusionFeatures, "__call__", call)


@pytest.mark.parametrize(("latent", "condition"), [(1.0, 1e-3), (1e-3, 1.0)])
def test_what_h_follows_is_found(
    build_tiny: Callable[..., ContraDiffModel],
    monkeypatch: pytest.MonkeyPatch,
    latent: float,
    condition: float,
):
    latents, pixels = torch.randn(2, 20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    keys = tuple(map(str, range(20)))
    view = CleanBatch(tuple(range(20)), latents, pixels, torch.zeros(20, dtype=torch.long), keys)
    stub(monkeypatch, latent=latent, condition=condition)
    found = view_metrics(of(build_tiny(), condition="image"), view, view)
    follows_latent = float(latent > condition)
    expected = {"own": 1.0, "null": 1.0, "by_latent": follows_latent}
    assert found["retrieval"] == expected | {"by_condition": 1 - follows_latent}
    assert found["h"]["alignment"] == 0


def test_metrics_do_not_depend_on_the_batch_size(
    build_tiny: Callable[..., ContraDiffModel], tiny_data: Path
):
    folders = tiny_data / "images", tiny_data / "latents"
    first, second = (
        next(stored_batches(*folders, split="train", batch_size=24, view=view)) for view in (0, 1)
    )
    model = build_tiny()
    for condition in ("image", "noise"):
        one, other = (
            view_metrics(of(model, condition=condition, batch_size=size), first, second)
            for size in (7, 24)
        )
        assert one["retrieval"] == other["retrieval"]
        for name in ("h", "maps"):
            assert one[name] == pytest.approx(other[name], rel=1e-3)
            assert 0 < one[name]["alignment"] < 4
            assert one[name]["effective_rank"] > 1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_the_denoising_error_is_that_of_eq_3(
    build_tiny: Callable[..., ContraDiffModel], tiny_data: Path, kind: str
):
    """For a base that predicts v, it is the error of the noise that v means."""
    model = build_tiny()
    own = model.schedule.scheduler
    model.schedule = NoiseSchedule(type(own).from_config(own.config, prediction_type=kind))
    [batch] = stored_batches(tiny_data / "images", tiny_data / "latents", split="val", batch_size=8)
    asked: list[tuple[int, bool]] = []
    null = of(model, condition="noise")
    whole = denoising_error(null, [batch])
    assert denoising_error(null, batch.split(3)) == pytest.approx(whole, rel=1e-4)

    def cheat(noisy: torch.Tensor, steps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Predict the noise that was added, wrong by a tenth of it."""
        alpha = model.schedule.alphas_cumprod[steps[0]]
        asked.append((int(steps[0]), bool(tokens.any())))
        wrong = 1.1 * (noisy - alpha.sqrt() * batch.latents) / (1 - alpha).sqrt()
        return wrong if kind == "epsilon" else (wrong - (1 - alpha).sqrt() * noisy) / alpha.sqrt()

    model.predict = cheat  # pyright: ignore[reportAttributeAccessIssue]
    base = replace(null, params=null.params.model_copy(update={"model": "base"}))
    for features in (null, base):
        assert denoising_error(features, [batch]) == pytest.approx(0.01, rel=0.1)
    levels = range(50, 1000, 100)
    assert asked == [(level, has_tokens) for has_tokens in (True, False) for level in levels]
