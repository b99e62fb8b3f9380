"""Training, sampling, features, VAE and FID features on one GPU, each beside diffusers.

    python -m bench gpu --output gpu.json             Stable Diffusion v1.4's topology, paper preset
    python -m bench gpu --rows matmul,training,compile --seconds 400
    python -m bench gpu --tiny                        the same code on very little, for a CPU

Weights are random and nothing is downloaded. A row that no longer fits the budget is skipped, and
one that fails leaves the others alone. Before a variant is timed it is compared with the first row
of its kind: the relative error (of all gradients, of latents, of features) is in the table, and its
tolerance in the JSON. Times are medians of CUDA events after a warm-up. MFU is the share of a bf16
matrix product's rate, which is measured first; what checkpointing computes again does not count.
Sampling is timed over a few of 50 steps: ms are of one step, images/s of 50 steps without the VAE.
"""

import argparse
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from bench import flops
from bench._gpu_checks import check_processes, check_resuming
from bench._gpu_setting import (
    TINY,
    Setting,
    Sizes,
    in_graph,
    open_setting,
)
from bench._rig import HEAD, Rig, line
from contradiff.base.loading import load_scheduler
from contradiff.base.vae import decode_latents, encode
from contradiff.config import Precision
from contradiff.evaluation import inception
from contradiff.evaluation.inception_files import STATE_DICT_NAME
from contradiff.features.batches import CleanBatch
from contradiff.features.models import DiffusionFeatures
from contradiff.generation.sampling import denoise
from contradiff.method import losses
from contradiff.method.compilation import compile_blocks
from contradiff.method.model import ContraDiffModel
from contradiff.method.noise import add_noise
from contradiff.training.optim import build_adamw

NUM_STEPS = 50
Work = Callable[[], Tensor]


def main(arguments: Sequence[str]) -> None:
    """Run the rows and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=230.0, help="budget of all rows")
    parser.add_argument("--output", type=Path, help="JSON of all that was measured")
    parser.add_argument("--rows", default=",".join(GROUPS), help="which groups, in this order")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rig = Rig(device, seconds=options.seconds, output=options.output)
    with open_setting(rig, TINY if options.tiny else Sizes()) as setting:
        for name in options.rows.split(","):
            if rig.left() < 5:  # do not even build its models
                rig.attempt(name, dict, needs=5)
                continue
            try:
                GROUPS[name](setting)
            except Exception as error:  # noqa: BLE001  # the other groups go on
                traceback.print_exc()
                rig.attempt(name, partial(_fail, error), needs=0)
    print(f"{rig.facts}\n{HEAD}", *map(line, rig.rows), sep="\n", flush=True)


def _fail(error: Exception) -> Mapping[str, Any]:
    raise error


def matmul(setting: Setting) -> None:
    """The ceiling."""
    rig, size = setting.rig, setting.sizes.matmul
    left, right = torch.randn(2, size, size, device=rig.device).bfloat16()
    rig.measure(f"matrix product, bf16, {size}³", lambda: left @ right, images=1, flops=2 * size**3)
    rig.ceiling = rig.rows[-1].get("tflop_per_s", 0.0) * 1e12 or None


def training(setting: Setting) -> None:
    """A step of the preset, and diffusers' LoRA step, which noises an image once."""
    find_gradients_in_float32(setting)
    num_images, model = setting.sizes.training, setting.model_to_train()
    time_training(setting, "training, as it is", model)
    time_training(setting, "training, AdamW not fused", model, fused=False)
    name = f"diffusers' LoRA step, {num_images} images"
    setting.rig.measure(name, setting.lora_step(num_images), images=num_images)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        time_training(setting, "training, cuDNN's benchmark", model)
    model.unet.to(memory_format=torch.channels_last)
    time_training(setting, "training, channels_last", model)
    del model
    model = setting.model_to_train(gradient_checkpointing="down.0")
    more = setting.sizes.checkpointed
    time_training(setting, "training, down.0 checkpointed", model, num_images=more)


