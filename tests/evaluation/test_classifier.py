"""It learns, is repeatable, and augments within bounds."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from contradiff.evaluation.classifier import augment, train_classifier

SETTINGS = {"num_classes": 3, "width": 8, "batch_size": 32, "lr": 0.01}


def coloured(n: int, *, seed: int, side: int = 16) -> tuple[Tensor, Tensor]:
    """Noise with one brighter channel, which is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=generator)
    images = torch.randint(0, 200, (n, 3, side, side), generator=generator)
    images[torch.arange(n), labels] += 55
    return images.to(torch.uint8), labels


def train(*, num_val: int = 50, side: int = 16, **changed):
    arguments = SETTINGS | {"epochs": 1, "seed": 0, "on_epoch": lambda _: None} | changed
    data = *coloured(192, seed=0, side=side), *coloured(num_val, seed=1, side=side)
    return train_classifier(*data, **arguments)


def test_learns_and_reports():
    losses = []
    classifier, accuracy = train(epochs=6, on_epoch=losses.append)
    images, labels = coloured(50, seed=1)
    with torch.no_grad():
        expected = (classifier(images)[1].argmax(1) == labels).double().mean()
    assert 0.9 < accuracy == pytest.approx(float(expected))
    assert not classifier.training
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_same_seed_same_weights_and_global_state_untouched():
    state = torch.random.get_rng_state()
    first, _ = train()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    second, _ = train()
    third, _ = train(seed=1)
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    assert not torch.equal(first.output.weight, third.output.weight)


def test_augment_is_padding_flip_and_crop():
    """Each result is one of the crops of the image, or its mirror image, padded by reflection."""
    images = torch.randint(0, 256, (40, 3, 6, 6), dtype=torch.uint8)
    moved = augment(images, max_shift=2, generator=torch.Generator().manual_seed(0))
    found = set()
    for image, result in zip(images, moved, strict=True):
        padded = F.pad(image[None].float(), (2, 2, 2, 2), mode="reflect")[0].to(torch.uint8)
        crops = {(y, x): padded[:, y : y + 6, x : x + 6] for y in range(5) for x in range(5)}
        ways = [(0, lambda crop: crop), (1, lambda crop: crop.flip(2))]
        choices = {(*at, n): way(crop) for at, crop in crops.items() for n, way in ways}
        matches = [choice for choice, c in choices.items() if torch.equal(c, result)]
        assert len(matches) == 1
        found.update(matches)
    assert {flip for _, _, flip in found} == {0, 1}
    assert {y for y, _, _ in found} == {x for _, x, _ in found} == {0, 1, 2, 3, 4}


def test_refusals():
    refused = {"batch_size": "extractor.batch_size: 500", "num_val": "data.num_val"}
    refused["side"] = "data.image_size: 15"
    for (name, message), value in zip(refused.items(), (500, 0, 15), strict=True):
        with pytest.raises(ValueError, match=message):
            train(**{name: value})
