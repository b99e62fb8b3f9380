"""Generation: Gaussian noise => solver steps => latents => images (Tables 4 and 5, Appendix A)."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from contradiff.base.vae import decode_latents, downsampling_factor
from contradiff.config import Precision
from contradiff.generation.conditions import Conditioning, seeded_noise
from contradiff.generation.cross_attention_cache import cache_keys_and_values
from contradiff.generation.params import GenerateParams
from contradiff.generation.solvers import Scheduler
from contradiff.method.model import ContraDiffModel
from contradiff.types import ByteImages, Latents, Tokens

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

OnStep = Callable[[int, Tensor, Latents], Latents]


@torch.inference_mode()
def denoise(
    model: ContraDiffModel,
    scheduler: Scheduler,
    noise: Latents,
    tokens: Tokens,
    *,
    null_tokens: Tokens | None = None,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    precision: Precision = "fp32",
    first: int = 0,
    on_step: OnStep = lambda _number, _timestep, latents: latents,
) -> Latents:
    """Turn pure noise into clean latents by the deterministic reverse process.

    With `null_tokens`, the predicted noise is eps_null + guidance * (eps_cond - eps_null), which is
    classifier-free guidance (Ho and Salimans, 2022). Outside `guidance_interval`, which is given in
    fractions of the schedule (Kynkäänniemi et al., 2024), it is eps_cond and takes half the time. A
    base that predicts v is guided in v, which is the same: z_t and v give eps by a linear map.
    The UNet runs in `precision`, and the solver runs in float32. `first` is the number of the first
    sample, for messages. After each step, `on_step` gets the step's number and timestep and the
    latents, and returns the latents to go on with. Raises ValueError if a sample becomes NaN or
    infinite.
    """
    assert null_tokens is not None or guidance == 1, "guidance needs null tokens"
    scheduler = deepcopy(scheduler)  # a solver's `step` changes its state
    low, high = (part * model.schedule.num_train_timesteps for part in guidance_interval)
    both = None if null_tokens is None else torch.cat([tokens, null_tokens])
    latents = noise * scheduler.init_noise_sigma
    is_finite: list[Tensor] = []  # read only at the end, so that a GPU need not wait at each step
    autocast = torch.autocast(noise.device.type, torch.bfloat16, enabled=precision == "bf16")
    with cache_keys_and_values(model.unet), autocast:
        for number, timestep in enumerate(scheduler.timesteps):
            inputs = scheduler.scale_model_input(latents, timestep)
            steps = torch.full((len(inputs),), int(timestep), device=inputs.device)
            if both is None or not low <= timestep <= high:
                prediction = model.predict(inputs, steps, tokens).float()
            else:
                twice = inputs.repeat(2, 1, 1, 1), steps.repeat(2)
                conditional, null = model.predict(*twice, both).float().chunk(2)
                prediction = null + guidance * (conditional - null)
            latents = scheduler.step(prediction, timestep, latents).prev_sample
            both_results = torch.stack([prediction, latents])
            is_finite.append(both_results.isfinite().flatten(2).all(2))
            latents = on_step(number, timestep, latents)
    faults = torch.stack(is_finite).logical_not().nonzero().tolist()
    if faults:  # sorted by step; at the same step, the prediction comes before the latents
        step, by_solver, position = faults[0]
        timestep = int(scheduler.timesteps[step])
        raise ValueError(
            f"sample {first + position} became NaN or infinite at timestep {timestep}: "
            + _likely_cause(by_solver=bool(by_solver), precision=precision, guidance=guidance)
        )
    return latents


def _likely_cause(*, by_solver: bool, precision: Precision, guidance: float) -> str:
    if by_solver:
        return (
            "the UNet's prediction is finite, but the solver's step is not. base.path: the base's "
            "scheduler_config.json does not fit generate.solver"
        )
    if precision == "bf16":
        return "generate.precision: bf16 may be too coarse for this model; set it to fp32"
    if guidance != 1:
        return f"generate.guidance: {guidance:g} may be too large; lower it"
    return (
        "the UNet predicts it. base.path: the weights of the base are broken, or pretrain.lr: "
        "pretraining diverged"
    )


def generate(
    model: ContraDiffModel,
    vae: "AutoencoderKL",
    scheduler: Scheduler,
    indices: range,
    conditioning: Conditioning,
    *,
    params: GenerateParams,
    image_size: int,
    seed: int,
) -> Iterator[ByteImages]:
    """Yield the images of the given sample indices, in order and in batches.

    The noise of sample i is seeded by (seed, i). Model and VAE must be in evaluation mode and on
    the same device. The VAE must have float32 weights. Raises ValueError if a sample is not finite.
    """
    # The UNet's sample_size is not used: Stable Diffusion's is 64, which is for 512 pixels.
    side = image_size // downsampling_factor(vae)
    shape = (model.unet.config["in_channels"], side, side)
    low, high = params.guidance_interval
    for first in range(0, len(indices), params.batch_size):
        batch = indices[first : first + params.batch_size]
        noise = seeded_noise(shape, seed=seed, indices=batch, stream="latent")
        tokens = conditioning.tokens(batch)
        clean = denoise(
            model,
            scheduler,
            noise.to(tokens.device),
            tokens,
            null_tokens=conditioning.null_tokens(batch) if params.guidance != 1 else None,
            guidance=params.guidance,
            guidance_interval=(low, high),
            precision=params.precision,
            first=batch.start,
        )
        yield decode_latents(vae, clean, first=batch.start).cpu()