def find_gradients_in_float32(setting: Setting) -> None:
    """What bf16 rounds; convolutions may take TF32, which rounds an eighth as much."""
    if f"training {setting.sizes.training}" not in setting.rig.references:
        model = setting.model_to_train(gradient_checkpointing="all", precision="fp32")
        time_training(setting, "training in fp32, all checkpointed", model, precision="fp32")


def time_training(setting: Setting, label: str, model: ContraDiffModel, **options: Any) -> None:
    """Add a row; variants have the same weights and batch, and so the same gradients.

    Only for the comparison, a smooth function replaces BatchNorm and the contrastive loss: they
    magnify the differences between images, and an untrained network's are nothing but rounding.
    A variant may be half as far again from float32 as bf16 as it is.
    """
    rig, needs = setting.rig, options.pop("needs", 8.0)
    num_images = options.setdefault("num_images", setting.sizes.training)
    if "gflop_a_training_image" not in rig.facts:
        none = setting.params.pretrain.model_copy(update={"gradient_checkpointing": "none"})
        params = setting.params.model_copy(update={"pretrain": none})
        rig.facts["gflop_a_training_image"] = flops.of_training_step(params, setting.folder)
    step, gradients = training_step(setting, model, **options)
    rig.measure(
        f"{label}, {num_images} images",
        step,
        images=num_images,
        check=gradients,
        reference=f"training {num_images}",
        tolerance=max(0.02, 1.5 * rig.facts.get("error_of_bf16", 1.0)),
        flops=rig.facts["gflop_a_training_image"] * 1e9 * num_images,
        needs=needs,
    )
    if error := rig.rows[-1].get("error"):
        rig.facts.setdefault("error_of_bf16", error)


