"""Fine-tuning on few labelled images: LoRA, attention head and a linear classifier of h.

Beyond the paper, whose transfer (Sec. 4.2.3) is of frozen features: label scores `finetuned`.
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
from contradiff.method.model import ContraDiff
from contradiff.method.noise import NUM_LEVELS
from contradiff.training.loop import train
from contradiff.training.optim import build_adamw, cosine_with_warmup
from contradiff.types import ByteImages, Latents, to_bytes, to_pixels


@dataclass(frozen=True)
class EncodedImages:
    """Images encoded once and kept in memory: latents, and pixels as bytes, a quarter as large.

    At 256 pixels an image takes 0.2 MB: 0.5 GB for 25 shots of 100 classes, 10 GB for all of
    CIFAR-100's training images. `indices` seed the images' noise in testing.
    """

    indices: Int64[Tensor, " batch"]
    latents: Latents
    images: ByteImages
    labels: Int64[Tensor, " batch"]

    @classmethod
    def of(cls, batches: Iterable[CleanBatch]) -> "EncodedImages":
        """Keep what batches hold; their pixels are whole bytes in [-1, 1], so nothing is lost."""
        kept = list(batches)
        return cls(
            torch.tensor([index for batch in kept for index in batch.indices]),
            torch.cat([batch.latents for batch in kept]),
            torch.cat([to_bytes(batch.pixels) for batch in kept]),
            torch.cat([batch.labels for batch in kept]),
        )

    def __getitem__(self, rows: Int64[Tensor, " rows"]) -> "EncodedImages":
        """Some of the images."""
        fields = self.indices, self.latents, self.images, self.labels
        return EncodedImages(*(field[rows] for field in fields))

    def batches(self, batch_size: int) -> Iterator[CleanBatch]:
        """The images in order, as they came, with their indices as keys."""
        for rows in torch.arange(len(self.labels)).split(batch_size):
            some, indices = self[rows], tuple(self.indices[rows].tolist())
            pixels, keys = to_pixels(some.images), tuple(map(str, indices))
            yield CleanBatch(indices, some.latents, pixels, some.labels, keys)


@contextmanager
def weights_kept(model: ContraDiff) -> Generator[None]:
    """Give the model its trained weights, and what is trainable, back when the block ends."""
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
    model: ContraDiff,
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
    """Minimise the cross-entropy of linear(h), in place; base and conditioner stay as they are.

    h is taken as in evaluation, at the fixed triple of timesteps, but the noise is drawn anew at
    every step; images are not augmented. The LoRA behind the maps that h reads gets no gradient.
    AdamW's rate falls along half a cosine from `lr`. The batches of an epoch differ in size by one
    at most. The seed decides the initial classifier, the order and the noise. With
    features.precision bf16 the UNet's frozen weights become bfloat16 and the passes run under
    autocast, as in testing; what is trained, the loss and AdamW's state are float32. A ValueError
    names transfer.finetune_lr if the loss is not finite.
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
        """Return the epoch's mean loss so far."""
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
    model: ContraDiff,
    classifier: nn.Linear,
    data: EncodedImages,
    *,
    features: FeaturesParams,
    seed: int,
    device: torch.device,
) -> float:
    """Share of images whose label has the greatest logit, with the noise of frozen features."""
    frozen = DiffusionFeatures(model, features, seed, device)
    featured = compute_features(frozen, data.batches(features.batch_size))
    logits = classifier(featured.features.to(device)).cpu()
    return topk_correct(logits, data.labels, 1) / len(data.labels)
