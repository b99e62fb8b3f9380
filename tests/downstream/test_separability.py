"""Against scikit-learn; base features against an untrained model's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from contradiff.downstream.separability import (
    Panel,
    Separability,
    base_of,
    choose_images,
    embed,
    labels_of,
    plot_panels,
    separability,
    separability_metrics,
)
from contradiff.features.extraction import CleanBatch, extract, maps_of, stored_batches
from contradiff.method.checkpoint import Architecture
from contradiff.method.model import ContraDiff, build_model
from tests.settings import features_params

CPU = torch.device("cpu")
FEATURES = features_params()


def clusters(*, num_images: int, num_classes: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, num_images) * 3 + 5  # neither from 0 nor without gaps
    centres = rng.normal(size=(3 * num_classes + 5, 8))
    return (centres[labels] + spread * rng.normal(size=(num_images, 8))), labels


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("num_neighbours", [1, 5, 10])
def test_both_numbers_equal_scikit_learn(spread: float, num_neighbours: int):
    from sklearn.metrics import silhouette_score
    from sklearn.model_selection import LeaveOneOut, cross_val_score
    from sklearn.neighbors import KNeighborsClassifier

    features, labels = clusters(num_images=70, num_classes=6, spread=spread)
    found = separability(features, labels, num_neighbours=num_neighbours)
    voter = KNeighborsClassifier(num_neighbours, metric="cosine", algorithm="brute")
    expected = cross_val_score(voter, features, labels, cv=LeaveOneOut()).mean()
    assert found.knn == pytest.approx(expected)
    expected = silhouette_score(features, labels, metric="cosine")
    assert found.silhouette == pytest.approx(expected, abs=1e-12)


def test_silhouette_equals_its_definition_with_lone_and_equal_images():
    features, labels = clusters(num_images=12, num_classes=3, spread=1.0)
    features[3] = 2 * features[4]  # no distance at all
    labels[0] = 99  # alone in its class: 0 by definition
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    values = []
    for i in range(12):
        mean = {
            c: np.mean([1 - units[i] @ units[j] for j in range(12) if j != i and labels[j] == c])
            for c in set(labels.tolist())
            if any(j != i and labels[j] == c for j in range(12))
        }
        if labels[i] not in mean:
            values.append(0.0)
            continue
        a = mean.pop(labels[i])
        b = min(mean.values())
        values.append((b - a) / max(a, b))
    found = separability(features, labels, num_neighbours=3).silhouette
    assert found == pytest.approx(np.mean(values), abs=1e-9)


def test_extremes():
    labels = np.repeat(np.arange(3), 4)
    apart = separability(np.eye(3)[labels] * 7, labels, num_neighbours=3)
    assert apart == Separability(1.0, 1.0)
    # more neighbours than there are images
    assert separability(np.eye(3)[labels], labels, num_neighbours=50).knn == 0.0
    assert separability(np.eye(4), np.arange(4), num_neighbours=1).silhouette is None
    assert separability(np.eye(4), np.zeros(4, int), num_neighbours=1) == Separability(1.0, None)
    for bad in (np.zeros((4, 2)), np.full((4, 2), np.nan), np.full((4, 2), np.inf)):
        with pytest.raises(ValueError, match=r"^build/pretrain: .*lower pretrain\.lr"):
            separability(bad, np.arange(4), num_neighbours=1)


def test_choice_of_images():
    labels = [index % 30 for index in range(900)]
    chosen = choose_images(labels, num_images=50, num_classes=5, seed=0)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 50
    assert len({labels[index] for index in chosen}) == 5
    assert chosen == choose_images(labels, num_images=50, num_classes=5, seed=0)
    assert chosen != choose_images(labels, num_images=50, num_classes=5, seed=1)
    assert choose_images(labels, num_images=900, num_classes=30, seed=0) == list(range(900))
    with pytest.raises(ValueError, match="3 validation images are too few"):
        choose_images([0, 1, 2], num_images=9, num_classes=9, seed=0)


def test_chosen_batches_are_those_images(tiny_data: Path):
    folders = tiny_data / "images", tiny_data / "latents"
    (whole,) = stored_batches(*folders, split="train", batch_size=24)
    assert labels_of(folders[0], split="train") == whole.labels.tolist()
    chosen = [0, 1, 5, 6, 13, 22, 23]
    batches = list(stored_batches(*folders, split="train", batch_size=3, chosen=chosen))
    assert [batch.indices for batch in batches] == [(0, 1, 2), (3, 4, 5), (6,)]
    assert torch.cat([batch.latents for batch in batches]).equal(whole.latents[chosen])
    assert torch.cat([batch.pixels for batch in batches]).equal(whole.pixels[chosen])
    assert torch.cat([batch.labels for batch in batches]).equal(whole.labels[chosen])
    keys = tuple(key for batch in batches for key in batch.keys)
    assert keys == tuple(whole.keys[index] for index in chosen)


def val_batch(tiny_data: Path) -> CleanBatch:
    (batch,) = stored_batches(
        tiny_data / "images", tiny_data / "latents", split="val", batch_size=8
    )
    return batch


CHANGED_HEAD = {"self_conditioning": True, "block": "mid+up.1"}


@pytest.mark.parametrize(
    ("head", "noising"), [({}, "direct"), (CHANGED_HEAD, "direct"), (CHANGED_HEAD, "ddim_chain")]
)
def test_the_base_is_the_model_before_training(  # noqa: PLR0917
    build_tiny: Callable[..., ContraDiff],
    tiny_base: Path,
    tiny_params: dict[str, Any],
    tiny_data: Path,
    head: dict[str, Any],
    noising: str,
):
    model = build_tiny(head=head)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shapes = Architecture.model_validate(tiny_params)
    untrained = build_model(
        tiny_base,
        lora=shapes.lora,
        conditioner=shapes.conditioner,
        head=shapes.head,
        image_size=32,
        seed=1,
    ).eval()

    params = FEATURES.model_copy(update={"noising": noising})
    batch = val_batch(tiny_data)
    base = base_of(model)
    expected = maps_of(untrained, batch, params=params, seed=0, device=CPU)
    assert maps_of(base, batch, params=params, seed=0, device=CPU).equal(expected)
    pooled = extract(
        base, [batch], params=params, pool="mean", seed=0, device=CPU, on_progress=lambda _: None
    )
    assert pooled.features.equal(expected.mean(dim=(3, 4)).flatten(1))
    # and the trained model is as it was
    assert all(model.state_dict()[name].equal(before[name]) for name in before)
    own = maps_of(model, batch, params=params, seed=0, device=CPU)
    assert own.shape != expected.shape or (own - expected).abs().max() > 1e-3


def test_figure_is_deterministic_and_shows_both():
    import io

    from PIL import Image

    features, labels = clusters(num_images=40, num_classes=3, spread=0.2)
    positions = embed(features, seed=0)
    assert np.array_equal(positions, embed(features, seed=0))
    within = np.mean([positions[labels == c].std(axis=0).mean() for c in np.unique(labels)])
    assert within < 0.6 * positions.std(axis=0).mean()
    found = Separability(0.5, 0.25)
    panels = [Panel("left", positions, found), Panel("right", positions[::-1].copy(), found)]
    png = plot_panels(panels, labels, dark=False)
    assert plot_panels(panels, labels, dark=False) == png
    assert b"matplotlib" not in png.lower()
    assert plot_panels(panels[::-1], labels, dark=False) != png
    light, dark = (
        np.asarray(Image.open(io.BytesIO(content)).convert("L"))
        for content in (png, plot_panels(panels, labels, dark=True))
    )
    assert light.shape[1] > 1.7 * light.shape[0]
    assert np.median(light) > 250
    assert np.median(dark) < 40


def test_metrics():
    found = {"contradiff": Separability(0.9, 0.3), "base": Separability(0.8, None)}
    assert separability_metrics(found, num_images=100, num_classes=7, num_neighbours=10) == {
        "contradiff": {"knn": 0.9, "silhouette": 0.3},
        "base": {"knn": 0.8, "silhouette": None},
        "num_images": 100,
        "num_classes": 7,
        "num_neighbours": 10,
    }
