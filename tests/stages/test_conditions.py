"""stages.conditions: images for generate.condition: image, nothing for the others."""

from stages.runtime.run import Run

from typing import Any

import pytest

from contradiff.config import parse
from contradiff.data.shard_info import ConditionInfo
from contradiff.data.shards import ShardIndex
from stages import conditions
from tests.settings import GENERATE


def call(run: Run, **changes: Any) -> ShardIndex[ConditionInfo]:
    size = {"samples_per_shard": 4, "compression": "none"}
    content = {"shard": size, "generate": GENERATE | changes}
    conditions.main(parse(conditions.Params, content, source="params.yaml"), run)
    return ShardIndex.read(conditions.CONDITIONS, ConditionInfo)


@pytest.mark.parametrize(("num_samples", "num_images"), [(3, 3), (5, 5), (100, 8)])
def test_images_are_stored_as_far_as_there_are_samples(
    trained_project: Run, num_samples: int, num_images: int
):
    index = call(trained_project, condition="image", num_samples=num_samples)
    assert index.num_samples("condition") == num_images


def test_other_conditions_write_the_same_constant(trained_project: Run):
    """So that generation is not run anew; and without the latents."""
    call(trained_project, condition="image")
    (trained_project.root / "build/latents").unlink()
    contents = []
    for condition, num_samples in (("noise", 5), ("class", 7)):
        index = call(trained_project, condition=condition, num_samples=num_samples)
        assert index.num_samples("condition") == 0
        [file] = conditions.CONDITIONS.iterdir()
        contents.append(file.read_bytes())
    assert contents[0] == contents[1]
