"""FLOPs and kept activations of a training step, FLOPs of features, for each switch of the method.

    python -m bench flops                 the paper preset: Stable Diffusion v1.4 at 256 pixels
    python -m bench flops presets/tiny.yaml

FLOPs are counted by torch's FlopCounterMode while a step runs forward and backward on the meta
device: exact, the same on every machine. Matrix products, convolutions and attention count.

Kept activations are the bytes that autograd saves for the backward pass, by torch's own hooks on
fake tensors under the preset's precision (attention as CPU kernels save it, which is what CUDA's
flash attention saves: queries, keys, values, output and one number a row). Weights are counted
apart, as they are held while training and with what autocast copies of them. A GPU needs both, the
gradients and moments of what is trained, and the workspace of the largest layer.
"""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from contradiff.backbone import NoiseSchedule, unet_without_weights
from contradiff.base_config import BaseParams, config_folder, downsampling_of
from contradiff.conditioner import ConditionerParams
from contradiff.config import Section, parse, read_params
from contradiff.features import FeaturesParams, HeadParams
from contradiff.inversion import inverted_maps
from contradiff.lora import LoraParams
from contradiff.losses import LossParams
from contradiff.model import ContraDiff, TrainingBatch
from contradiff.recipe import PretrainParams
from contradiff.training import set_up
from contradiff.types import Precision

NUM_IMAGES = 4
"""FLOPs an image do not depend on it, but for the contrastive loss's own few."""

VARIANTS: dict[str, dict[str, Any]] = {
    "the preset": {},
    "loss.lambda=0": {"loss.lambda": 0.0},
    "loss.recon_passes=6": {"loss.recon_passes": 6},
    "loss.min_snr_gamma=5": {"loss.min_snr_gamma": 5.0},
    "conditioner.cond_view=crop": {"conditioner.cond_view": "crop"},
    "conditioner.input=latents (patch 2)": {
        "conditioner.input": "latents",
        "conditioner.patch_size": 2,
    },
    "head.block=mid+up.1": {"head.block": "mid+up.1"},
    "head.self_conditioning=true": {"head.self_conditioning": True},
    "pretrain.gradient_checkpointing=true": {"pretrain.gradient_checkpointing": True},
    "features.noising=ddim_chain": {"features.noising": "ddim_chain"},
}


class Params(Section):
    """What decides the FLOPs of a step."""

    data: dict[str, Any]
    base: BaseParams
    lora: LoraParams
    conditioner: ConditionerParams
    head: HeadParams
    loss: LossParams
    features: FeaturesParams
    pretrain: PretrainParams


def main(arguments: Sequence[str]) -> None:
    """Print the table for a parameter file."""
    path = Path(arguments[0] if arguments else "presets/paper.yaml")
    content = read_params(path)
    print(f"{path}: GFLOPs and kept megabytes (10^6 bytes) an image, megabytes of weights\n")
    units = f"{'kept MB':>10}{'weights MB':>12}"
    print(f"{'':38}{'training step':>16}{'':>8}{'features':>12}{'':>8}{units}")
    first: tuple[float, float] | None = None
    for name, changes in VARIANTS.items():
        params = parse(Params, changed(content, changes), source=str(path))
        folder = config_folder(params.base, root=Path(), shipped=Path("presets"))
        step, features = of_training_step(params, folder), of_features(params, folder)
        kept, weights = (size / 1e6 for size in kept_bytes(params, folder))
        first = first or (step, features)
        ratios = f"{step / first[0]:>6.2f}x", f"{features / first[1]:>6.2f}x"
        numbers = f"{step:>16.3f}{ratios[0]:>8}{features:>12.3f}{ratios[1]:>8}{kept:>10.3f}"
        print(f"{name:38}{numbers}{weights:>12.1f}", flush=True)


