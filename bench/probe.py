"""A grid of twelve linear heads beside one head at a time, and beside scikit-learn.

The grid trains all heads in one pass over the features. One head at a time is the same function
with one setting. scikit-learn's LogisticRegression gets one fit for each head: it minimises another
sum, so that only its accuracy can be compared.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from bench._turns import Row, compare, relative_error
from contradiff.downstream.linear import LinearProbe
from contradiff.downstream.params import SgdSchedule, SgdSetting
from contradiff.downstream.probe import Probe, evaluate, train_probes

GRID = product((0.01, 0.03, 0.1, 0.3, 1.0, 3.0), (0.0, 1e-4))
SETTINGS = [SgdSetting(lr, 0.9, decay) for lr, decay in GRID]
SCHEDULE = SgdSchedule(batch_size=256, epochs=10, warmup_epochs=1.0)
NUM_CLASSES = 12
PENALTIES = [10.0**power for power in range(-4, 8)]


def rows(_folder: Path, *, rounds: int, num_images: int = 4000, width: int = 128) -> Iterator[Row]:
    """Yield the rows."""
    train = draw(num_images, width=width, seed=1)
    test = draw(1000, width=width, seed=2)

    def grid(settings: Sequence[SgdSetting] = SETTINGS) -> list[Probe]:
        shared = {"num_classes": NUM_CLASSES, "schedule": SCHEDULE, "device": torch.device("cpu")}
        return train_probes(*train, settings=settings, seed=0, **shared)

    def one_at_a_time() -> list[Probe]:
        return [grid([setting])[0] for setting in SETTINGS]

    def accuracies() -> list[float]:
        return [logistic(train, test, c=c) for c in PENALTIES]

    yield compare(
        f"grid of {len(SETTINGS)} linear heads",
        "one head at a time",
        (grid, one_at_a_time),
        rounds=rounds,
        error=lambda: relative_error(weights(grid()), weights(one_at_a_time())),
        tolerance=1e-5,
        note="equal: all weights",
    )
    yield compare(
        f"grid of {len(SETTINGS)} linear heads",
        f"scikit-learn's LogisticRegression, {len(PENALTIES)} penalties",
        (grid, accuracies),
        rounds=min(rounds, 3),
        error=lambda: abs(max(evaluate(p, *test).top1 for p in grid()) - max(accuracies())),
        tolerance=0.03,
        note="near: the best top-1",
    )


def weights(probes: Sequence[Probe]) -> Tensor:
    """Return the weights of all probes."""
    linear = [probe.linear.weight for probe in probes if isinstance(probe, LinearProbe)]
    return torch.stack(linear).detach()


def draw(num_images: int, *, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw features and labels from overlapping Gaussian clusters."""
    centres = torch.randn(NUM_CLASSES, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (num_images,), generator=generator)
    noise = torch.randn(num_images, width, generator=generator)
    return centres[labels] * 0.3 + noise, labels


def logistic(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, c: float) -> float:
    """Return the accuracy of scikit-learn's LogisticRegression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
    model.fit(train[0].numpy(), train[1].numpy())
    return float(model.score(test[0].numpy(), test[1].numpy()))
