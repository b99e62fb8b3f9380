"""What is stored comes back as it was."""

import numpy as np
import pytest
import torch

from contradiff.data.latents import StoredLatents
from contradiff.data.shards import array_from_bytes
from contradiff.data.transforms import Crop

CROPS = (Crop(2, 0, 36, 36, mirrored=False), Crop(1, 2, 3, 4, mirrored=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_record_round_trip(dtype: str):
    """NumPy has no bfloat16: its bits are stored, and its values are read as float32."""
    rounded = torch.randn(2, 8, 4, 4).to(getattr(torch, dtype))
    values = rounded if dtype == "float16" else rounded.float()
    item = StoredLatents("n01_5", values.numpy(), CROPS)
    record = item.to_record()
    bits = array_from_bytes(record["moments.npy"])
    assert bits.nbytes == 2 * rounded.numel()
    assert torch.from_numpy(bits).view(rounded.dtype).equal(rounded)
    read = StoredLatents.of_record(record)
    assert (read.key, read.crops, read.moments.dtype) == ("n01_5", CROPS, item.moments.dtype)
    np.testing.assert_array_equal(read.moments, item.moments)
