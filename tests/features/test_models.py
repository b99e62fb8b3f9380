"""What of a checkpoint a baseline's features may not see."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contradiff.features import models as feature_models
from contradiff.features.extraction import stored_batches
from contradiff.features.models import load_diffusion_features
from contradiff.method.model import ContraDiff
from tests.settings import features_params


@pytest.mark.parametrize("noising", ["direct", "ddim_chain"])
def test_base_features_are_without_the_checkpoints_self_conditioning(  # noqa: PLR0917
    build_tiny: Callable[..., ContraDiff],
    tiny_base: Path,
    tiny_params: dict[str, Any],
    tiny_data: Path,
    save_tiny: Callable[..., None],
    tmp_path: Path,
    noising: str,
):
    """The same from a checkpoint with it and from one without; of contradiff's own they differ."""
    shards = tiny_data / "images", tiny_data / "latents"
    [batch] = stored_batches(*shards, split="val", batch_size=8)
    found: dict[tuple[bool, str], dict[str, Tensor]] = {}
    for self_conditioning in (True, False):
        head = {"self_conditioning": self_conditioning}
        model = build_tiny(head=head)
        checkpoint = tmp_path / str(self_conditioning)
        save_tiny(checkpoint, model, head=tiny_params["head"] | head)
        for kind in ("base", "contradiff"):
            features = load_diffusion_features(
                features_params(
                    model=kind, noising=noising, pool="mean", precision="fp32", more_blocks=["up.1"]
                ),
                checkpoint=checkpoint,
                base=tiny_base,
                keep_maps=False,
                seed=0,
                device=torch.device("cpu"),
            )
            found[self_conditioning, kind] = features(batch)
    name = "mean:up.1@401-201-101"
    for column, expected in found[False, "base"].items():
        torch.testing.assert_close(found[True, "base"][column], expected)
    difference = found[True, "contradiff"][name] - found[False, "contradiff"][name]
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["contradiff", "base", "diffeed"])
def test_frozen_weights_in_half_precision_are_autocast_s_own(  # noqa: PLR0917
    build_tiny: Callable[..., ContraDiff],
    tiny_base: Path,
    tiny_data: Path,
    save_tiny: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
):
    """Cast once, or by autocast at every batch: the same features, bit for bit."""
    save_tiny(tmp_path / "checkpoint", build_tiny())
    shards = tiny_data / "images", tiny_data / "latents"
    [batch] = stored_batches(*shards, split="val", batch_size=8)
    pool = "attention" if kind == "contradiff" else "mean"

    def features(precision: str) -> tuple[torch.dtype, Tensor]:
        model = load_diffusion_features(
            features_params(model=kind, pool=pool, precision=precision),
            checkpoint=tmp_path / "checkpoint",
            base=tiny_base,
            keep_maps=False,
            seed=0,
            device=torch.device("cpu"),
        )
        return model.model.unet.conv_in.weight.dtype, model(batch)[model.columns[0].name]

    dtype, cast = features("bf16")
    assert dtype == torch.bfloat16
    exact = features("fp32")[1]
    monkeypatch.setattr(feature_models, "cast_frozen_weights", lambda _: None)
    dtype, uncast = features("bf16")
    assert dtype == torch.float32
    assert torch.equal(cast, uncast)
    assert not torch.equal(cast.float(), exact)
