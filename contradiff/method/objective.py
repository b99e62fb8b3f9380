"""The loss of one training step: L = L_recon + lambda * L_contrast (Eq. 7) of two views' draws."""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_single_autograd

from contradiff.method.attention import order_by_noise
from contradiff.method.conditioner import drop_conditions
from contradiff.method.losses import (
    LossParams,
    contrastive_loss,
    min_snr_weights,
    reconstruction_loss,
)
from contradiff.method.microbatches import mean_in_parts
from contradiff.method.model import ContraDiff
from contradiff.method.noise import NUM_LEVELS, add_noise
from contradiff.method.unet import (
    NUM_UP_BLOCKS,
    Encoded,
    advance,
    block_maps,
    decode_from_bottleneck,
)
from contradiff.types import Latents, Timesteps, Tokens


@dataclass(frozen=True)
class TrainingBatch:
    """All that one training step sees, random numbers included: two views, three levels each."""

    latents: Float[Tensor, "2 batch channels h w"]
    conditions: Float[Tensor, "2 batch channels_x size size"]
    condition_noise: Float[Tensor, "2 batch channels_x size size"]
    dropped: Bool[Tensor, "2 batch"]
    timesteps: Int[Tensor, "2 3 batch"]
    noise: Float[Tensor, "2 3 batch channels h w"]


class TrainingStep(nn.Module):
    """A model's loss on a batch: a module, since DDP averages the gradients of a module's pass."""

    def __init__(
        self,
        model: ContraDiff,
        *,
        loss: LossParams,
        shared_condition: bool,
        decode_batch_size: int,
    ) -> None:
        """Choose the loss.

        Args:
            model: whose parameters are trained; it is not copied.
            loss: kind, weight and temperature.
            shared_condition: both views have the same condition, encoded once.
            decode_batch_size: reconstructed draws of a batch that go at once through the up blocks
                that the head does not read; their gradient is taken before the next ones go, which
                takes less memory. 0: all at once.
        """
        super().__init__()
        self.model, self.loss = model, loss
        self.shared_condition, self.decode_batch_size = shared_condition, decode_batch_size

    def forward(self, batch: TrainingBatch) -> dict[str, Float[Tensor, ""]]:
        """Eq. 7 of one batch, this process's images.

        All six draws go through down and mid blocks as one batch, and through as many up blocks as
        `head.block` reads; only the first `recon_passes` of them, in the order (view, level), go on
        to predict their noise (Eq. 3). With lambda = 0 the other draws are not computed at all.

        Returns:
            "loss", "reconstruction" and, unless lambda is 0, "contrastive".
        """
        model, loss = self.model, self.loss
        num_images = batch.latents.shape[1]
        num_draws = batch.timesteps.shape[0] * NUM_LEVELS if loss.weight > 0 else loss.recon_passes
        timesteps = batch.timesteps.flatten(0, 1)[:num_draws].flatten()
        noise = batch.noise.flatten(0, 1)[:num_draws].flatten(0, 1)
        latents = batch.latents.repeat_interleave(NUM_LEVELS, dim=0)[:num_draws].flatten(0, 1)
        tokens = self._view_tokens(batch, num_views=-(-num_draws // NUM_LEVELS))
        tokens = tokens.repeat_interleave(NUM_LEVELS, dim=0)[:num_draws].flatten(0, 1)

        noisy = add_noise(latents, noise, timesteps, model.schedule.alphas_cumprod)
        encoded = model.encode(noisy, timesteps, tokens)
        if loss.weight > 0:
            # For all draws at once, so that the reconstructed ones need not go there again.
            num_up_blocks = NUM_UP_BLOCKS[model.block]
            encoded = advance(model.unet, encoded, tokens, num_up_blocks=num_up_blocks)

        trained = slice(0, loss.recon_passes * num_images)
        reconstruction = self._reconstruct(
            encoded[trained], tokens[trained], noise[trained], timesteps[trained]
        )
        if loss.weight == 0:
            return {"loss": reconstruction, "reconstruction": reconstruction}

        features = self._view_features(encoded, tokens, batch.timesteps)
        contrastive = self._contrast(features)
        total = reconstruction + loss.weight * contrastive
        return {"loss": total, "reconstruction": reconstruction, "contrastive": contrastive}

    def _view_tokens(
        self, batch: TrainingBatch, *, num_views: int
    ) -> Float[Tensor, "views batch num_tokens width_c"]:
        num_encoded = 1 if self.shared_condition else num_views
        conditions = drop_conditions(
            batch.conditions[:num_encoded].flatten(0, 1),
            dropped=batch.dropped[:num_encoded].flatten(),
            noise=batch.condition_noise[:num_encoded].flatten(0, 1),
        )
        tokens = self.model.conditioner(conditions).unflatten(0, (num_encoded, -1))
        return tokens.expand(num_views, -1, -1, -1)

    def _reconstruct(
        self, encoded: Encoded, tokens: Tokens, noise: Latents, timesteps: Timesteps
    ) -> Float[Tensor, ""]:
        """Eq. 3 of encoded draws, `decode_batch_size` of them at once."""
        unet, batch_size = self.model.unet, self.decode_batch_size
        weights = self._weights(timesteps)

        def loss_of(
            rows: slice, tokens: Tensor, hidden: Tensor, time_embedding: Tensor, *skips: Tensor
        ) -> Tensor:
            state = replace(
                encoded[rows], hidden=hidden, time_embedding=time_embedding, skips=skips
            )
            noise_pred = decode_from_bottleneck(unet, state, tokens)
            of_rows = None if weights is None else weights[rows]
            return reconstruction_loss(noise_pred, noise[rows], weights=of_rows)

        sliced = (tokens, encoded.hidden, encoded.time_embedding, *encoded.skips)
        if batch_size == 0 or batch_size >= len(noise) or not torch.is_grad_enabled():
            return loss_of(slice(None), *sliced)
        modules = (
            *list(unet.up_blocks)[encoded.num_up_blocks :],
            unet.conv_norm_out,
            unet.conv_out,
        )
        trained = [p for m in modules if m is not None for p in m.parameters() if p.requires_grad]
        return mean_in_parts(loss_of, sliced, trained, rows_at_once=batch_size)

    def _weights(self, timesteps: Timesteps) -> Float[Tensor, " batch"] | None:
        gamma = self.loss.min_snr_gamma
        if gamma == 0:
            return None
        alphas_cumprod = self.model.schedule.alphas_cumprod.to(timesteps.device)
        return min_snr_weights(alphas_cumprod, gamma=gamma)[timesteps]

    def _view_features(
        self,
        encoded: Encoded,
        tokens: Float[Tensor, "draws num_tokens width_c"],
        timesteps: Int[Tensor, "2 3 batch"],
    ) -> Float[Tensor, "2 batch width"]:
        maps = block_maps(self.model.unet, encoded, tokens, block=self.model.block)
        maps = maps.unflatten(0, timesteps.shape)
        ordered = [order_by_noise(view, steps) for view, steps in zip(maps, timesteps, strict=True)]
        return self.model.attention(torch.cat(ordered)).unflatten(0, (2, -1))

    def _contrast(self, features: Float[Tensor, "2 batch width"]) -> Float[Tensor, ""]:
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
        projected = self.model.projector(features.flatten(0, 1)).unflatten(0, (2, -1))
        return contrastive_loss(
            projected,
            kind=self.loss.contrastive,
            temperature=self.loss.temperature,
            anchors=slice(rank * num_images, (rank + 1) * num_images),
        )
