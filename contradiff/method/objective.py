"""The loss of a training step: L = L_recon + lambda * L_contrast (Eq. 7), from two noisy views."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_single_autograd

from contradiff.method import losses
from contradiff.method.attention import order_by_noise
from contradiff.method.losses import Loss
from contradiff.method.model import ContraDiffModel
from contradiff.method.noise import add_noise, prediction_target
from contradiff.method.params import NUM_LEVELS, NUM_VIEWS, LossParams
from contradiff.method.unet import UNetState
from contradiff.types import Features, Latents, Timesteps, Tokens


@dataclass(frozen=True)
class TrainingBatch:
    """The inputs of one training step: two views of each image, with three noise levels each.

    `cond_views` is 1 if all draws of an image share one condition, 2 if each view has its own, and
    3 if the draws of reconstruction have the first one, the other draws of views 1 and 2 the second
    and the third. Where `dropped` is true, `condition_noise` replaces the condition. The step
    itself draws no random numbers.
    """

    latents: Float[Tensor, "2 batch channels h w"]
    conditions: Float[Tensor, "cond_views batch channels_x size size"]
    condition_noise: Float[Tensor, "cond_views batch channels_x size size"]
    dropped: Bool[Tensor, "cond_views batch"]
    timesteps: Int[Tensor, "2 3 batch"]
    noise: Float[Tensor, "2 3 batch channels h w"]


class TrainingStep(nn.Module):
    """The loss of a model on a batch. It is a module, because DDP needs a module.

    To save memory, at most `decode_batch_size` noisy latents (0: all) are denoised at once; see
    `SplitUNet.mean_loss`.
    """

    def __init__(self, model: ContraDiffModel, *, loss: LossParams, decode_batch_size: int) -> None:
        super().__init__()
        self.model, self.loss, self.decode_batch_size = model, loss, decode_batch_size

    def forward(self, batch: TrainingBatch) -> dict[str, Loss]:
        """Compute the loss of this process's images and its terms: "reconstruction", "contrastive".

        An image has six noisy latents ("draws"), ordered by view, then by level. All six run
        through the UNet up to `head.block`. Only the first `loss.recon_passes` of them run through
        the other blocks, to predict the noise or v (Eq. 3). With lambda = 0, only these first draws
        are computed, and the result has no "contrastive".
        """
        model, loss, unet = self.model, self.loss, self.model.split_unet
        num_images, has_contrast = batch.latents.shape[1], loss.weight > 0
        draws = slice(NUM_VIEWS * NUM_LEVELS if has_contrast else loss.recon_passes)
        timesteps = batch.timesteps.flatten(0, 1)[draws].flatten()
        noise = batch.noise.flatten(0, 1)[draws].flatten(0, 1)
        latents = batch.latents.repeat_interleave(NUM_LEVELS, dim=0)[draws].flatten(0, 1)

        # Sec. 4.1: the clean image, or pure noise, conditions the denoiser
        tokens = self._encode_conditions(batch, draws)
        # Eq. 5
        noisy_latents = add_noise(latents, noise, timesteps, model.schedule.alphas_cumprod)
        # f(z_t): the down blocks, the mid block and, if `head.block` needs them, some up blocks
        blocks = (model.block,) if has_contrast else ()
        state = unet.down(noisy_latents, timesteps, tokens, blocks=blocks)
        # Eq. 3
        denoised = slice(loss.recon_passes * num_images)
        at = timesteps[denoised]
        target = prediction_target(latents[denoised], noise[denoised], at, model.schedule)
        reconstruction = self._reconstruct(state[denoised], target, at)
        if not has_contrast:
            return {"loss": reconstruction, "reconstruction": reconstruction}
        # Eq. 4
        maps = unet.maps(state, model.block).unflatten(0, batch.timesteps.shape)
        levels = order_by_noise(
            maps.transpose(0, 1).flatten(1, 2), batch.timesteps.transpose(0, 1).flatten(1, 2)
        )
        h, own = gather_views(model.attention(levels))
        # Eq. 6
        view1, view2 = model.projector(h).chunk(NUM_VIEWS)
        contrast = losses.CONTRASTIVE_LOSSES[loss.contrastive]
        contrastive = contrast(view1, view2, temperature=loss.temperature, anchors=own)
        # Eq. 7
        total = reconstruction + loss.weight * contrastive
        return {"loss": total, "reconstruction": reconstruction, "contrastive": contrastive}

    def _encode_conditions(self, batch: TrainingBatch, draws: slice) -> Tokens:
        """Return the tokens of the noisy latents `draws`; a shared condition is encoded once."""
        number, passes = len(batch.conditions), self.loss.recon_passes
        views = [draw // NUM_LEVELS for draw in range(NUM_VIEWS * NUM_LEVELS)]
        if number == 1:
            views = [0] * len(views)
        elif number == 3:
            views = [0 if draw < passes else 1 + view for draw, view in enumerate(views)]
        views = views[draws]
        used = slice(max(views) + 1)
        # c(noise) is the unconditional mode (App. A) and the null condition of guidance.
        is_dropped = batch.dropped[used, :, None, None, None]
        pixels = torch.where(is_dropped, batch.condition_noise[used], batch.conditions[used])
        tokens = self.model.conditioner(pixels.flatten(0, 1))
        return tokens.unflatten(0, pixels.shape[:2])[views].flatten(0, 1)

    def _reconstruct(self, state: UNetState, target: Latents, timesteps: Timesteps) -> Loss:
        """Compute Eq. 3, with min-SNR weights if loss.min_snr_gamma is above 0."""
        weights = None
        if (gamma := self.loss.min_snr_gamma) > 0:
            schedule = self.model.schedule
            weights = losses.min_snr_weights(
                schedule.alphas_cumprod.to(timesteps.device),
                gamma=gamma,
                prediction_type=schedule.prediction_type,
            )[timesteps]

        def loss_of(prediction: Latents, rows: slice) -> Tensor:
            of_rows = None if weights is None else weights[rows]
            return losses.reconstruction_loss(prediction, target[rows], weights=of_rows)

        return self.model.split_unet.mean_loss(state, loss_of, self.decode_batch_size)


def gather_views(h: Features) -> tuple[Features, slice]:
    """Gather h from all processes, with gradients; also return the slice of this process's images.

    The result has all images of view 1, then all images of view 2. It is the same in all processes,
    so that the projector's BatchNorm sees the global batch. Each process uses only its own images
    as anchors. DDP's average gradient thus equals the gradient of a single process.
    """
    num_images = len(h) // NUM_VIEWS
    group = dist.group.WORLD if dist.is_initialized() else None
    if group is None or group.size() == 1:
        return h, slice(0, num_images)
    views = h.unflatten(0, (NUM_VIEWS, num_images))
    views = all_gather_single_autograd(views.contiguous(), gather_dim=1, group=group)
    start = group.rank() * num_images
    return views.flatten(0, 1), slice(start, start + num_images)
