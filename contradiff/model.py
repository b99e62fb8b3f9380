"""ContraDiff: the frozen base with LoRA, conditioner, attention and projector, put together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_single_autograd

from contradiff.backbone import NoiseSchedule, load_unet
from contradiff.base_config import downsampling_of
from contradiff.conditioner import Conditioner, ConditionerParams, drop_conditions
from contradiff.features import (
    NUM_UP_BLOCKS,
    Encoded,
    HeadParams,
    LevelMaps,
    MapBlock,
    Projector,
    SelfCondition,
    TriTimestepAttention,
    advance,
    block_channels,
    block_maps,
    decode_from_bottleneck,
    encode_to_bottleneck,
    maps_of_blocks,
    order_by_noise,
)
from contradiff.lora import LoraParams, add_lora
from contradiff.losses import (
    LossParams,
    contrastive_loss,
    min_snr_weights,
    reconstruction_loss,
)
from contradiff.noise import NUM_LEVELS, add_noise
from contradiff.parts import mean_in_parts
from contradiff.types import Conditions, Latents, Timesteps, Tokens

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

TRAINED_PARTS = ("conditioner", "self_condition", "attention", "projector")
"""Besides the LoRA in the UNet."""


@dataclass(frozen=True)
class TrainingBatch:
    """All that one training step sees, random numbers included: two views, three levels each."""

    latents: Float[Tensor, "2 batch channels h w"]
    conditions: Float[Tensor, "2 batch channels_x size size"]
    condition_noise: Float[Tensor, "2 batch channels_x size size"]
    dropped: Bool[Tensor, "2 batch"]
    timesteps: Int[Tensor, "2 3 batch"]
    noise: Float[Tensor, "2 3 batch channels h w"]


class ContraDiff(nn.Module):
    """One model that classifies and generates.

    Trainable are the LoRA within `unet`, `conditioner`, `attention`, `projector` and, where there
    is one, `self_condition`; the base's own weights never change. `forward` is one training step's
    loss; `noise_pred`, `level_maps` and `attention` are what generation and classification use.
    """

    def __init__(
        self,
        unet: "UNet2DConditionModel",
        schedule: NoiseSchedule,
        *,
        lora: LoraParams,
        conditioner: ConditionerParams,
        head: HeadParams,
        image_size: int,
        downsampling: int,
    ) -> None:
        """Add the trainable parts to a frozen UNet; their weights are random, LoRA's update zero.

        Args:
            unet: the base's denoiser; gets LoRA layers in place.
            schedule: the base's alpha-bars.
            lora: rank, alpha and targets.
            conditioner: shape of the conditioner.
            head: shapes of attention and projector.
            image_size: side of the images.
            downsampling: of the base's VAE, an image's side over its latent's.

        Raises:
            ValueError: a LoRA target matches nothing, patches do not tile the image, or the UNet
                has no block of head.block.
        """
        super().__init__()
        add_lora(unet, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
        self.unet = unet
        self.schedule = schedule
        pixels = conditioner.input == "pixels"
        self.conditioner = Conditioner(
            input=conditioner.input,
            in_channels=3 if pixels else unet.config["in_channels"],
            size=image_size if pixels else image_size // downsampling,
            patch_size=conditioner.patch_size,
            width=conditioner.width,
            depth=conditioner.depth,
            num_heads=conditioner.num_heads,
            cross_attention_dim=unet.config["cross_attention_dim"],
        )
        self.self_condition = SelfCondition(unet) if head.self_conditioning else None
        self.block: MapBlock = head.block
        self.attention = TriTimestepAttention(
            in_channels=block_channels(unet, head.block),
            width=head.width,
            num_heads=head.num_heads,
            mlp_ratio=head.mlp_ratio,
        )
        self.projector = Projector(
            in_width=head.width, width=head.projector_width, out_width=head.projector_out
        )

    def forward(
        self,
        batch: TrainingBatch,
        *,
        loss: LossParams,
        shared_condition: bool,
        decode_batch_size: int = 0,
    ) -> dict[str, Float[Tensor, ""]]:
        """L = L_recon + lambda * L_contrast (Eq. 7) of one batch.

        All six draws go through down and mid blocks as one batch, and through as many up blocks as
        `head.block` reads; only the first `recon_passes` of them, in the order (view, level), go on
        to predict their noise (Eq. 3). With lambda = 0 the other draws are not computed at all.

        Args:
            batch: this process's images.
            loss: kind, weight and temperature.
            shared_condition: both views have the same condition, encoded once.
            decode_batch_size: draws that go through the reconstruction's up blocks at once, whose
                gradient is taken before the next ones go: less memory. 0: all at once.

        Returns:
            "loss", "reconstruction" and, unless lambda is 0, "contrastive".
        """
        num_images = batch.latents.shape[1]
        num_draws = batch.timesteps.shape[0] * NUM_LEVELS if loss.weight > 0 else loss.recon_passes
        timesteps = batch.timesteps.flatten(0, 1)[:num_draws]
        noise = batch.noise.flatten(0, 1)[:num_draws]
        latents = batch.latents.repeat_interleave(NUM_LEVELS, dim=0)[:num_draws]
        num_views = -(-num_draws // NUM_LEVELS)
        tokens = self._view_tokens(batch, num_views=num_views, shared=shared_condition)
        tokens = tokens.repeat_interleave(NUM_LEVELS, dim=0)[:num_draws].flatten(0, 1)

        noisy = add_noise(
            latents.flatten(0, 1),
            noise.flatten(0, 1),
            timesteps.flatten(),
            self.schedule.alphas_cumprod,
        )
        encoded = self.encode(noisy, timesteps.flatten(), tokens)
        if loss.weight > 0:
            # For all draws at once, so that the reconstructed ones need not go there again.
            num_up_blocks = NUM_UP_BLOCKS[self.block]
            encoded = advance(self.unet, encoded, tokens, num_up_blocks=num_up_blocks)

        trained = slice(0, loss.recon_passes * num_images)
        reconstruction = self._reconstruct(
            encoded[trained],
            tokens[trained],
            noise.flatten(0, 1)[trained],
            weights=self._weights(timesteps.flatten()[trained], loss.min_snr_gamma),
            batch_size=decode_batch_size,
        )
        if loss.weight == 0:
            return {"loss": reconstruction, "reconstruction": reconstruction}

        features = self._view_features(encoded, tokens, batch.timesteps)
        contrastive = self._contrast(features, loss)
        total = reconstruction + loss.weight * contrastive
        return {"loss": total, "reconstruction": reconstruction, "contrastive": contrastive}

    def encode_condition(self, conditions: Conditions) -> Tokens:
        """Images, or Gaussian noise for the null condition => encoder_hidden_states."""
        return self.conditioner(conditions)

    def noise_pred(self, noisy_latents: Latents, timesteps: Timesteps, tokens: Tokens) -> Latents:
        """The UNet's whole pass: predicted noise."""
        encoded = self.encode(noisy_latents, timesteps, tokens)
        return decode_from_bottleneck(self.unet, encoded, tokens)

    def encode(self, noisy_latents: Latents, timesteps: Timesteps, tokens: Tokens) -> Encoded:
        """The UNet's first half, with self-conditioning where the model has it."""
        encoded = encode_to_bottleneck(self.unet, noisy_latents, timesteps, tokens)
        return encoded if self.self_condition is None else self.self_condition(encoded)

    def level_maps(
        self,
        latents: Latents,
        tokens: Tokens,
        *,
        timesteps: list[int],
        noise: Float[Tensor, "3 batch channels h w"],
    ) -> LevelMaps:
        """Maps of clean latents noised to a fixed triple (Eq. 5): noisiest, middle, cleanest."""
        blocks: list[MapBlock] = [self.block]
        maps = self.level_block_maps(
            latents, tokens, timesteps=timesteps, noise=noise, blocks=blocks
        )
        return maps[self.block]

    def level_block_maps(
        self,
        latents: Latents,
        tokens: Tokens,
        *,
        timesteps: Sequence[int],
        noise: Float[Tensor, "3 batch channels h w"],
        blocks: Sequence[MapBlock],
    ) -> dict[MapBlock, LevelMaps]:
        """As `level_maps`, of several blocks of the same pass."""
        levels = torch.tensor(sorted(timesteps, reverse=True), device=latents.device)
        steps = levels.repeat_interleave(len(latents))
        repeated = latents.repeat(NUM_LEVELS, 1, 1, 1)
        noisy = add_noise(repeated, noise.flatten(0, 1), steps, self.schedule.alphas_cumprod)
        tokens = tokens.repeat(NUM_LEVELS, 1, 1)
        encoded = self.encode(noisy, steps, tokens)
        maps = maps_of_blocks(self.unet, encoded, tokens, blocks=blocks)
        return {
            block: found.unflatten(0, (NUM_LEVELS, -1)).transpose(0, 1)
            for block, found in maps.items()
        }

    def trained_state(self) -> dict[str, Tensor]:
        """The weights that training may change, and BatchNorm's statistics: not the frozen base."""
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if not name.startswith("unet.") or "lora_" in name
        }

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `trained_state`.

        Raises:
            ValueError: the weights are not exactly those of this model's trainable parts.
        """
        expected = {(name, tensor.shape) for name, tensor in self.trained_state().items()}
        given = {(name, tensor.shape) for name, tensor in state.items()}
        if expected != given:
            difference = sorted({name for name, _ in expected ^ given})[:3]
            msg = (
                "checkpoint: made with other lora, conditioner or head parameters "
                f"(such as {difference})"
            )
            raise ValueError(msg)
        self.load_state_dict(state, strict=False)

    def train(self, mode: bool = True) -> "ContraDiff":
        """As usual, but the frozen base stays in evaluation mode."""
        super().train(mode)
        self.unet.eval()
        return self

    def _weights(self, timesteps: Timesteps, gamma: float) -> Float[Tensor, " batch"] | None:
        if gamma == 0:
            return None
        alphas_cumprod = self.schedule.alphas_cumprod.to(timesteps.device)
        return min_snr_weights(alphas_cumprod, gamma=gamma)[timesteps]

    def _reconstruct(
        self,
        encoded: Encoded,
        tokens: Tokens,
        noise: Latents,
        *,
        weights: Float[Tensor, " batch"] | None,
        batch_size: int,
    ) -> Float[Tensor, ""]:
        """Eq. 3 of encoded draws, `batch_size` of them at once; 0: all."""

        def loss_of(
            rows: slice, tokens: Tensor, hidden: Tensor, time_embedding: Tensor, *skips: Tensor
        ) -> Tensor:
            state = replace(
                encoded[rows], hidden=hidden, time_embedding=time_embedding, skips=skips
            )
            noise_pred = decode_from_bottleneck(self.unet, state, tokens)
            of_rows = None if weights is None else weights[rows]
            return reconstruction_loss(noise_pred, noise[rows], weights=of_rows)

        sliced = (tokens, encoded.hidden, encoded.time_embedding, *encoded.skips)
        if batch_size == 0 or batch_size >= len(noise) or not torch.is_grad_enabled():
            return loss_of(slice(None), *sliced)
        blocks = list(self.unet.up_blocks)[encoded.num_up_blocks :]
        trained = [p for block in blocks for p in block.parameters() if p.requires_grad]
        return mean_in_parts(loss_of, sliced, trained, rows_at_once=batch_size)

    def _view_tokens(
        self, batch: TrainingBatch, *, num_views: int, shared: bool
    ) -> Float[Tensor, "views batch num_tokens width_c"]:
        num_encoded = 1 if shared else num_views
        conditions = drop_conditions(
            batch.conditions[:num_encoded].flatten(0, 1),
            dropped=batch.dropped[:num_encoded].flatten(),
            noise=batch.condition_noise[:num_encoded].flatten(0, 1),
        )
        tokens = self.conditioner(conditions).unflatten(0, (num_encoded, -1))
        return tokens.expand(num_views, -1, -1, -1)

    def _view_features(
        self,
        encoded: Encoded,
        tokens: Float[Tensor, "draws num_tokens width_c"],
        timesteps: Int[Tensor, "2 3 batch"],
    ) -> Float[Tensor, "2 batch width"]:
        maps = block_maps(self.unet, encoded, tokens, block=self.block)
        maps = maps.unflatten(0, timesteps.shape)
        ordered = [order_by_noise(view, steps) for view, steps in zip(maps, timesteps, strict=True)]
        return self.attention(torch.cat(ordered)).unflatten(0, (2, -1))

    def _contrast(
        self, features: Float[Tensor, "2 batch width"], loss: LossParams
    ) -> Float[Tensor, ""]:
        """Gather h of all processes, with gradient and before the projector, then contrast.

        Every process then has the same projector inputs, so that its BatchNorm sees the global
        batch, and its own images as anchors: DDP's average is the single-process gradient.
        """
        num_images = features.shape[1]
        rank = 0
        group = dist.group.WORLD if dist.is_initialized() else None
        if group is not None and group.size() > 1:
            rank = group.rank()
            features = all_gather_single_autograd(features.contiguous(), gather_dim=1, group=group)
        projected = self.projector(features.flatten(0, 1)).unflatten(0, (2, -1))
        return contrastive_loss(
            projected,
            kind=loss.contrastive,
            temperature=loss.temperature,
            anchors=slice(rank * num_images, (rank + 1) * num_images),
        )


def build_model(
    base: Path,
    *,
    lora: LoraParams,
    conditioner: ConditionerParams,
    head: HeadParams,
    image_size: int,
    seed: int,
) -> ContraDiff:
    """Load the frozen base from a folder and add the trainable parts, initialised from `seed`."""
    unet = load_unet(base)
    schedule = NoiseSchedule.of_base(base)
    torch.manual_seed(seed)
    return ContraDiff(
        unet,
        schedule,
        lora=lora,
        conditioner=conditioner,
        head=head,
        image_size=image_size,
        downsampling=downsampling_of(base),
    )
