"""A small residual classifier, trained here on the labels. It is the extractor for small images.

A FID from its features cannot be compared with published FIDs.

images (b 3 h w) uint8 -> space to depth -> (b 12 h/2 w/2) -> three residual stages of width/2,
width and 2·width channels; the second and the third halve the sides -> global average ->
features (b 2·width) -> logits (b classes)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from contradiff.training.loop import train


class _ResidualBlock(nn.Module):
    """A residual block of two 3x3 convolutions. The first convolution has the stride (1 or 2)."""

    def __init__(self, channels_in: int, channels_out: int, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        # The shortcut pools and then mixes channels (ResNet-D). A 1x1 convolution with stride 2
        # would corrupt the heap in its backward pass on CPUs, with channels_last and fewer than 8
        # or 16 channels (uxlfoundation/oneDNN#6035; seen here with torch 2.15).
        if stride > 1:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        hidden = F.relu(self.norm1(x))
        residual = self.conv2(F.relu(self.norm2(self.conv1(hidden))))
        if self.stride == 1:
            return x + residual
        return self.shortcut(F.avg_pool2d(hidden, 2, ceil_mode=True)) + residual


class ResidualClassifier(nn.Module):
    """Pre-activation residual network with three stages (He et al., 2016), in `channels_last`.

    Working at half resolution keeps training within a minute on one core. The number of features is
    small, so that a thousand images give a covariance of full rank.
    """

    def __init__(self, *, width: int, num_classes: int) -> None:
        """Draw the weights from torch's global generator. `width` must be even."""
        super().__init__()
        self.width, self.num_features, self.num_classes = width, 2 * width, num_classes
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
        """Return the features before the linear layer, and the logits. The sides must be even."""
        x = images.to(memory_format=torch.channels_last, dtype=self.output.weight.dtype)
        x = self.stem(F.pixel_unshuffle(x / 127.5 - 1, 2))
        features = F.relu(self.norm(self.stages(x))).mean((2, 3))
        return features, self.output(features)


def augment(
    images: UInt8[Tensor, "b 3 h w"], *, max_shift: int, generator: torch.Generator
) -> UInt8[Tensor, "b 3 h w"]:
    """Flip each image with probability 1/2 and shift it by up to `max_shift` pixels on each axis.

    Pixels that a shift uncovers are filled by reflection. `generator` (on the CPU) draws the flips
    and shifts.
    """
    num_images, _, *sides = images.shape
    shifts = torch.randint(-max_shift, max_shift + 1, (2, num_images, 1), generator=generator)
    flipped = torch.rand((num_images, 1), generator=generator) < 0.5
    # Indices beyond a border are mirrored at the border pixels' centres, as padding "reflect" does.
    index = [(torch.arange(side) + shift).abs() for side, shift in zip(sides, shifts, strict=True)]
    rows, columns = (i.minimum(2 * (n - 1) - i) for n, i in zip(sides, index, strict=True))
    columns = torch.where(flipped, columns.flip(1), columns)
    number = torch.arange(num_images)[:, None, None]
    index = [i.to(images.device) for i in (number, rows[:, :, None], columns[:, None, :])]
    return images.permute(0, 2, 3, 1)[tuple(index)].permute(0, 3, 1, 2)


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
    on_epoch: Callable[[float], None],
) -> tuple[ResidualClassifier, float]:
    """Train with AdamW and one cycle of learning rates, on the device of `images`.

    Return the classifier in evaluation mode, and its accuracy on `val_images` in [0, 1]. On one
    machine, equal arguments give equal weights. An incomplete last batch is skipped, because
    BatchNorm needs full batches. `on_epoch` gets each epoch's mean loss. Raises ValueError if there
    are too few images, or if their side is odd or below 8.
    """
    side = images.shape[-1]
    if len(images) < batch_size:
        raise ValueError(
            f"extractor.batch_size: {batch_size} is more than the {len(images)} training images; "
            "lower extractor.batch_size, or raise data.num_train"
        )
    if len(val_images) == 0:
        raise ValueError("data.num_val: the classifier needs validation images; raise data.num_val")
    if side < 8 or side % 2:
        raise ValueError(
            f'data.image_size: {side} must be even and at least 8 for extractor.kind "classifier"'
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = ResidualClassifier(width=width, num_classes=num_classes).to(images.device)
    generator = torch.Generator().manual_seed(seed)
    decayed = [p for p in classifier.parameters() if p.ndim > 1]
    others = [p for p in classifier.parameters() if p.ndim <= 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.05)
    steps_per_epoch = len(images) // batch_size
    num_steps, num_shown = epochs * steps_per_epoch, steps_per_epoch * batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=num_steps, cycle_momentum=False
    )
    classifier.train()
    orders = (torch.randperm(len(images), generator=generator) for _ in range(epochs))
    batches = (batch for order in orders for batch in order[:num_shown].split(batch_size))
    total = torch.zeros((), dtype=torch.float64, device=images.device)

    def take_gradients(step: int) -> dict[str, Tensor]:
        """Compute the gradients of the next batch; return the epoch's mean loss so far."""
        if step % steps_per_epoch == 0:
            total.zero_()
        chosen = next(batches).to(images.device)
        max_shift = max(1, round(side / 10))
        batch = augment(images[chosen], max_shift=max_shift, generator=generator)
        loss = F.cross_entropy(classifier(batch)[1], labels[chosen])
        loss.backward()
        total.add_(loss.detach() * batch_size)
        return {"loss": total / num_shown}

    def rate(step: int) -> float:
        if step > 0:
            schedule.step()
        return float(schedule.get_last_lr()[0])

    train(
        take_gradients,
        steps=range(num_steps),
        optimizer=optimizer,
        lr=rate,
        lr_key="extractor.lr",
        is_reported=lambda done: done % steps_per_epoch == 0,
        on_step=lambda _, row: None if row is None else on_epoch(row["loss"]),
    )
    classifier.eval()
    pairs = zip(val_images.split(batch_size), val_labels.split(batch_size), strict=True)
    with torch.inference_mode():
        num_correct = sum(int((classifier(x)[1].argmax(1) == y).sum()) for x, y in pairs)
    return classifier, num_correct / len(val_images)