def training_step(
    setting: Setting,
    model: ContraDiffModel,
    *,
    num_images: int,
    fused: bool = True,
    precision: Precision = "bf16",
) -> tuple[Work, Work]:
    """A whole optimiser step => the loss; and all gradients."""
    batch = setting.batch(model, num_images, seed=2)
    objective = flops.training_step(model, setting.params)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A rate of 0 is as much work, and leaves the weights as they are for the next variant.
    options: Any = {"lr": 0.0, "betas": (0.9, 0.95), "weight_decay": 0.05}
    optimizer = build_adamw(model.named_parameters(), **options)
    if not fused:
        groups = [{"params": group["params"]} for group in optimizer.param_groups]
        optimizer = torch.optim.AdamW(groups, **options)

    def loss_of_batch() -> Tensor:
        with setting.autocast(precision):
            loss = objective(batch)["loss"]
        loss.backward()
        return loss.detach()

    def step() -> Tensor:
        loss = loss_of_batch()
        nn.utils.clip_grad_norm_(trained, setting.params.pretrain.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def gradients() -> Tensor:
        smooth = {setting.params.loss.contrastive: lambda x, y, **_: (x * y).float().mean()}
        model.projector.eval()[1].reset_running_stats()
        with mock.patch.dict(losses.CONTRASTIVE_LOSSES, smooth):
            loss_of_batch()
        model.projector.train()
        found = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
        optimizer.zero_grad(set_to_none=True)
        return found

    return step, gradients


def sampling(setting: Setting) -> None:
    """DDIM as the project runs it, and the loop of diffusers' pipeline in pure bf16."""
    model, peer = setting.model_to_read(merged=True), deepcopy(setting.unet).to(torch.bfloat16)
    runs = [(n, guidance) for n in setting.sizes.sampling for guidance in (1.0, 1.5)]
    for run in runs:
        time_sampling(setting, "sampling in bf16, as it is", model, *run)
        time_sampling(setting, "diffusers' loop, bf16", model, *run, peer=peer)
    if setting.rig.device.type == "cuda":
        for run in runs:
            time_sampling(setting, "… in a CUDA graph", model, *run, wrap=in_graph)
    time_sampling(setting, "sampling, LoRA not merged", setting.model_to_read(), *runs[-1])
    for module in (model.unet, peer):
        module.to(memory_format=torch.channels_last)
    time_sampling(setting, "sampling, channels_last", model, *runs[-1])
    time_sampling(setting, "diffusers' loop, channels_last", model, *runs[-1], peer=peer)
    model = setting.model_to_read(merged=True, precision="fp32")
    time_sampling(setting, "sampling in fp32", model, *runs[-2], precision="fp32")


def time_sampling(
    setting: Setting,
    label: str,
    model: ContraDiffModel,
    num_images: int,
    guidance: float,
    *,
    peer: Any = None,
    wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] | None = None,
    needs: float = 4.0,
    **options: Any,
) -> None:
    """Add a row; `wrap` wraps the UNet's pass, and then keys and values are not cached."""
    scheduler = load_scheduler(setting.folder, num_inference_steps=NUM_STEPS)
    scheduler.timesteps = scheduler.timesteps[: setting.sizes.steps]
    torch.manual_seed(3)
    noise, tokens = setting.latents(num_images), setting.tokens(num_images)
    null = None if guidance == 1 else setting.tokens(num_images)
    seen = (tokens if null is None else torch.cat([null, tokens])).bfloat16()
    options = {"precision": "bf16", "null_tokens": null, "guidance": guidance} | options

    def ours() -> Tensor:
        return denoise(model, scheduler, noise, tokens, **options)

    @torch.inference_mode()
    def theirs() -> Tensor:
        latents = noise.bfloat16()
        for step in scheduler.timesteps:
            inputs = scheduler.scale_model_input(latents.repeat(len(seen) // num_images, 1, 1, 1))
            predicted = peer(inputs, step, encoder_hidden_states=seen, return_dict=False)[0]
            if null is not None:
                without, given = predicted.chunk(2)
                predicted = without + guidance * (given - without)
            latents = scheduler.step(predicted, int(step), latents, return_dict=False)[0]
        return latents

    with ExitStack() as stack:
        if wrap is not None:
            cache = "contradiff.generation.sampling.cache_keys_and_values"
            stack.enter_context(mock.patch(cache, return_value=nullcontext()))
            call = wrap(model.predict)
            stack.enter_context(mock.patch.object(model, "predict", call))
        setting.rig.measure(
            f"{label}, batch {num_images}{'' if null is None else ' guided'}",
            ours if peer is None else theirs,
            images=num_images / NUM_STEPS,
            calls=setting.sizes.steps,
            reference=f"sampling {num_images} {guidance}",
            tolerance=0.02,
            needs=needs,
        )


def features(setting: Setting) -> None:
    """Feature h of three noise levels, beside three whole passes with a hook on the mid block."""
    rig, number, model = setting.rig, setting.sizes.features, setting.model_to_read()
    peer = deepcopy(setting.unet).to(torch.bfloat16)
    latents, pixels = setting.latents(number), setting.pixels(number)
    noise = torch.randn(3, *latents.shape, device=rig.device)
    params = setting.params.features.model_copy(update={"precision": "bf16"})
    levels, alphas = sorted(params.timesteps, reverse=True), model.schedule.alphas_cumprod

    @torch.inference_mode()
    def ours() -> Tensor:
        with setting.autocast():
            tokens = model.encode_condition(pixels)
            given: Any = {"timesteps": levels, "noise": noise, "blocks": [model.block]}
            return model.attention(model.level_maps(latents, tokens, **given)[model.block])

    @torch.inference_mode()
    def theirs() -> Tensor:
        maps: list[Tensor] = []
        hook = peer.mid_block.register_forward_hook(lambda *given: maps.append(given[-1]))
        with setting.autocast():
            tokens = model.encode_condition(pixels).bfloat16()
        for level, own in zip(levels, noise, strict=True):
            steps = torch.full((number,), level, device=rig.device)
            peer(add_noise(latents, own, steps, alphas).bfloat16(), steps, tokens)
        hook.remove()
        with setting.autocast():
            return model.attention(torch.stack(maps, dim=1))

    extract = DiffusionFeatures(model, params, 0, rig.device)
    clean = latents.cpu(), pixels.cpu(), torch.zeros(number, dtype=torch.long)
    batch = CleanBatch(tuple(range(number)), *clean, tuple(map(str, range(number))))
    same: Any = {"images": number, "reference": "features", "tolerance": 0.05}
    rig.measure(f"features, as they are, {number} images", ours, **same)
    rig.measure("three diffusers passes in bf16, with a hook", theirs, **same)
    whole = lambda: next(iter(extract(batch).values()))  # noqa: E731
    rig.measure("features, with their noise drawn on the CPU", whole, images=number)
    compile_blocks(model.unet)
    rig.measure("features, compiled", ours, **same, needs=20.0)


def vae(setting: Setting) -> None:
    """Encoding and decoding: the project's float32, and diffusers' user's bfloat16."""
    number, network = setting.sizes.vae, setting.vae()
    pixels, latents = setting.pixels(number), setting.latents(number)
    for name, form, dtype in (
        ("as it is, fp32", torch.contiguous_format, torch.float32),
        ("channels_last, fp32", torch.channels_last, torch.float32),
        ("channels_last, bf16", torch.channels_last, torch.bfloat16),
        ("as diffusers runs it, bf16", torch.contiguous_format, torch.bfloat16),
    ):
        network.to(dtype=dtype, memory_format=form)
        works: dict[str, Work] = {
            "encode": partial(encode, network, pixels.to(dtype)),
            "decode": partial(decode_latents, network, latents.to(dtype)),
        }
        for verb, work in works.items():
            same: Any = {"images": number, "reference": f"vae {verb}", "tolerance": 0.05}
            setting.rig.measure(f"VAE, {verb}, {name}, {number} images", work, **same)


def fid(setting: Setting) -> None:
    """Inception's features of resized images; TF32 is off, as published scores need."""
    from bench.fid import random_inception

    number, device = setting.sizes.inception, setting.rig.device
    with tempfile.TemporaryDirectory() as name:
        torch.save(random_inception(0), path := Path(name, STATE_DICT_NAME))
        network = inception.Inception(path).to(device).eval()
    images = torch.randint(256, (number, 3, 299, 299), device=device).float()

    @torch.inference_mode()
    def work() -> Tensor:
        return network(images, resizer="clean")[0]

    setting.rig.measure(f"FID features, fp32, {number} images", work, images=number)


def compilation(setting: Setting) -> None:
    """A training step and sampling with compiled blocks; most of it is waiting."""
    find_gradients_in_float32(setting)
    model = setting.model_to_train()
    time_training(setting, "training, again", model)
    compile_blocks(model.unet)
    time_training(setting, "training, compiled", model, needs=30.0)
    profile_training(setting, "profile of a compiled training step", model)
    del model
    model, run = setting.model_to_read(merged=True), (setting.sizes.sampling[-1], 1.5)
    time_sampling(setting, "sampling, again", model, *run)
    compile_blocks(model.unet)
    time_sampling(setting, "sampling, compiled", model, *run, needs=20.0)


def profile(setting: Setting) -> None:
    """Which kernels a training step spends its time on, the longest first."""
    profile_training(setting, "profile of a training step", setting.model_to_train())


def profile_training(setting: Setting, label: str, model: ContraDiffModel) -> None:
    """Add a row with the longest kernels of a step."""

    def body() -> Mapping[str, Any]:
        step, _ = training_step(setting, model, num_images=setting.sizes.training)
        step()
        with torch.profiler.profile() as found:
            step()
        rows = found.key_averages()
        rows = sorted(rows, key=lambda row: -row.self_device_time_total)
        kernels = {row.key[:90]: (row.self_device_time_total / 1e3, row.count) for row in rows[:30]}
        text = "; ".join(f"{name[:40]} {ms:.1f}" for name, (ms, _) in list(kernels.items())[:5])
        return {"note": f"ms: {text}", "kernels": kernels}

    setting.rig.attempt(label, body, needs=8)


def correctness(setting: Setting) -> None:
    """A saved training goes on as if nothing had happened; processes agree with one."""
    check_resuming(setting)
    check_processes(setting, max(1, torch.cuda.device_count()))


GROUPS: Mapping[str, Callable[[Setting], None]] = {
    "matmul": matmul,
    "training": training,
    "sampling": sampling,
    "features": features,
    "vae": vae,
    "fid": fid,
    "correctness": correctness,
    "profile": profile,
    "compile": compilation,
}
