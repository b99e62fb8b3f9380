"""contradiff.feature_models: what of a checkpoint a baseline's features may not see."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contradiff.checkpoint import save_checkpoint
from contradiff.extraction import stored_batches
from contradiff.feature_models import load_diffusion_features
from contradiff.model import ContraDiff
from contradiff.parameter_counts import count_parameters
from tests.settings import features_params


@pytest.mark.parametrize("noising", ["direct", "ddim_chain"])
def test_base_features_are_without_the_checkpoints_self_conditioning(  # noqa: PLR0917
    build_tiny: Callable[..., ContraDiff],
    tiny_base: Path,
    tiny_params: dict[str, Any],
    tiny_data: Path,
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
        save_checkpoint(
            checkpoint,
            model,
            base=tiny_base,
            image_size=32,
            num_steps=1,
            counts=count_parameters(model, num_vae_parameters=0),
            params=tiny_params | {"head": tiny_params["head"] | head},
        )
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