def changed(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The parameters with some dotted keys changed."""
    result = deepcopy(content)
    for key, value in changes.items():
        section, name = key.split(".")
        result[section][name] = value
    return result


def build(params: Params, folder: Path, *, precision: Precision = "fp32") -> ContraDiff:
    """The model set up for training, on the meta device.

    But for the schedule, which decides which passes are made. FLOPs do not depend on the precision,
    and autocast knows no meta device.
    """
    schedule = NoiseSchedule.of_base(folder)
    with torch.device("meta"):
        model = ContraDiff(
            unet_without_weights(folder),
            schedule,
            lora=params.lora,
            conditioner=params.conditioner,
            head=params.head,
            image_size=params.data["image_size"],
            downsampling=downsampling_of(folder),
        )
    set_up(
        model,
        loss=params.loss,
        gradient_checkpointing=params.pretrain.gradient_checkpointing,
        precision=precision,
    )
    return model


def latent_shape(model: ContraDiff, params: Params, folder: Path) -> tuple[int, int, int]:
    """Channels and sides of a latent."""
    side = params.data["image_size"] // downsampling_of(folder)
    return model.unet.config["in_channels"], side, side


def of_training_step(params: Params, folder: Path) -> float:
    """GFLOPs an image of forward and backward."""
    model = build(params, folder)
    with torch.device("meta"):
        step = _Step(model, params, folder, num_images=NUM_IMAGES)
        with FlopCounterMode(display=False) as counter:
            step.forward().backward()
    return counter.get_total_flops() / NUM_IMAGES / 1e9


def kept_bytes(params: Params, folder: Path) -> tuple[float, float]:
    """What a training step holds when its forward pass is over.

    Returns:
        Bytes an image of activations, and bytes of weights: the model's own and their copies in
        half precision, which are what does not grow with the batch.
    """
    few, more = (_held(params, folder, num_images=n) for n in (NUM_IMAGES, 2 * NUM_IMAGES))
    return (more - few) / NUM_IMAGES, 2 * few - more


def _held(params: Params, folder: Path, *, num_images: int) -> int:
    precision = params.pretrain.precision
    model = build(params, folder, precision=precision)
    seen: dict[StorageWeakRef, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[StorageWeakRef(storage)] = storage.nbytes()
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        # Autocast knows no meta device; fake tensors are said to be on the CPU.
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                setattr(module, name, nn.Parameter(fake, parameter.requires_grad))
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        step = _Step(model, params, folder, num_images=num_images)
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = step.forward()
    assert loss.requires_grad  # and with it all that it keeps is still alive
    for parameter in model.parameters():
        note(parameter)
    return sum(seen.values())


class _Step:
    """A model in training and a batch without content, on torch's current default device."""

    def __init__(self, model: ContraDiff, params: Params, folder: Path, *, num_images: int) -> None:
        self.model = model.train()
        self.loss = params.loss
        self.shared = params.conditioner.cond_view == "same"
        latent = latent_shape(self.model, params, folder)
        condition = self.model.conditioner.shape
        self.batch = TrainingBatch(
            latents=torch.empty(2, num_images, *latent),
            conditions=torch.empty(2, num_images, *condition),
            condition_noise=torch.empty(2, num_images, *condition),
            dropped=torch.empty(2, num_images, dtype=torch.bool),
            timesteps=torch.empty(2, 3, num_images, dtype=torch.long),
            noise=torch.empty(2, 3, num_images, *latent),
        )

    def forward(self) -> Tensor:
        """The step's loss."""
        return self.model(self.batch, loss=self.loss, shared_condition=self.shared)["loss"]


def of_features(params: Params, folder: Path) -> float:
    """GFLOPs an image of the feature h, its condition included."""
    timesteps = params.features.timesteps
    model = build(params, folder).eval()
    with torch.device("meta"), torch.no_grad():
        latents = torch.empty(NUM_IMAGES, *latent_shape(model, params, folder))
        with FlopCounterMode(display=False) as counter:
            tokens = model.encode_condition(torch.empty(NUM_IMAGES, *model.conditioner.shape))
            if params.features.noising == "ddim_chain":
                maps = inverted_maps(model, latents, tokens, timesteps=timesteps)
            else:
                noise = torch.empty(3, *latents.shape)
                maps = model.level_maps(latents, tokens, timesteps=timesteps, noise=noise)
            model.attention(maps)
    return counter.get_total_flops() / NUM_IMAGES / 1e9
