"""Compare a grid of linear probes, trained together, with one probe and LogisticRegression.

    python -m bench probe                 4,000 x 128 features of 12 classes, 12 settings, 10 epochs
    python -m bench probe 20000 1024 100  images, width, classes

The three rows train on the same features: our `train_probes` with all settings, `train_probes` with
one setting, and scikit-learn's LogisticRegression. The column top-1 shows the accuracy.
"""

import time
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from contradiff.downstream.probe import evaluate, train_probes
from contradiff.training.optim import SgdSchedule, SgdSetting

GRID = product((0.01, 0.03, 0.1, 0.3, 1.0, 3.0), (0.0, 1e-4))
SETTINGS = [SgdSetting(lr, 0.9, decay) for lr, decay in GRID]
SCHEDULE = SgdSchedule(batch_size=256, epochs=10, warmup_epochs=1.0)


def main(arguments: Sequence[str]) -> None:
    """Time the three ways and print the table."""
    num_images, width, num_classes = map(int, arguments) if arguments else (4000, 128, 12)
    train = draw(num_images, width=width, num_classes=num_classes, seed=1)
    test = draw(1000, width=width, num_classes=num_classes, seed=2)
    shared = {"num_classes": num_classes, "schedule": SCHEDULE, "device": torch.device("cpu")}

    def top1(settings: Sequence[SgdSetting], number: int) -> float:
        probes = train_probes(*train, settings=settings, seed=0, **shared)
        return evaluate(probes[number], *test).top1

    top1(SETTINGS[:1], 0)  # warm up: torch.optim loads much of torch at its first use
    rows: dict[str, tuple[int, Callable[[], float]]] = {
        f"grid of {len(SETTINGS)}, one pass": (len(SETTINGS), lambda: top1(SETTINGS, 4)),
        "one probe": (1, lambda: top1(SETTINGS[4:5], 0)),
        "LogisticRegression": (1, lambda: logistic(train, test)),
    }
    print(f"{num_images} x {width} features, {num_classes} classes, {SCHEDULE.epochs} epochs\n")
    print(f"{'':26}{'heads':>6}{'CPU s':>9}{'s a head':>10}{'top-1':>8}")
    for name, (heads, run) in rows.items():
        started = time.process_time()
        accuracy = run()
        seconds = time.process_time() - started
        line = f"{name:26}{heads:>6}{seconds:>9.2f}{seconds / heads:>10.3f}{accuracy:>8.1%}"
        print(line, flush=True)


def draw(num_images: int, *, width: int, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw features and labels from overlapping Gaussian clusters."""
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    noise = torch.randn(num_images, width, generator=generator)
    return centres[labels] * 0.3 + noise, labels


def logistic(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Return the accuracy of scikit-learn's LogisticRegression on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(train[0].numpy(), train[1].numpy())
    return float(model.score(test[0].numpy(), test[1].numpy()))
