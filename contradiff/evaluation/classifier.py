"""A small residual classifier, trained here on the labels: the extractor for toy-sized images.

Its pooled features stand where Inception's stand for photographs. Distances between them are not
comparable with published FIDs, so they are always named "FID (domain classifier)".

images (b 3 h w) uint8 -> space to depth -> (b 12 h/2 w/2) -> three residual stages of width/2,
width and 2·width channels, each but the first halving the sides -> global average ->
features (b 2·width) -> logits (b classes)
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from contradiff.training.loop import train

OnProgress = Callable[[int, Mapping[str, float]], None]

MAX_SHIFT_FRACTION = 1 / 10
"""Largest shift of the augmentation, as a part of the image's side."""
WEIGHT_DECAY = 0.05


class _ResidualBlock(nn.Module):
    """Pre-activation residual block: two 3x3 convolutions, the first with the stride (1 or 2)."""

    def __init__(self, channels_in: int, channels_out: int, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        # Pool, then mix channels (ResNet-D). The usual 1x1 convolution with stride 2 corrupts the
        # heap in its backward on CPUs, with channels_last and fewer than 8 or 16 channels
        # (uxlfoundation/oneDNN#6035; seen here with torch 2.15).
        self.shortcut = (
            nn.Identity() if stride == 1 else nn.Conv2d(channels_in, channels_out, 1, bias=False)
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        hidden = F.relu(self.norm1(x))
        residual = self.conv2(F.relu(self.norm2(self.conv1(hidden))))
        if self.stride == 1:
            return x + residual
        return self.shortcut(F.avg_pool2d(hidden, 2, ceil_mode=True)) + residual


class ResidualClassifier(nn.Module):
    """Pre-activation residual network with three stages (He et al., 2016), `channels_last`.

    The convolutions run at half resolution and below, which keeps the training within a minute on
    one core. The features are few, so that a thousand images give a covariance of full rank.
    """

    def __init__(self, *, width: int, num_classes: int) -> None:
        """Random weights from torch's global generator.

        Args:
            width: channels of the middle stage, even; the features have twice as many dimensions.
            num_classes: number of logits.
        """
        super().__init__()
        self.width = width
        self.num_features = 2 * width
        self.num_classes = num_classes
        self.stem = nn.Conv2d(12, width // 2, 3, padding=1, bias=False)
        self.stages = nn.Sequential(
            _ResidualBlock(width // 2, width // 2, stride=1),
            _ResidualBlock(width // 2, width, stride=2),
            _ResidualBlock(width, 2 * width, stride=2),
        )
        self.norm = nn.BatchNorm2d(2 * width)
        self.output = nn.Linear(2 * width, num_classes)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(
        self, images: UInt8[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b features"], Float[Tensor, "b classes"]]:
        """Features before the linear layer, and logits.

        Args:
            images: RGB from 0 to 255; height and width divisible by 2.
        """
        x = images.to(memory_format=torch.channels_last, dtype=self.output.weight.dtype)
        x = self.stem(F.pixel_unshuffle(x / 127.5 - 1, 2))
        features = F.relu(self.norm(self.stages(x))).mean((2, 3))
        return features, self.output(features)


def augment(
    images: UInt8[Tensor, "b 3 h w"], *, max_shift: int, generator: torch.Generator
) -> UInt8[Tensor, "b 3 h w"]:
    """Flip each image with probability 1/2 and shift it by up to `max_shift` pixels each way.

    What a shift uncovers is filled by reflection. All chance comes from `generator`, on the CPU.
    """
    num_images, _, height, width = images.shape
    shifts = torch.randint(-max_shift, max_shift + 1, (2, num_images, 1), generator=generator)
    flipped = torch.rand((num_images, 1), generator=generator) < 0.5
    rows = _reflected(torch.arange(height) + shifts[0], height)
    columns = _reflected(torch.arange(width) + shifts[1], width)
    columns = torch.where(flipped, columns.flip(1), columns)
    index = torch.arange(num_images)
    device = images.device
    moved = images.permute(0, 2, 3, 1)[
        index[:, None, None].to(device), rows[:, :, None].to(device), columns[:, None, :].to(device)
    ]
    return moved.permute(0, 3, 1, 2)


def _reflected(index: Int64[Tensor, "b side"], side: int) -> Int64[Tensor, "b side"]:
    """Indices outside [0, side) mirrored at the border pixel's centre, as padding "reflect"."""
    index = index.abs()
    return torch.minimum(index, 2 * (side - 1) - index)


def train_classifier(
    images: UInt8[Tensor, "n 3 side side"],
    labels: Int64[Tensor, " n"],
    val_images: UInt8[Tensor, "m 3 side side"],
    val_labels: Int64[Tensor, " m"],
    *,
    num_classes: int,
    width: int,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    on_progress: OnProgress,
) -> tuple[ResidualClassifier, float]:
    """Train the extractor's classifier with AdamW and a one-cycle schedule, without smoothing.

    Runs on the device of `images`. Two runs with equal arguments on one machine give equal
    weights; the global random state is left as it was.

    Args:
        images: the training images, RGB from 0 to 255, whole in memory.
        labels: classes in [0, num_classes).
        val_images: images that the accuracy is measured on; they train nothing.
        val_labels: their classes.
        num_classes: number of classes.
        width: channels of the middle stage, even.
        epochs: passes over the training images.
        batch_size: images a step; an incomplete last batch is left out (BatchNorm).
        lr: the highest learning rate of the cycle.
        seed: of weights, order and augmentation.
        on_progress: called after every epoch with the number of steps done and `epoch`, `loss`
            and `train_accuracy` (means over the epoch, of augmented images) and `lr`.

    Returns:
        The classifier in evaluation mode, and its accuracy on `val_images` in [0, 1].

    Raises:
        ValueError: there are fewer training images than one batch, no validation image, or the
            image size is odd or below 8 pixels.
    """
    side = images.shape[-1]
    if len(images) < batch_size:
        raise ValueError(
            f"extractor.batch_size is {batch_size}, but there are only {len(images)} training "
            "images: lower it, or raise data.num_train"
        )
    if len(val_images) == 0:
        raise ValueError("the extractor's classifier needs validation images: raise data.num_val")
    if side < 8 or side % 2:
        raise ValueError(
            f"data.image_size is {side}: extractor.kind classifier needs an even size from 8 on"
        )

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = ResidualClassifier(width=width, num_classes=num_classes).to(images.device)
    generator = torch.Generator().manual_seed(seed)
    decayed = [p for p in classifier.parameters() if p.ndim > 1]
    others = [p for p in classifier.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": WEIGHT_DECAY},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=lr,
    )
    steps_per_epoch = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=epochs * steps_per_epoch, cycle_momentum=False
    )
    max_shift = max(1, round(side * MAX_SHIFT_FRACTION))

    classifier.train()
    num_shown = steps_per_epoch * batch_size
    batches = (
        chosen
        for _ in range(epochs)
        for chosen in torch.randperm(len(images), generator=generator)[:num_shown]
        .to(images.device)
        .split(batch_size)
    )
    sums = torch.zeros(2, dtype=torch.float64, device=images.device)

    def take_gradients(step: int) -> dict[str, Tensor | float]:
        """Leave the gradient of a batch; return the epoch's means so far."""
        if step % steps_per_epoch == 0:
            sums.zero_()
        chosen = next(batches)
        batch = augment(images[chosen], max_shift=max_shift, generator=generator)
        _, logits = classifier(batch)
        loss = F.cross_entropy(logits, labels[chosen])
        loss.backward()
        num_correct = (logits.detach().argmax(1) == labels[chosen]).sum()
        sums.add_(torch.stack([loss.detach() * batch_size, num_correct]))
        epoch = float(step // steps_per_epoch + 1)
        return {"epoch": epoch, "loss": sums[0] / num_shown, "train_accuracy": sums[1] / num_shown}

    def rate(step: int) -> float:
        if step > 0:
            schedule.step()
        return float(schedule.get_last_lr()[0])

    train(
        take_gradients,
        steps=range(epochs * steps_per_epoch),
        optimizer=optimizer,
        lr=rate,
        lr_key="extractor.lr",
        is_reported=lambda done: done % steps_per_epoch == 0,
        on_step=lambda done, row: None if row is None else on_progress(done, row),
    )
    classifier.eval()
    return classifier, _accuracy(classifier, val_images, val_labels, batch_size=batch_size)


@torch.inference_mode()
def _accuracy(
    classifier: ResidualClassifier,
    images: UInt8[Tensor, "n 3 side side"],
    labels: Int64[Tensor, " n"],
    *,
    batch_size: int,
) -> float:
    pairs = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    num_correct = sum(int((classifier(x)[1].argmax(1) == y).sum()) for x, y in pairs)
    return num_correct / len(images)
