"""Fine-tuning of LoRA, the attention head and a linear classifier on few labelled images.

The paper does not fine-tune: its transfer experiment (Sec. 4.2.3) uses frozen features. Report
these scores as `finetuned`, never as the paper's.
"""

import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from contradiff.downstream.accuracy import topk_correct
from contradiff.downstream.probe import OnEpoch
from contradiff.features.batches import CleanBatch
from contradiff.features.models import DiffusionFeatures, autocast, compute_features
from contradiff.features.params import FeaturesParams
from contradiff.method.lora import cast_frozen_weights
from contradiff.method.model import ContraDiffModel
from contradiff.method.params import NUM_LEVELS
from contradiff.training.loop import train
from contradiff.training.optim import build_adamw, cosine_with_warmup
from contradiff.types import ByteImages, Latents, to_bytes, to_pixels


@dataclass(frozen=True)
class EncodedImages:
    """Latents and pixels of images, encoded once and kept in memory.

    Pixels are kept as bytes. An image of 256 x 256 pixels takes 0.2 MB; all training images of
    CIFAR-100 take 10 GB. In testing, an image's entry in `indices` seeds the image's noise.
    """

    indices: Int64[Tensor, " batch"]
    latents: Latents
    images: ByteImages
    labels: Int64[Tensor, " batch"]

    @classmethod
    def of(cls, batches: Iterable[CleanBatch]) -> "EncodedImages":
        """Join batches. Pixels become bytes again without loss."""
        kept = list(batches)
        return cls(
            torch.tensor([index for batch in kept for index in batch.indices]),
            torch.cat([batch.latents for batch in kept]),
            torch.cat([to_bytes(batch.pixels) for batch in kept]),
            torch.cat([batch.labels for batch in kept]),
        )

    def __getitem__(self, rows: Int64[Tensor, " rows"]) -> "EncodedImages":
        """Return the images of the given rows, in that order."""
        fields = self.indices, self.latents, self.images, self.labels
        return EncodedImages(*(field[rows] for field in fields))

    def batches(self, batch_size: int) -> Iterator[CleanBatch]:
        """Yield batches of the images, in order, with float pixels. An image's key is its index."""
        for rows in torch.arange(len(self.labels)).split(batch_size):
            some, indices = self[rows], tuple(self.indices[rows].tolist())
            pixels, keys = to_pixels(some.images), tuple(map(str, indices))
            yield CleanBatch(indices, some.latents, pixels, some.labels, keys)


@contextmanager
def weights_kept(model: ContraDiffModel) -> Generator[None]:
    """Restore the model's trained weights and `requires_grad` flags when the `with` block ends."""
    state = {name: tensor.detach().clone() for name, tensor in model.trained_state().items()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        model.load_trained_state(state)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
            parameter.grad = None


def finetune(
    model: ContraDiffModel,
    data: EncodedImages,
    *,
    num_classes: int,
    features: FeaturesParams,
    epochs: int,
    lr: float,
    weight_decay: float,
    batch_size: int,
    seed: int,
    device: torch.device,
    on_epoch: OnEpoch,
) -> nn.Linear:
    """Train LoRA, the attention head and a new linear classifier; return the classifier.

    The classifier reads the feature h (Eq. 4). The loss is the cross-entropy. LoRA and the head
    change in place; all other weights of the model stay as they are. h is computed at
    features.timesteps, with new noise at every step. Images are not augmented. AdamW's learning
    rate falls from `lr` along half a cosine. The seed decides the initial classifier, the order of
    the images and the noise. If features.precision is bf16, the UNet's frozen weights become
    bfloat16, and the model runs under autocast. Trained weights, loss and AdamW's state are
    float32. Raises ValueError if the loss is not finite; the message names transfer.finetune_lr.
    """
    generator = torch.Generator().manual_seed(seed)
    classifier = nn.Linear(model.attention.norm_out.normalized_shape[0], num_classes)
    nn.init.trunc_normal_(classifier.weight, std=0.01, generator=generator)
    nn.init.zeros_(classifier.bias)
    classifier.to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("attention."))
    if features.precision == "bf16":
        cast_frozen_weights(model.unet)
    trained = [*model.named_parameters(), *classifier.named_parameters(prefix="classifier")]
    optimizer = build_adamw(trained, lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay)
    num_images = len(data.labels)
    steps_per_epoch = math.ceil(num_images / batch_size)
    total_steps = epochs * steps_per_epoch
    batches = (
        rows
        for _ in range(epochs)
        for rows in torch.randperm(num_images, generator=generator).tensor_split(steps_per_epoch)
    )
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)

    def take_gradients(step: int) -> dict[str, Tensor]:
        """Compute one batch's gradients. At an epoch's last step, "loss" is the epoch's mean."""
        if step % steps_per_epoch == 0:
            loss_sum.zero_()
        batch = data[next(batches)]
        num_rows = len(batch.labels)
        if features.condition == "image":
            pixels = to_pixels(batch.images)
            conditions = model.conditioner.choose(pixels=pixels, latents=batch.latents)
        else:
            conditions = torch.randn(num_rows, *model.conditioner.shape, generator=generator)
        noise = torch.randn(NUM_LEVELS, *batch.latents.shape, generator=generator).to(device)
        latents = batch.latents.to(device)
        with autocast(device, features.precision):
            with torch.no_grad():
                tokens = model.encode_condition(conditions.to(device))
            maps = model.level_maps(
                latents, tokens, timesteps=features.timesteps, noise=noise, blocks=[model.block]
            )
            h = model.attention(maps[model.block]).float()
        loss = nn.functional.cross_entropy(classifier(h), batch.labels.to(device))
        loss.backward()
        loss_sum.add_(loss.detach().double() * num_rows)
        return {"loss": loss_sum / num_images}

    train(
        take_gradients,
        steps=range(total_steps),
        optimizer=optimizer,
        lr=lambda step: lr * cosine_with_warmup(step, total_steps=total_steps, warmup_steps=0),
        lr_key="transfer.finetune_lr",
        is_reported=lambda done: done % steps_per_epoch == 0,
        on_step=lambda done, row: on_epoch(done // steps_per_epoch, row) if row else None,
    )
    return classifier.requires_grad_(requires_grad=False)


@torch.inference_mode()
def finetuned_top1(
    model: ContraDiffModel,
    classifier: nn.Linear,
    data: EncodedImages,
    *,
    features: FeaturesParams,
    seed: int,
    device: torch.device,
) -> float:
    """Return the top-1 accuracy in [0, 1]. The index of an image seeds its noise."""
    frozen = DiffusionFeatures(model, features, seed, device)
    featured = compute_features(frozen, data.batches(features.batch_size))
    logits = classifier(featured.features.to(device)).cpu()
    return topk_correct(logits, data.labels, 1) / len(data.labels)
