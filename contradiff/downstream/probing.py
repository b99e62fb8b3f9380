"""Linear and attentive probes of frozen features (Table 2, Sec. 4.2.1)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn

from contradiff.downstream.accuracy import topk_correct, wilson_interval
from contradiff.features.cache import Rows
from contradiff.training.optim import SgdParams, SgdSchedule, SgdSetting

_EVALUATION_BATCH = 1024


class ProbeParams(SgdParams):
    """How frozen features are judged on the labels."""

    section: ClassVar[str] = "probe"

    split: Literal["val", "dev"] = Field(
        description="what is judged: val | dev: a held-out tenth of the training images, to choose "
        "among the grid"
    )
    head: Literal["linear", "attentive"] = Field(
        description="linear: of frozen features | attentive: an attention head learns with labels"
    )
    lrs: list[float] = Field(description="further learning rates of the grid")
    weight_decays: list[float] = Field(description="further weight decays of the grid")

    @model_validator(mode="after")
    def _grid_is_positive(self) -> "ProbeParams":
        if min(self.lrs, default=1.0) <= 0:
            raise ValueError(f"probe.lrs: {self.lrs} must be greater than 0")
        if min(self.weight_decays, default=0.0) < 0:
            raise ValueError(f"probe.weight_decays: {self.weight_decays} must not be negative")
        return self

    @property
    def grid(self) -> tuple[SgdSetting, ...]:
        """Configured setting first, Table 2's somewhere, then rates x decays; none twice.

        Of attentive heads the first two alone: each is as dear as a training.
        """
        if self.head == "attentive":
            return tuple(dict.fromkeys((self.setting, TABLE_2)))
        others = [
            SgdSetting(lr, self.momentum, weight_decay)
            for lr in (self.lr, *self.lrs)
            for weight_decay in (self.weight_decay, *self.weight_decays)
        ]
        return tuple(dict.fromkeys((self.setting, TABLE_2, *others)))

    @property
    def is_table_2(self) -> bool:
        """Whether batch, epochs and warm-up, which the whole grid shares, are Table 2's."""
        return self.schedule == SgdSchedule(batch_size=256, epochs=50, warmup_epochs=5.0)


TABLE_2 = SgdSetting(lr=0.01, momentum=0.9, weight_decay=0.05)
"""Table 2 to the letter; its weight decay destroys the layer, but it is in every grid."""


class LinearProbe(nn.Module):
    """BatchNorm without affine parameters, then a linear layer: features (n, d) to logits (n, c).

    The normalisation takes the scale of the features out of the learning rate's choice (as MAE's
    linear probe). Weights start at a normal of deviation 0.01, cut at ±2, biases at 0.

    Args:
        dim: Width d of the features.
        num_classes: Number c of classes.
        generator: Source of the initial weights, on the CPU; torch's global one if None.
    """

    def __init__(
        self, dim: int, num_classes: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False)
        # Without this, nn.Linear's own initialisation would draw from the global generator.
        with torch.random.fork_rng(devices=[]):
            self.linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        """Logits of raw features."""
        return self.linear(self.norm(features))


class AttentiveProbe(nn.Module):
    """An attention head, trained with labels, and a linear probe of its feature.

    Args:
        attention_head: Maps bottleneck maps (n, 3, c, h, w), from the noisiest to the cleanest, to
            features (n, d).
        probe: Maps the features to logits.
    """

    def __init__(self, attention_head: nn.Module, probe: LinearProbe) -> None:
        super().__init__()
        self.attention_head = attention_head
        self.probe = probe

    def forward(self, maps: Float[Tensor, "n 3 channels h w"]) -> Float[Tensor, "n classes"]:
        """Logits of bottleneck maps."""
        return self.probe(self.attention_head(maps))


@dataclass(frozen=True)
class ProbeResult:
    """Accuracy over a whole split.

    Attributes:
        top1: Share of samples whose label has the greatest logit, in [0, 1].
        top5: Share whose label is among the five greatest (or all, with fewer classes).
        correct: Samples counted by `top1`.
        total: Samples in the split.
        interval: Wilson's 95% interval of `top1`.
    """

    top1: float
    top5: float
    correct: int
    total: int
    interval: tuple[float, float]


@torch.no_grad()
def evaluate(
    probe: LinearProbe | AttentiveProbe,
    features: Float[Tensor, "n ..."] | Rows,
    labels: Int64[Tensor, " n"],
) -> ProbeResult:
    """Top-1 and top-5 accuracy over every sample given, none dropped.

    Args:
        probe: From `train_linear_probes` or `train_attentive_probes`; set to evaluation mode.
        features: Features (n, d) for a linear probe, maps (n, 3, channels, h, w) for an attentive.
        labels: True classes.

    Raises:
        ValueError: there are no samples, or the probe has diverged.
    """
    if len(labels) == 0:
        raise ValueError(
            "no samples to evaluate the probe on: probe.split chooses none of the data"
        )
    probe.eval()
    device = next(probe.parameters()).device
    top1 = top5 = 0
    for batch, targets in zip(
        features.split(_EVALUATION_BATCH), labels.split(_EVALUATION_BATCH), strict=True
    ):
        logits = probe(batch.to(device, torch.float32))
        targets_there = targets.to(device)
        top1 += topk_correct(logits, targets_there, 1)
        top5 += topk_correct(logits, targets_there, min(5, logits.shape[1]))
    total = len(labels)
    return ProbeResult(
        top1=top1 / total,
        top5=top5 / total,
        correct=top1,
        total=total,
        interval=wilson_interval(top1, total),
    )
