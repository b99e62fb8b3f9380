"""Features that are constant or not finite are named, with their effective rank."""

import pytest
import torch
from torch import Tensor

from contradiff.features.spread import MAX_ROWS, check_spread, effective_rank

DRAWN = torch.randn(2 * MAX_ROWS, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("features", "fault"),
    [
        (torch.ones(5, 3), "all 5 images have the same feature, so its effective rank is 0"),
        (torch.zeros(5, 3), "all 5 images have the same feature"),
        (1000 + 1e-4 * DRAWN[:9], "all 9 images have the same feature"),  # only rounding differs
        (DRAWN[:3].masked_fill(torch.eye(3, 4).bool(), torch.nan), "3 of 3 images are not finite"),
        (DRAWN[:3].clamp(max=0) / 0.0, "images are not finite"),
    ],
)
def test_features_that_tell_nothing_are_named(features: Tensor, fault: str):
    with pytest.raises(ValueError, match=rf"^h: .*{fault}.*lower pretrain\.lr"):
        check_spread(features, name="h")


def test_the_rank_is_that_of_the_first_rows():
    assert check_spread(DRAWN, name="h") == effective_rank(DRAWN[:MAX_ROWS]) > 3.9
    assert check_spread(DRAWN[:1], name="h") == 0  # one image has no spread
    assert check_spread(DRAWN.half(), name="h") == pytest.approx(effective_rank(DRAWN), 0.1)
