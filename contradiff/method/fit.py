"""Whether a base can serve the parameters, judged from its configuration files alone."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from contradiff.base.config import downsampling_of
from contradiff.base.loading import NoiseSchedule, load_scheduler, unet_without_weights
from contradiff.method.lora import check_lora_targets


def check_fit(
    folder: Path,
    *,
    image_size: int,
    lora_targets: list[str],
    blocks: Mapping[str, Sequence[str]],
    timesteps: Mapping[str, Sequence[int]],
    num_inference_steps: int,
) -> None:
    """Refuse parameters that this base cannot serve, from its configuration files alone.

    Each would else be found where it is first used: after the data has been encoded, or even after
    training.

    Args:
        folder: of a base that `check_config` accepts.
        image_size: data.image_size.
        lora_targets: lora.targets.
        blocks: what is read of the UNet, by the parameter that asks for it, such as head.block.
        timesteps: at which it is read, by the parameter that asks for them.
        num_inference_steps: generate.num_inference_steps.

    Raises:
        ValueError: all that does not fit, one a line, each with its parameter's name.
    """
    unet = unet_without_weights(folder)
    faults: list[str] = []
    for check in (
        partial(check_lora_targets, unet, lora_targets),
        partial(load_scheduler, folder, num_inference_steps=num_inference_steps),
    ):
        try:
            check()
        except ValueError as error:
            faults.append(str(error))
    num_up_blocks = len(unet.config["up_block_types"])
    faults += [
        f"{key}: {block} reads the UNet's second up block, but the base has {num_up_blocks}; ask "
        "for mid alone, or take another base"
        for key, asked in blocks.items()
        for block in asked
        if "up.1" in block and num_up_blocks < 2
    ]
    last = NoiseSchedule.of_base(folder).num_train_timesteps - 1
    faults += [
        f"{key}: {step} is beyond the base's last timestep, {last}"
        for key, steps in timesteps.items()
        for step in steps
        if step > last
    ]
    of_vae, of_unet = downsampling_of(folder), 2 ** (len(unet.config["block_out_channels"]) - 1)
    if image_size % (of_vae * of_unet):
        faults.append(
            f"data.image_size: {image_size} is no multiple of {of_vae * of_unet}: this base's VAE "
            f"makes an image {of_vae} times smaller, and its UNet that {of_unet} times"
        )
    if faults:
        raise ValueError("\n".join(faults))
