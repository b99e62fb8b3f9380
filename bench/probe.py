"""A grid of linear probes, trained in one pass over cached features, against its peers.

    python -m bench probe                 4,000 x 128 features of 12 classes, 12 settings, 10 epochs
    python -m bench probe 20000 1024 100  images, width, classes

In one run, on the same features: `train_linear_probes` (all settings at once); the same with one
setting; one probe as it is usually written (DataLoader over a TensorDataset, torch.optim.SGD); and
scikit-learn's LogisticRegression (L-BFGS to convergence, one setting). Accuracy stands beside
the time, since the four do not stop at the same point.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from contradiff.downstream.probe import LinearProbe, evaluate, train_linear_probes
from contradiff.training.optim import SgdSchedule, SgdSetting, cosine_with_warmup

SETTINGS = [
    SgdSetting(lr, 0.9, decay)
    for lr, decay in product((0.01, 0.03, 0.1, 0.3, 1.0, 3.0), (0.0, 1e-4))
]
EPOCHS, BATCH_SIZE = 10, 256


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    num_images, width, num_classes = map(int, arguments) if arguments else (4000, 128, 12)
    train = draw(num_images, width=width, num_classes=num_classes, seed=1)
    test = draw(1000, width=width, num_classes=num_classes, seed=2)
    shared = {
        "num_classes": num_classes,
        "schedule": SgdSchedule(BATCH_SIZE, EPOCHS, warmup_epochs=1.0),
        "seed": 0,
    }
    one = SETTINGS[4]

    def top1(probe: LinearProbe) -> float:
        return evaluate(probe, *test).top1

    rows: dict[str, tuple[int, Callable[[], float]]] = {
        f"grid of {len(SETTINGS)}, one pass": (
            len(SETTINGS),
            lambda: top1(train_linear_probes(*train, settings=SETTINGS, **shared)[4]),
        ),
        "one probe": (
            1,
            lambda: top1(train_linear_probes(*train, settings=[one], **shared)[0]),
        ),
        "one DataLoader probe": (
            1,
            lambda: top1(dataloader_probe(*train, num_classes=num_classes, setting=one)),
        ),
        "LogisticRegression": (1, partial(logistic, train, test)),
    }
    print(f"{num_images} x {width} features, {num_classes} classes, {EPOCHS} epochs\n")
    print(f"{'':26}{'heads':>6}{'CPU s':>9}{'s a head':>10}{'/ grid':>9}{'top-1':>8}")
    first: float | None = None
    for name, (heads, run) in rows.items():
        started = time.process_time()
        accuracy = run()
        seconds = time.process_time() - started
        first = first or seconds / heads
        ratio = f"{seconds / heads / first:.1f}x"
        print(
            f"{name:26}{heads:>6}{seconds:>9.2f}{seconds / heads:>10.3f}{ratio:>9}{accuracy:>8.1%}",
            flush=True,
        )


def draw(num_images: int, *, width: int, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Gaussian clusters that overlap: neither trivial nor hopeless."""
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    noise = torch.randn(num_images, width, generator=generator)
    return centres[labels] * 0.3 + noise, labels


def dataloader_probe(
    features: Tensor, labels: Tensor, *, num_classes: int, setting: SgdSetting
) -> LinearProbe:
    """The usual loop: single samples collated to batches, autograd, torch.optim."""
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(
        TensorDataset(features, labels), batch_size=BATCH_SIZE, shuffle=True, generator=generator
    )
    probe = LinearProbe(features.shape[1], num_classes, generator=generator)
    optimizer = torch.optim.SGD(probe.parameters(), lr=setting.lr, momentum=setting.momentum)
    total, step = EPOCHS * len(loader), 0
    for _ in range(EPOCHS):
        for batch, targets in loader:
            factor = cosine_with_warmup(step, total_steps=total, warmup_steps=len(loader))
            optimizer.param_groups[0]["lr"] = setting.lr * factor
            loss = nn.functional.cross_entropy(probe(batch), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return probe.eval()


def logistic(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """scikit-learn's, on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train[0].numpy())
    model = LogisticRegression(max_iter=1000)
    model.fit(scaler.transform(train[0].numpy()), train[1].numpy())
    return float(model.score(scaler.transform(test[0].numpy()), test[1].numpy()))
