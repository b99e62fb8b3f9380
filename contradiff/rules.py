"""All rules that compare several sections of params.yaml; the stage `validate` checks them.

A rule about a single section is a validator of that section. A rule here yields one message for
each fault. A message begins with a dotted key and says what to type. Code that relies on a rule
asserts it.
"""

from collections.abc import Iterator
from pathlib import Path

from contradiff.base.config import BaseParams, downsampling_of, read_config
from contradiff.base.headers import linear_layers
from contradiff.base.timesteps import Timesteps
from contradiff.data.params import DataParams, LatentsParams, RawParams
from contradiff.data.shards import ShardParams
from contradiff.downstream.params import ProbeParams, SeparabilityParams, TransferParams
from contradiff.evaluation.params import ExtractorParams, ReferenceParams, ScoreParams
from contradiff.features.params import CHAIN_STEPS, FeaturesParams
from contradiff.generation.params import ClassConditionParams, GenerateParams
from contradiff.method.params import Architecture
from contradiff.sources.packing import IngestParams
from contradiff.sources.transfer_set import TransferDataParams
from contradiff.training.recipe import TrainingRecipe


class AllParams(TrainingRecipe, Architecture):
    """All sections of params.yaml except `runtime`, which changes no result."""

    data: DataParams
    raw: RawParams
    shard: ShardParams
    ingest: IngestParams
    base: BaseParams
    latents: LatentsParams
    features: FeaturesParams
    probe: ProbeParams
    transfer_data: TransferDataParams
    transfer: TransferParams
    separability: SeparabilityParams
    class_condition: ClassConditionParams
    generate: GenerateParams
    extractor: ExtractorParams
    reference: ReferenceParams
    score: ScoreParams


def between_sections(params: AllParams) -> Iterator[str]:
    """Yield a message for each fault that the parameter file alone shows."""
    yield from images_have_the_size_they_need(params)
    yield from random_crops_are_stored_where_needed(params)
    yield from batches_fit_the_rendered_images(params)
    yield from features_serve_their_users(params)
    yield from conditions_are_trained(params)
    yield from scores_have_enough_images(params)


def images_have_the_size_they_need(params: AllParams) -> Iterator[str]:
    resize, image_size = params.ingest.resize, params.data.image_size
    if resize is not None and resize < image_size:
        yield f"ingest.resize: {resize} must be null or at least data.image_size ({image_size})"
    patch_size = params.conditioner.patch_size
    if params.conditioner.input == "pixels" and image_size % patch_size:
        yield f"conditioner.patch_size: {patch_size} must divide data.image_size ({image_size})"


def random_crops_are_stored_where_needed(params: AllParams) -> Iterator[str]:
    """The first stored view is the centre crop. All other stored views are random crops."""
    conditioner, loss = params.conditioner, params.loss
    is_alone, is_jittered = params.latents.views == 1, params.latents.colour_jitter != 0
    if is_alone and conditioner.input == "latents" and conditioner.cond_view == "crop":
        yield (
            'conditioner.cond_view: "crop" needs stored random crops when conditioner.input is '
            '"latents"; set latents.views to 2 or more'
        )
    if is_alone and loss.latent_views == "two":
        yield 'loss.latent_views: "two" needs stored random crops; set latents.views to 2 or more'
    if is_alone and is_jittered:
        none = "latents.views is 1 (no random crops); set latents.colour_jitter to 0"
        yield f"latents.colour_jitter: only random crops are distorted, but {none}"
    elif is_jittered and (loss.latent_views == "same" or loss.recon_passes > 3):
        yield (
            'latents.colour_jitter: with loss.latent_views "same", or loss.recon_passes above 3, '
            "distorted colours would be reconstructed; set latents.colour_jitter to 0"
        )


def batches_fit_the_rendered_images(params: AllParams) -> Iterator[str]:
    """Only the number of rendered images is in params.yaml. Stage `prepare` checks other data."""
    num_train = params.data.num_train
    sections = {"pretrain": params.pretrain, "class_condition": params.class_condition}
    for name, section in sections.items():
        if num_train is not None and section.epochs and section.batch_size > num_train:
            more = f"{section.batch_size} is more than data.num_train ({num_train})"
            yield f"{name}.batch_size: {more}; lower {name}.batch_size"


def features_serve_their_users(params: AllParams) -> Iterator[str]:
    """Fine-tuning trains LoRA and the attention head on latents with noise (Eq. 5)."""
    features = params.features
    if params.probe.head == "attentive" and features.model == "timm":
        yield (
            'probe.head: "attentive" needs maps at three noise levels, but features.model "timm" '
            'has no such maps; set probe.head to "linear"'
        )
    for key, value, needed in (
        ("features.pool", features.pool, "attention"),
        ("features.noising", features.noising, "direct"),
    ):
        if params.transfer.finetune_epochs and value != needed:
            yield (
                f'transfer.finetune_epochs: fine-tuning needs {key} "{needed}", not "{value}"; set '
                f'{key} to "{needed}", or transfer.finetune_epochs to 0'
            )


