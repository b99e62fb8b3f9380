"""Compare our sampling with diffusers' pipeline: same UNet, noise and conditions.

    python -m bench sampling                       the tiny UNet, 16 samples, 25 steps, guidance 1.5
    python -m bench sampling --images 100 --steps 100

Each row turns the same noise and conditions into images, with random weights. In the first row,
diffusers' pipeline runs DDIM with unmerged LoRA. A ratio of 2 means twice as fast as the
first row (median over the rounds). The last row is faster partly because it has fewer steps.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from contradiff.base.loading import load_vae
from contradiff.base.vae import decode_latents
from contradiff.config import read_params
from contradiff.generation.sampling import denoise
from contradiff.generation.solvers import Solver, load_solver
from contradiff.method.checkpoint import Architecture
from contradiff.method.lora import merge_lora
from contradiff.method.model import ContraDiffModel, build_model
from contradiff.toy.base_recipe import build_scheduler, build_unet, build_vae

GUIDANCE = 1.5


def main(arguments: Sequence[str]) -> None:
    """Measure all ways and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench sampling", description=__doc__)
    for name, default in (("images", 16), ("steps", 25), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        rows = measure(Path(name), **vars(options))
    print(f"{options.images} images, guidance {GUIDANCE:g}, median of {options.rounds} rounds\n")
    for label, ratio, difference in rows:
        print(f"{label:52}{ratio:>6.2f}x{difference:>24}", flush=True)


def random_model(base: Path) -> ContraDiffModel:
    """Build the tiny preset's model, with random LoRA weights (untrained LoRA has no effect)."""
    content = read_params(Path("presets/tiny.yaml"))
    sections = {name: content[name] for name in Architecture.model_fields}
    shapes = Architecture.model_validate(sections)
    model = build_model(base, shapes, image_size=content["data"]["image_size"], seed=0)
    for name, parameter in model.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def measure(base: Path, *, images: int, steps: int, rounds: int) -> list[tuple[str, float, str]]:
    """Write a tiny random base to `base`; return rows (label, speed, difference of images)."""
    torch.manual_seed(0)
    for name, build in (("vae", build_vae), ("unet", build_unet), ("scheduler", build_scheduler)):
        build().save_pretrained(base / name)
    unmerged, merged = random_model(base), random_model(base)
    merge_lora(merged.unet)
    vae = load_vae(base)
    side = vae.config["sample_size"] // 4
    noise = torch.randn(images, 4, side, side)
    width = merged.unet.config["cross_attention_dim"]
    tokens, null_tokens = torch.randn(2, images, 16, width)

    def ours(solver: Solver, num_steps: int) -> Tensor:
        scheduler = load_solver(base, solver=solver, num_inference_steps=num_steps)
        options = {"null_tokens": null_tokens, "guidance": GUIDANCE}
        return decode_latents(vae, denoise(merged, scheduler, noise, tokens, **options))

    def peer(unet: Any) -> Tensor:
        scheduler = load_solver(base, solver="ddim", num_inference_steps=steps)
        absent = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
        parts = {"vae": vae, "unet": unet, "scheduler": scheduler, **dict.fromkeys(absent)}
        pipeline = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        options = {"guidance_scale": GUIDANCE, "num_inference_steps": steps, "output_type": "np"}
        options |= {"height": side * 4, "width": side * 4, "latents": noise}
        options |= {"prompt_embeds": tokens, "negative_prompt_embeds": null_tokens}
        images = (pipeline(**options).images * 255).round().astype("uint8")
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    fast = max(1, steps // 5)  # the paper's 100 steps of DDIM become 20
    contenders = {
        f"diffusers' pipeline, DDIM {steps}, LoRA unmerged": partial(peer, unmerged.unet),
        f"diffusers' pipeline, DDIM {steps}, LoRA merged": partial(peer, merged.unet),
        f"ours, DDIM {steps}": partial(ours, "ddim", steps),
        f"ours, dpmsolver++ {fast} (other work)": partial(ours, "dpmsolver++", fast),
    }
    seconds: dict[str, list[float]] = {label: [] for label in contenders}
    made: dict[str, Tensor] = {}
    for number in range(rounds + 1):
        for label, sample in contenders.items():
            started = time.process_time()
            made[label] = sample()
            if number:  # the first round warms up
                seconds[label].append(time.process_time() - started)
    first, rows = next(iter(contenders)), []
    for label, own in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[first], own, strict=True))
        levels = (made[label].int() - made[first].int()).abs().max().item()
        rows.append((label, ratio, f"{levels} of 255 away" if label != first else ""))
    return rows
