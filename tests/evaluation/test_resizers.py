"""Each against the library that it is named after."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from contradiff.evaluation.resizers import inception_input, resize_clean, resize_tensorflow

SIZES = [(32, 32), (256, 256), (299, 299), (700, 400)]


def pictures(n: int, *, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_clean_equals_clean_fids(height: int, width: int):
    from cleanfid.resize import build_resizer

    image = pictures(1, height=height, width=width)
    expected = build_resizer("clean")(image[0].permute(1, 2, 0).numpy())
    ours = resize_clean(image, side=299)[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - expected).max() < 0.01  # of 255 grey levels, on noise: the worst case


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_tensorflow_equals_torch_fidelitys(height: int, width: int):
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x,
    )

    images = pictures(2, height=height, width=width)
    expected = interpolate_bilinear_2d_like_tensorflow1x(
        images.float(), size=(299, 299), align_corners=False
    )
    torch.testing.assert_close(resize_tensorflow(images, side=299), expected, rtol=0, atol=1e-3)


def test_tensorflow_by_hand():
    """Pixel i of the result reads i * in / out: no half pixel, the border repeated."""
    image = torch.tensor([[0, 40], [80, 120]], dtype=torch.uint8).expand(1, 3, 2, 2)
    rows = [[0, 20, 40, 40], [40, 60, 80, 80], [80, 100, 120, 120], [80, 100, 120, 120]]
    expected = torch.tensor(rows, dtype=torch.float32).expand(1, 3, 4, 4)
    torch.testing.assert_close(resize_tensorflow(image, side=4), expected)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pytorch_equals_pytorch_fids_lines(height: int, width: int):
    images = pictures(2, height=height, width=width)
    unit = F.interpolate(images / 255, size=(299, 299), mode="bilinear", align_corners=False)
    ours = inception_input(images, resizer="legacy_pytorch")
    torch.testing.assert_close(ours, 2 * unit - 1, rtol=0, atol=1e-5)


def test_resizers_differ():
    """Or a score's name would not matter."""
    images = pictures(1, height=64, width=64)
    clean, tensorflow, pytorch = (
        inception_input(images, resizer=name)
        for name in ("clean", "legacy_tensorflow", "legacy_pytorch")
    )
    assert (clean - tensorflow).abs().max() > 0.1
    assert (pytorch - tensorflow).abs().max() > 0.1


def test_the_classifiers_is_refused():
    with pytest.raises(ValueError, match=r"extractor.resizers: none is none of Inception's"):
        inception_input(pictures(1, height=8, width=8), resizer="none")
