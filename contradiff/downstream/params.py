"""Sections `probe`, `separability` and `transfer` of params.yaml."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field, model_validator

from contradiff.config import Section

Cs: TypeAlias = list[Annotated[float, Field(gt=0)]]
"""Values of C (inverse penalties) to choose from."""

Shots: TypeAlias = int | Literal["full"]
"""Number of training images per class, or "full" for all training images."""


@dataclass(frozen=True)
class SgdSetting:
    """Settings that may differ between classifiers that are trained together."""

    lr: float
    momentum: float
    weight_decay: float


TABLE_2 = SgdSetting(lr=0.01, momentum=0.9, weight_decay=0.05)
"""The setting of the paper's Table 2. Every grid includes this setting."""


@dataclass(frozen=True)
class SgdSchedule:
    """Settings that are equal for all classifiers that are trained together."""

    batch_size: int
    """Size of the largest batch; batches of an epoch differ by at most one image."""
    epochs: int
    warmup_epochs: float


class SgdParams(Section):
    """Parameters of a classifier that SGD trains on fixed features (Table 2)."""

    section: ClassVar[str]

    lr: float = Field(gt=0, description="peak learning rate, not scaled by the batch size")
    momentum: float = Field(ge=0, lt=1)
    weight_decay: float = Field(
        ge=0, description="L2 penalty; Table 2's 0.05 is too large: weights would stay near zero"
    )
    batch_size: int = Field(ge=2)
    epochs: int = Field(ge=1)
    warmup_epochs: float = Field(ge=0)

    @model_validator(mode="after")
    def _warmup_ends_within_training(self) -> "SgdParams":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"{self.section}.warmup_epochs is {self.warmup_epochs:g}, but must be less than "
                f"{self.section}.epochs, which is {self.epochs}; lower {self.section}.warmup_epochs"
            )
        return self

    @property
    def setting(self) -> SgdSetting:
        """Settings that may differ between classifiers that are trained together."""
        return SgdSetting(self.lr, self.momentum, self.weight_decay)

    @property
    def schedule(self) -> SgdSchedule:
        """Settings that are equal for all classifiers that are trained together."""
        return SgdSchedule(self.batch_size, self.epochs, self.warmup_epochs)


class ProbeParams(SgdParams):
    """Section `probe`: how classifiers of frozen features are trained and tested."""

    section: ClassVar[str] = "probe"

    split: Literal["val", "dev"] = Field(
        description="images to test on: val | dev: a held-out tenth of the training images, with "
        "which to choose a setting of the grid"
    )
    head: Literal["linear", "attentive"] = Field(
        description="linear: trains a linear layer | attentive: also trains the attention head"
    )
    headline: Literal["logistic", "sgd"] = Field(
        description="whose accuracy is the main score: that of logistic regression or of SGD"
    )
    cs: Cs = Field(description="values of C that logistic regression tries; []: do not train it")
    few_labels: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        description="logistic regression is also trained with only these shares of the labels"
    )
    baselines: Literal["all", "pooled", "none"] = Field(
        description="features of the untrained model to test as well; pooled: not the full map"
    )
    lrs: list[float] = Field(description="learning rates to try in addition to lr")
    weight_decays: list[float] = Field(description="decays to try in addition to weight_decay")

    @model_validator(mode="after")
    def _grid_is_positive(self) -> "ProbeParams":
        if min(self.lrs, default=1.0) <= 0:
            raise ValueError(f"probe.lrs: {self.lrs}: set all to more than 0")
        if min(self.weight_decays, default=0.0) < 0:
            raise ValueError(f"probe.weight_decays: {self.weight_decays}: set all to 0 or more")
        return self

    @model_validator(mode="after")
    def _logistic_regression_is_possible(self) -> "ProbeParams":
        if self.headline == "logistic" and self.head == "attentive":
            raise ValueError(
                "probe.headline: logistic regression needs frozen features, but probe.head: "
                "attentive trains the head too; set probe.headline to sgd"
            )
        if self.few_labels and not self.cs:
            raise ValueError(
                "probe.few_labels: only logistic regression uses this list, but probe.cs is []; "
                "set probe.few_labels to [], or probe.cs to a grid such as [0.01, 0.1, 1.0]"
            )
        refuse_headline_without_cs(self.section, self.headline, self.cs)
        return self

    @property
    def grid(self) -> tuple[SgdSetting, ...]:
        """Settings to try: params.yaml's, Table 2's, then all other pairs of rate and decay.

        Attentive probes try only the first two, because each trains its own attention head.
        """
        if self.head == "attentive":
            return tuple(dict.fromkeys((self.setting, TABLE_2)))
        others = [
            SgdSetting(lr, self.momentum, weight_decay)
            for lr in (self.lr, *self.lrs)
            for weight_decay in (self.weight_decay, *self.weight_decays)
        ]
        return tuple(dict.fromkeys((self.setting, TABLE_2, *others)))


class SeparabilityParams(Section):
    """Section `separability`: images and classes of Fig. 3. The paper does not name them."""

    num_images: int = Field(ge=4, description="maximum number of validation images")
    num_classes: int = Field(ge=2, description="maximum number of classes, drawn at random")
    num_neighbours: int = Field(ge=1, description="k of the k-nearest-neighbour vote")

    @model_validator(mode="after")
    def _neighbours_are_other_images(self) -> "SeparabilityParams":
        if self.num_neighbours >= self.num_images:
            raise ValueError(
                f"separability.num_neighbours: set it below separability.num_images, which is "
                f"{self.num_images} (got {self.num_neighbours})"
            )
        return self


class TransferParams(SgdParams):
    """Section `transfer`: few-shot classification of another data set."""

    section: ClassVar[str] = "transfer"

    shots: list[Shots] = Field(
        min_length=1,
        description="training images per class, or full: all; the first gives the main result",
    )
    headline: Literal["logistic", "ridge", "sgd"] = Field(
        description="classifier whose accuracy is reported as the main score; sgd: a linear probe"
    )
    cs: Cs = Field(description="values of C that logistic regression tries; []: do not train it")
    num_splits: int = Field(
        ge=1, description="random few-shot sets for each number of shots; full: 1 set"
    )
    ridge: float = Field(gt=0, description="factor of ridge regression's L2 penalty")
    finetune_epochs: int = Field(
        ge=0,
        description="epochs of fine-tuning the model with a classifier; 0: none, as in the paper",
    )
    finetune_lr: float = Field(gt=0, description="highest learning rate of fine-tuning")
    finetune_weight_decay: float = Field(ge=0)
    finetune_batch_size: int = Field(ge=1)

    @model_validator(mode="after")
    def _shots_are_counts(self) -> "TransferParams":
        counts = [shots for shots in self.shots if shots != "full"]
        if len(set(self.shots)) < len(self.shots) or any(count < 1 for count in counts):
            remedy = f"list different numbers of 1 or more, or 'full' (got {self.shots})"
            raise ValueError(f"transfer.shots: {remedy}")
        refuse_headline_without_cs(self.section, self.headline, self.cs)
        return self


def refuse_headline_without_cs(section: str, headline: str, cs: Sequence[float]) -> None:
    """Raise ValueError if the headline is logistic regression, but there is no C to try."""
    if headline == "logistic" and not cs:
        raise ValueError(
            f"{section}.headline: logistic needs values of C, but {section}.cs is []; set "
            f"{section}.cs to a grid such as [0.01, 0.1, 1.0], or {section}.headline to sgd"
        )
