"""It learns, is repeatable, and augments within bounds."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from contradiff.evaluation.classifier import ResidualClassifier, augment, train_classifier


def coloured(n: int, *, seed: int, side: int = 16) -> tuple[Tensor, Tensor]:
    """Noise with one brighter channel, which is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    images = torch.randint(0, 200, (n, 3, side, side), generator=generator)
    images[torch.arange(n), labels] += 55
    return images.to(torch.uint8), labels


def train(**changed):
    images, labels = coloured(192, seed=0)
    val_images, val_labels = coloured(50, seed=1)
    arguments = {
        "images": images,
        "labels": labels,
        "val_images": val_images,
        "val_labels": val_labels,
        "num_classes": 3,
        "width": 8,
        "epochs": 6,
        "batch_size": 32,
        "lr": 0.01,
        "seed": 0,
        "on_progress": lambda _step, _values: None,
    }
    return train_classifier(**(arguments | changed))


def test_learns_and_reports():
    reports = []
    classifier, accuracy = train(on_progress=lambda step, values: reports.append((step, values)))
    assert accuracy > 0.9
    assert not classifier.training
    assert [step for step, _ in reports] == [6, 12, 18, 24, 30, 36]
    assert set(reports[0][1]) == {"step", "lr", "epoch", "loss", "train_accuracy"}
    assert reports[-1][1]["loss"] < reports[0][1]["loss"]


def test_val_accuracy_is_of_every_val_image():
    classifier, accuracy = train(epochs=1)
    images, labels = coloured(50, seed=1)
    with torch.no_grad():
        expected = (classifier(images)[1].argmax(1) == labels).double().mean()
    assert accuracy == pytest.approx(float(expected))


def test_same_seed_same_weights_and_global_state_untouched():
    state = torch.random.get_rng_state()
    first, _ = train(epochs=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    second, _ = train(epochs=1)
    third, _ = train(epochs=1, seed=1)
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    assert not torch.equal(first.output.weight, third.output.weight)


def test_shapes_and_the_linear_last_layer():
    classifier = ResidualClassifier(width=10, num_classes=5).eval()
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    features, logits = classifier(images)
    assert features.shape == (4, 20)
    assert logits.shape == (4, 5)
    expected = F.linear(features, classifier.output.weight, classifier.output.bias)
    torch.testing.assert_close(logits, expected)


def test_augment_is_padding_flip_and_crop():
    """Each result is one of the crops of the image, or its mirror image, padded by reflection."""
    images = torch.randint(0, 256, (40, 3, 6, 6), dtype=torch.uint8)
    moved = augment(images, max_shift=2, generator=torch.Generator().manual_seed(0))
    found = set()
    for image, result in zip(images, moved, strict=True):
        padded = F.pad(image[None].float(), (2, 2, 2, 2), mode="reflect")[0].to(torch.uint8)
        crops = {(y, x): padded[:, y : y + 6, x : x + 6] for y in range(5) for x in range(5)}
        choices = {(*at, 0): crop for at, crop in crops.items()}
        choices |= {(*at, 1): crop.flip(2) for at, crop in crops.items()}
        matches = [choice for choice, c in choices.items() if torch.equal(c, result)]
        assert len(matches) == 1
        found.update(matches)
    assert {flip for _, _, flip in found} == {0, 1}
    assert {y for y, _, _ in found} == {x for _, x, _ in found} == {0, 1, 2, 3, 4}


def test_refusals():
    images, labels = coloured(40, seed=0)
    with pytest.raises(ValueError, match=r"extractor.batch_size is 500"):
        train(batch_size=500)
    with pytest.raises(ValueError, match=r"data.num_val"):
        train(val_images=images[:0], val_labels=labels[:0])
    images, labels = coloured(40, seed=0, side=15)
    with pytest.raises(ValueError, match=r"data.image_size is 15"):
        train(images=images, labels=labels, val_images=images, val_labels=labels)
