"""The model: a frozen diffusion model with LoRA, conditioner, attention and projector."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from contradiff.base.config import downsampling_of
from contradiff.base.loading import NoiseSchedule, load_unet
from contradiff.method.attention import LevelMaps, Projector, TriTimestepAttention
from contradiff.method.conditioner import Conditioner
from contradiff.method.lora import add_lora
from contradiff.method.noise import add_noise
from contradiff.method.params import NUM_LEVELS, Architecture, MapBlock
from contradiff.method.unet import SelfCondition, SplitUNet, block_channels
from contradiff.types import Conditions, Latents, Timesteps, Tokens

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

TRAINED_MODULES = ("conditioner", "self_condition", "attention", "projector")
"""Attributes of ContraDiffModel that are trained, besides the LoRA layers inside the UNet."""


class ContraDiffModel(nn.Module):
    """One model that classifies and generates: a frozen UNet, and trainable modules around it.

    The constructor adds LoRA layers to `unet` in place. The LoRA layers and TRAINED_MODULES are
    trainable; the weights of the base never change. `downsampling` is the side of an image divided
    by the side of its latent.
    """

    def __init__(
        self,
        unet: "UNet2DConditionModel",
        schedule: NoiseSchedule,
        architecture: Architecture,
        *,
        image_size: int,
        downsampling: int,
    ) -> None:
        super().__init__()
        head, sees_pixels = architecture.head, architecture.conditioner.input == "pixels"
        add_lora(unet, architecture.lora)
        self.unet, self.schedule = unet, schedule
        self.conditioner = Conditioner(
            architecture.conditioner,
            in_channels=3 if sees_pixels else unet.config["in_channels"],
            size=image_size if sees_pixels else image_size // downsampling,
            cross_attention_dim=unet.config["cross_attention_dim"],
        )
        self.self_condition = SelfCondition(unet) if head.self_conditioning else None
        self.block: MapBlock = head.block
        in_channels = block_channels(unet, head.block)
        self.attention = TriTimestepAttention(in_channels=in_channels, **head.attention_arguments)
        self.projector = Projector(head)

    def encode_condition(self, conditions: Conditions) -> Tokens:
        """Turn images, or noise (the null condition), into tokens for the UNet."""
        return self.conditioner(conditions)

    @property
    def split_unet(self) -> SplitUNet:
        """The UNet as two halves, with self-conditioning if head.self_conditioning is true."""
        return SplitUNet(self.unet, self.self_condition)

    def predict(self, noisy_latents: Latents, timesteps: Timesteps, tokens: Tokens) -> Latents:
        """Predict the noise, or v (`schedule.prediction_type`), by a complete pass of the UNet."""
        unet = self.split_unet
        return unet.predict(unet.down(noisy_latents, timesteps, tokens))

    def level_maps(
        self,
        latents: Latents,
        tokens: Tokens,
        *,
        timesteps: Sequence[int],
        noise: Float[Tensor, "3 batch channels h w"],
        blocks: Sequence[MapBlock],
    ) -> dict[MapBlock, LevelMaps]:
        """Add noise to latents at three timesteps (Eq. 5), and return each block's maps f(z_t).

        The timesteps may have any order. In `noise` and in the result, the noisiest level comes
        first. One pass of the UNet gives the maps of all `blocks`.
        """
        levels = torch.tensor(sorted(timesteps, reverse=True), device=latents.device)
        steps, unet = levels.repeat_interleave(len(latents)), self.split_unet
        repeated = latents.repeat(NUM_LEVELS, 1, 1, 1)
        noisy = add_noise(repeated, noise.flatten(0, 1), steps, self.schedule.alphas_cumprod)
        state = unet.down(noisy, steps, tokens.repeat(NUM_LEVELS, 1, 1), blocks=blocks)
        return {
            block: unet.maps(state, block).unflatten(0, (NUM_LEVELS, -1)).transpose(0, 1)
            for block in blocks
        }

    def trained_state(self) -> dict[str, Tensor]:
        """Return the weights that training may change, and BatchNorm's statistics."""
        state = self.state_dict().items()
        return {n: t for n, t in state if not n.startswith("unet.") or "lora_" in n}

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Load what `trained_state` returned; raises ValueError if names or shapes differ."""
        expected = {(name, tensor.shape) for name, tensor in self.trained_state().items()}
        given = {(name, tensor.shape) for name, tensor in state.items()}
        if expected != given:
            difference = sorted({name for name, _ in expected ^ given})[:3]
            other = "it has other lora, conditioner or head parameters than this model"
            raise ValueError(f"{other}; the weights {difference} do not fit")
        self.load_state_dict(state, strict=False)

    def train(self, mode: bool = True) -> "ContraDiffModel":
        """Set the mode of all modules except the frozen UNet, which stays in evaluation mode."""
        super().train(mode)
        self.unet.eval()
        return self


def build_model(
    base: Path, architecture: Architecture, *, image_size: int, seed: int | None
) -> ContraDiffModel:
    """Load the frozen base and add trainable modules; a `seed` makes their weights repeatable."""
    unet, schedule, factor = load_unet(base), NoiseSchedule.of_base(base), downsampling_of(base)
    if seed is not None:
        torch.manual_seed(seed)
    return ContraDiffModel(unet, schedule, architecture, image_size=image_size, downsampling=factor)
