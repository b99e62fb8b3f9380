"""Scores must equal those of plain definitions and of scikit-learn's leave-one-out vote."""

import numpy as np
import pytest

from contradiff.downstream import separability as module
from contradiff.downstream.separability import Separability, choose_images, embed, separability


def clusters(*, num_images: int, num_classes: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, num_classes, num_images) * 3 + 5  # labels start above 0 and have gaps
    centres = rng.normal(size=(3 * num_classes + 5, 8))
    return (centres[labels] + spread * rng.normal(size=(num_images, 8))), labels


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("num_neighbours", [1, 5, 10])
def test_the_vote_equals_leaving_each_image_out(spread: float, num_neighbours: int):
    from sklearn.model_selection import LeaveOneOut, cross_val_score
    from sklearn.neighbors import KNeighborsClassifier

    features, labels = clusters(num_images=70, num_classes=6, spread=spread)
    found = separability(features, labels, num_neighbours=num_neighbours)
    voter = KNeighborsClassifier(num_neighbours, metric="cosine", algorithm="brute")
    expected = cross_val_score(voter, features, labels, cv=LeaveOneOut()).mean()
    assert found.knn == pytest.approx(expected)
    # the lengths of features change neither the vote nor the silhouette
    scaled = features * np.random.default_rng(0).uniform(0.1, 10, (70, 1))
    again = separability(scaled, labels, num_neighbours=num_neighbours)
    assert (again.knn, again.silhouette) == (found.knn, pytest.approx(found.silhouette))


def test_extremes():
    labels = np.repeat(np.arange(3), 4)
    assert separability(np.eye(3)[labels] * 7, labels, num_neighbours=3) == Separability(1.0, 1.0)
    # num_neighbours may be larger than the number of images
    assert separability(np.eye(3)[labels], labels, num_neighbours=50).knn == 0.0
    assert separability(np.eye(4), np.arange(4), num_neighbours=1).silhouette is None
    assert separability(np.eye(4), np.zeros(4, int), num_neighbours=1) == Separability(1.0, None)
    zero_row = np.eye(4) * [1, 1, 1, 0]
    for bad in (np.ones((4, 2)), np.zeros((4, 2)), np.full((4, 2), np.nan), zero_row):
        with pytest.raises(ValueError, match=r"^build/pretrain: .*lower pretrain\.lr"):
            separability(bad, np.arange(4), num_neighbours=1)


def test_choice_of_images():
    labels = [index % 30 for index in range(900)]
    fifty = module.SeparabilityParams(num_images=50, num_classes=5, num_neighbours=1)
    chosen = choose_images(labels, fifty, seed=0)
    assert chosen == sorted(set(chosen))
    assert (len(chosen), len({labels[index] for index in chosen})) == (50, 5)
    assert chosen == choose_images(labels, fifty, seed=0)
    assert chosen != choose_images(labels, fifty, seed=1)
    every = fifty.model_copy(update={"num_images": 900, "num_classes": 30})
    assert choose_images(labels, every, seed=0) == list(range(900))
    with pytest.raises(ValueError, match="3 validation images are too few"):
        choose_images([0, 1, 2], fifty, seed=0)


def test_embedding_is_deterministic_and_keeps_groups():
    features, labels = clusters(num_images=40, num_classes=3, spread=0.2)
    positions = embed(features, seed=0)
    assert np.array_equal(positions, embed(features, seed=0))
    within = np.mean([positions[labels == c].std(axis=0).mean() for c in np.unique(labels)])
    assert within < 0.6 * positions.std(axis=0).mean()