def conditions_are_trained(params: AllParams) -> Iterator[str]:
    """A null condition (noise instead of an image) may be used only if it was trained."""
    generate, conditioner, table = params.generate, params.conditioner, params.class_condition
    loss, features, cond_view = params.loss, params.features, conditioner.cond_view
    # An image has six noisy latents, the last three of view 2. The contrastive loss uses all six.
    is_dropped = conditioner.drop > 0 or params.pretrain.epochs == 0
    is_trained = is_dropped or (cond_view == "noise" and loss.recon_passes > 3)
    is_seen = is_trained or (cond_view in ("noise", "noise_both") and loss.weight > 0)
    if features.model == "contradiff" and features.condition == "noise" and not is_seen:
        yield (
            'features.condition: "noise" is a null condition that was never trained; set '
            'conditioner.drop to more than 0, such as 0.1, or features.condition to "image"'
        )
    is_guided = generate.guidance != 1
    is_used = generate.condition == "noise" or (generate.condition == "image" and is_guided)
    if is_used and not is_trained:
        yield (
            'conditioner.drop: 0 never trains the null condition, but generate.condition "noise" '
            "and generate.guidance need it; set conditioner.drop to more than 0, such as 0.1"
        )
    if generate.condition == "class" and is_guided and table.drop == 0:
        yield (
            "class_condition.drop: 0 never trains the null class, but generate.guidance needs it; "
            "set class_condition.drop to more than 0, such as 0.1, or generate.guidance to 1"
        )
    if generate.condition == "class" and table.epochs == 0:
        more = "set class_condition.epochs to 1 or more (got 0)"
        yield f'generate.condition: "class" needs a trained table of class embeddings; {more}'


def scores_have_enough_images(params: AllParams) -> Iterator[str]:
    num_samples, score, extractor = params.generate.num_samples, params.score, params.extractor
    for key, value, name, number in (
        ("splits", score.splits, "generate.num_samples", num_samples),
        ("kid_subset_size", score.kid_subset_size, "generate.num_samples", num_samples),
        ("kid_subset_size", score.kid_subset_size, "reference.num_kept", params.reference.num_kept),
    ):
        if value > number:
            yield f"score.{key}: {value} is more than {name} ({number}); lower score.{key}"
    if num_samples < extractor.num_features:
        yield (
            f"generate.num_samples: {num_samples} is too few for FID with extractor.kind "
            f'"{extractor.kind}"; set generate.num_samples to {extractor.num_features} or more'
        )


def with_base(params: AllParams, folder: Path) -> Iterator[str]:
    """Yield a message for each parameter that does not fit the base's configuration in `folder`."""
    names = linear_layers(folder)
    example = next((name for name in names if "attn2" in name), names[0])
    for target in params.lora.targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            how = f"use the end of a layer's name, such as {example!r}"
            yield f"lora.targets: {target!r} matches no linear layer of the UNet; {how}"

    num_levels = len(read_config(folder, "unet").get("block_out_channels", range(4)))
    asked = [("head.block", params.head.block)]
    asked += [("features.more_blocks", block) for block in params.features.more_blocks]
    asked += [("features.model", "diffeed")] * (params.features.model == "diffeed")
    for key, value in asked:
        if value != "mid" and num_levels < 2:
            why = f"reads the UNet's second up block, but the base has only {num_levels}"
            yield f'{key}: "{value}" {why}; use only the mid block, or choose another base'

    yield from timesteps_are_in_the_schedule(params, Timesteps.of_base(folder))

    image_size, of_vae = params.data.image_size, downsampling_of(folder)
    of_unet = 2 ** (num_levels - 1)
    if image_size % (of_vae * of_unet):
        yield (
            f"data.image_size: {image_size} must be a multiple of {of_vae * of_unet}, because the "
            f"VAE divides an image's sides by {of_vae}, and the UNet divides them by {of_unet}"
        )
    patch_size, latent_size = params.conditioner.patch_size, image_size // of_vae
    if params.conditioner.input == "latents" and latent_size % patch_size:
        when = "when conditioner.input is latents"
        side = f"the side of a latent ({latent_size}) {when}"
        yield f"conditioner.patch_size: {patch_size} must divide {side}"


def timesteps_are_in_the_schedule(params: AllParams, timesteps: Timesteps) -> Iterator[str]:
    last, grid = timesteps.total - 1, timesteps.of_ddim(CHAIN_STEPS)
    for number, triple in enumerate(params.features.triples):
        key = "features.more_triples" if number else "features.timesteps"
        beyond = [step for step in triple if step > last]
        if beyond:
            yield f"{key}: {beyond} exceed the base's last timestep, {last}; use lower timesteps"
        elif params.features.noising == "ddim_chain" and not set(triple) <= set(grid):
            yield (
                f"{key}: {triple} must be on the base's {CHAIN_STEPS}-step grid when "
                f'features.noising is "ddim_chain"; choose from {grid}'
            )
    num_steps, most = params.generate.num_inference_steps, timesteps.total
    key = f"generate.num_inference_steps: {num_steps}"
    # Stable Diffusion's steps_offset of 1 would make the first of 1000 steps timestep 1000.
    if num_steps > most or timesteps.of_ddim(num_steps)[-1] >= most:
        yield f"{key} is too many for the base's schedule of {most} timesteps; lower it"
    elif params.generate.solver == "ddim" and not timesteps.are_even(num_steps):
        near = range(max(1, num_steps // 2), min(2 * num_steps, most) + 1)
        usable = filter(timesteps.are_even, near)
        nearest = min(usable, key=lambda number: abs(number - num_steps), default=None)
        remedy = "" if nearest is None else f"set it to {nearest}, or "
        yield (
            f"{key} steps of DDIM do not divide the base's {most} timesteps evenly (its "
            f'timestep_spacing is "{timesteps.spacing}"), so sampling would begin or go on at '
            f"other noise levels than the UNet is told; {remedy}set generate.solver to dpmsolver++"
        )
