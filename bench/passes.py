"""Count FLOPs and memory of one pass of Stable Diffusion v1.4's UNet and VAE, for a plan's costs.

    python -m bench passes

A pass has no gradients and is in float32, at 256 pixels. `contradiff.planning.costs` has the
result.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from bench.flops import LiveBytes
from contradiff.base.config import SHIPPED_CONFIGS
from contradiff.base.loading import unet_without_weights, vae_without_weights
from contradiff.planning.costs import COUNTED_BASE, COUNTED_SIZE

FOLDER, SIDE = SHIPPED_CONFIGS[COUNTED_BASE], COUNTED_SIZE // 8


def main(_arguments: Sequence[str]) -> None:
    """Print a line for each pass: GFLOP and MB for an image, MB of weights."""
    print(f"{'pass':14}{'GFLOP':>10}{'MB':>10}{'fixed MB':>12}")
    for name, (build, run) in PASSES.items():
        work = count_gflop(build, run)
        few, more = (count_bytes(build, run, num_images=number) / 1e6 for number in (2, 4))
        print(f"{name:14}{work:>10.1f}{(more - few) / 2:>10.1f}{2 * few - more:>12.1f}", flush=True)


def _unet(model: Any, number: int) -> None:
    latents, tokens = torch.empty(number, 4, SIDE, SIDE), torch.empty(number, 1, 768)
    model(latents, torch.full((number,), 1), tokens)


Run = Callable[[Any, int], object]
PASSES: dict[str, tuple[Callable[[], Any], Run]] = {
    "VAE, encode": (
        lambda: vae_without_weights(FOLDER),
        lambda model, n: model.encode(torch.empty(n, 3, COUNTED_SIZE, COUNTED_SIZE)).latent_dist,
    ),
    "VAE, decode": (
        lambda: vae_without_weights(FOLDER),
        lambda model, n: model.decode(torch.empty(n, 4, SIDE, SIDE)),
    ),
    "UNet": (lambda: unet_without_weights(FOLDER), _unet),
}


def count_gflop(build: Callable[[], Any], run: Run) -> float:
    """Count the work for one image."""
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        run(build().to("meta"), 2)
    return counter.get_total_flops() / 2e9


def count_bytes(build: Callable[[], Any], run: Run, *, num_images: int) -> int:
    """Count the largest total size of tensors that are alive at one time."""
    model = build()
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, torch.no_grad():
        model.to_empty(device="cpu")
        run(model, num_images)
    return live.peak
