"""Count FLOPs and peak memory of a training step, and FLOPs of features, for several options.

    python -m bench flops                     the paper preset: Stable Diffusion v1.4, 256 pixels
    python -m bench flops presets/tiny.yaml

torch's FlopCounterMode counts matrix products, convolutions and attention, forward and backward,
from the tensors' shapes. So the numbers are exact and equal on all machines.

Peak memory is the largest total size of the tensors that are alive at one time. The column "peak
MB" is the memory for each image. The column "other MB" is memory that does not grow with the batch:
the weights, and the latents that pass the up blocks together. A GPU also needs 12 bytes for each
trained weight (optimiser and DDP), and memory for its kernels and its allocator.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from contradiff.base.config import BaseParams, config_folder
from contradiff.config import parse, read_params
from contradiff.features.inversion import inverted_maps
from contradiff.features.params import FeaturesParams
from contradiff.method.lora import merge_lora
from contradiff.training.flops import (
    NUM_IMAGES,
    StepParams,
    build,
    empty_batch,
    of_training_step,
    training_step,
)

BATCH_SIZES = (64, 128)
"""Two batch sizes, to compute the memory per image: the paper's 512 on 8 GPUs and on 4."""
BASELINE: dict[str, Any] = {"pretrain.gradient_checkpointing": "none"}
"""Set in all rows, so that each row shows its own cost."""
VARIANTS: list[dict[str, Any]] = [
    {},
    {"loss.lambda": 0.0},
    {"loss.recon_passes": 6},
    {"loss.min_snr_gamma": 5.0},
    {"conditioner.cond_view": "noise"},
    {"conditioner.input": "latents", "conditioner.patch_size": 2},
    {"head.block": "mid+up.1"},
    {"head.self_conditioning": True},
    {"pretrain.decode_batch_size": 0},
    {"pretrain.gradient_checkpointing": "down.0"},
    {"pretrain.gradient_checkpointing": "all"},
    {"features.noising": "ddim_chain"},
]


class Params(StepParams):
    """The sections on which the FLOPs and the memory of a step, and the FLOPs of h, depend."""

    base: BaseParams
    features: FeaturesParams


def main(arguments: Sequence[str]) -> None:
    """Print the table for a parameter file."""
    path = Path(arguments[0] if arguments else "presets/paper.yaml")
    content = read_params(path)
    print(f"{path}: GFLOPs and peak megabytes (10^6 bytes) per image, other megabytes\n")
    units = f"{'peak MB':>10}{'other MB':>12}"
    print(f"{'':52}{'training step':>16}{'':>8}{'features':>12}{'':>8}{units}")
    first: tuple[float, float] | None = None
    for changes in VARIANTS:
        name = ", ".join(f"{key}={value}" for key, value in changes.items())
        name = name or "the preset without checkpointing"
        params = parse(Params, changed(content, BASELINE | changes), source=str(path))
        folder = config_folder(params.base, root=Path())
        step, features = of_training_step(params, folder), of_features(params, folder)
        peak, other = (size / 1e6 for size in peak_bytes(params, folder))
        first = first or (step, features)
        flops = f"{step:>16.3f}{step / first[0]:>7.2f}x{features:>12.3f}"
        memory = f"{peak:>10.1f}{other:>12.1f}"
        print(f"{name:52}{flops}{features / first[1]:>7.2f}x{memory}", flush=True)


def changed(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the parameters, with the dotted keys in `changes` set to new values."""
    result = deepcopy(content)
    for key, value in changes.items():
        section, name = key.split(".")
        result[section][name] = value
    return result


def peak_bytes(params: Params, folder: Path) -> tuple[float, float]:
    """Count a step's peak memory: bytes per image, and bytes that do not grow with the batch."""
    few, more = BATCH_SIZES
    first, second = (_peak(params, folder, num_images=n) for n in BATCH_SIZES)
    an_image = (second - first) / (more - few)
    return an_image, first - few * an_image


def _peak(params: Params, folder: Path, *, num_images: int) -> int:
    precision = params.pretrain.precision
    model = build(params, folder, precision=precision)
    norms = cuda_norms() if (half := precision == "bf16") else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, norms:
        # Autocast does not support the meta device. Fake tensors can pretend to be on the CPU.
        model.to_empty(device="cpu")
        batch = empty_batch(model, params, folder, num_images=num_images)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = training_step(model, params)(batch)["loss"]
        loss.backward()
    return live.peak


def cuda_norms() -> AbstractContextManager[Any]:
    """Run norms under autocast in float32, as it does on CUDA but not on the CPU."""

    def in_float32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def as_on_cuda(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            is_active = torch.is_autocast_enabled(tensor.device.type)
            return norm(tensor.float() if is_active else tensor, *args, **kwargs)

        return as_on_cuda

    # A TorchFunctionMode would have no effect while a checkpointed block is computed again.
    norms = {name: in_float32(getattr(F, name)) for name in ("group_norm", "layer_norm")}
    return patch.multiple(F, **norms)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are in memory, and keeps the largest count."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.size = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count the bytes of its new tensors."""
        result = func(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            key, size = id(storage), storage.nbytes()
            if key not in self.known:
                self.known.add(key)
                self.size += size
                self.peak = max(self.peak, self.size)
                weakref.finalize(storage, self._drop, key, size)
        return result

    def _drop(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.size -= size


def of_features(params: Params, folder: Path) -> float:
    """Count the GFLOPs per image of the feature h, including the conditioner."""
    model = build(params, folder).eval()
    if params.features.precision == "fp32":
        merge_lora(model.unet)
    options = {"timesteps": params.features.timesteps, "blocks": [model.block]}
    with torch.device("meta"), torch.no_grad():
        batch = empty_batch(model, params, folder, num_images=NUM_IMAGES)
        with FlopCounterMode(display=False) as counter:
            tokens = model.encode_condition(batch.conditions[0])
            if params.features.noising == "ddim_chain":
                maps = inverted_maps(model, batch.latents[0], tokens, **options)
            else:
                maps = model.level_maps(batch.latents[0], tokens, noise=batch.noise[0], **options)
            model.attention(maps[model.block])
    return counter.get_total_flops() / NUM_IMAGES / 1e9
