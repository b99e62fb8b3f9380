"""DDIM beside diffusers' pipeline: same UNet, noise and conditions, and the same images.

Both turn noise and given conditions into bytes of images, with guidance. diffusers' pipeline runs
once with LoRA as peft attaches it, and once with LoRA merged. In the last row, ours takes a fifth
of the steps with another solver, so that its images differ: this is other work.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench._tiny import random_model, write_base
from bench._turns import Row, compare
from contradiff.base.loading import load_vae
from contradiff.base.vae import decode_latents
from contradiff.generation.params import Solver
from contradiff.generation.sampling import denoise
from contradiff.generation.solvers import load_solver
from contradiff.method.lora import merge_lora

GUIDANCE = 1.5
LEVELS = 1.0
"""Images may differ by one of 255 levels."""


def rows(base: Path, *, rounds: int, images: int = 16, steps: int = 25) -> Iterator[Row]:
    """Yield the rows; the paper's 100 steps of DDIM would become 20."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )

    write_base(base)
    model, unmerged, merged = random_model(base), *(random_model(base, plain=True) for _ in "ab")
    for each in (model, merged):
        merge_lora(each.unet)
    vae, plain_vae = load_vae(base), load_vae(base)
    plain_vae.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    side, width = vae.config["sample_size"] // 4, model.unet.config["cross_attention_dim"]
    torch.manual_seed(2)
    noise = torch.randn(images, 4, side, side)
    tokens, null_tokens = torch.randn(2, images, 16, width)

    def ours(solver: Solver, num_steps: int) -> Tensor:
        scheduler = load_solver(base, solver=solver, num_inference_steps=num_steps)
        options: Any = {"null_tokens": null_tokens, "guidance": GUIDANCE}
        return decode_latents(vae, denoise(model, scheduler, noise, tokens, **options))

    def peer(unet: Any) -> Tensor:
        scheduler = load_solver(base, solver="ddim", num_inference_steps=steps)
        absent = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
        parts = {"vae": plain_vae, "unet": unet, "scheduler": scheduler, **dict.fromkeys(absent)}
        pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        options = {"guidance_scale": GUIDANCE, "num_inference_steps": steps, "output_type": "np"}
        options |= {"height": side * 4, "width": side * 4, "latents": noise}
        options |= {"prompt_embeds": tokens, "negative_prompt_embeds": null_tokens}
        found = (pipeline(**options).images * 255).round().astype("uint8")
        return torch.from_numpy(found).permute(0, 3, 1, 2)

    def levels_between(first: Callable[[], Tensor], second: Callable[[], Tensor]) -> float:
        return (first().int() - second().int()).abs().max().item()

    same = partial(ours, "ddim", steps)
    for name, unet in (("LoRA attached", unmerged.unet), ("LoRA merged", merged.unet)):
        theirs = partial(peer, unet)
        yield compare(
            "sampling",
            f"diffusers' pipeline, DDIM, {name}",
            (same, theirs),
            rounds=rounds,
            goal=1.05,
            error=partial(levels_between, same, theirs),
            tolerance=LEVELS,
            note="equal: images, in levels of 255",
        )
    fast = max(1, steps // 5)
    yield compare(
        f"sampling, dpmsolver++ in {fast} steps",
        f"diffusers' pipeline, DDIM in {steps} steps, LoRA attached",
        (partial(ours, "dpmsolver++", fast), partial(peer, unmerged.unet)),
        rounds=rounds,
        goal=5.0,
        note="other work: the images differ",
    )
