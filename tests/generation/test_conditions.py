"""A sample's condition does not depend on the batch in which the sample is generated."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from contradiff.data.shard_info import ConditionInfo
from contradiff.data.shards import ShardIndex, ShardParams
from contradiff.features.batches import CleanBatch, stored_batches
from contradiff.generation.class_table import ClassTable
from contradiff.generation.condition_images import condition_images, condition_records
from contradiff.generation.condition_shards import write_conditions
from contradiff.generation.conditions import (
    Conditioning,
    class_conditional,
    image_conditional,
    seeded_noise,
    unconditional,
)
from contradiff.method.model import ContraDiffModel


@pytest.fixture
def model(build_tiny: Callable[..., ContraDiffModel]) -> ContraDiffModel:
    return build_tiny()


@pytest.fixture
def images(tiny_data: Path) -> CleanBatch:
    """Read all eight validation images."""
    folders = tiny_data / "images", tiny_data / "latents"
    [images] = stored_batches(*folders, split="val", batch_size=8)
    return images


def store(data: Path, folder: Path, *, num_images: int) -> list[int]:
    progress: list[int] = []
    batches = stored_batches(data / "images", data / "latents", split="val", batch_size=5)
    write_conditions(
        folder,
        islice(condition_records(batches), num_images),
        params=ShardParams(samples_per_shard=3, compression="none"),
        on_progress=progress.append,
    )
    return progress


@pytest.fixture
def stored(tiny_data: Path, tmp_path: Path) -> Path:
    """Store all eight validation images in shards of three."""
    assert store(tiny_data, tmp_path, num_images=100) == [3, 3, 2]
    return tmp_path


@pytest.mark.parametrize("start", [0, 1, 3, 7, 8, 17])
def test_images_come_in_order_from_any_index_and_again(
    images: CleanBatch, stored: Path, start: int
):
    stored_images = islice(condition_images(stored, start=start), 18)
    for number, (image, latent) in enumerate(stored_images, start):
        assert torch.equal(latent[0], images.latents[number % 8])
        torch.testing.assert_close(image[0] / 127.5 - 1, images.pixels[number % 8])


def test_earlier_shards_are_not_read(stored: Path):
    first = stored / ShardIndex.read(stored, ConditionInfo).shards("condition")[0].name
    first.write_bytes(bytes(first.stat().st_size))
    assert len(list(islice(condition_images(stored, start=3), 5))) == 5
    with pytest.raises(ValueError, match=r"condition-00000\.tar: damaged"):
        list(islice(condition_images(stored, start=2), 1))


def test_no_images_are_said_to_be_none(tmp_path: Path):
    """To store no images, the folders of images and latents need not exist."""
    assert store(tmp_path / "nowhere", tmp_path, num_images=0) == []
    with pytest.raises(ValueError, match=r'no images; set generate\.condition to "image"'):
        next(condition_images(tmp_path, start=0))


@pytest.fixture
def table() -> ClassTable:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        table = ClassTable(num_classes=3, width=8, cross_attention_dim=16)
        torch.nn.init.normal_(table.to_tokens.weight)
    return table.eval()


def conditioned_on(
    kind: str, model: ContraDiffModel, folder: Path, table: ClassTable
) -> Conditioning:
    null = unconditional(model, seed=0)
    match kind:
        case "noise":
            return null
        case "class":
            return class_conditional(table)
        case _:
            return image_conditional(model, folder, null_tokens=null.null_tokens)


@pytest.mark.parametrize("kind", ["noise", "image", "class"])
@torch.no_grad()
def test_conditions_do_not_depend_on_the_batches(
    model: ContraDiffModel, stored: Path, table: ClassTable, kind: str
):
    """They do not depend on the order of calls either."""
    conditioning = conditioned_on(kind, model, stored, table)
    whole = conditioning.tokens(range(20))
    null = conditioning.null_tokens(range(20))
    for indices in (range(3), range(3, 7), range(15, 20), range(7), range(9, 10)):
        rows = slice(indices.start, indices.stop)
        torch.testing.assert_close(conditioning.tokens(indices), whole[rows])
        torch.testing.assert_close(conditioning.null_tokens(indices), null[rows])


@pytest.mark.parametrize("kind", ["pixels", "latents"])
@torch.no_grad()
def test_sample_i_is_conditioned_on_image_i(
    build_tiny: Callable[..., ContraDiffModel],
    images: CleanBatch,
    stored: Path,
    table: ClassTable,
    kind: str,
):
    """There are eight images, so sample 8 gets the first one again."""
    latents = kind == "latents"
    model = build_tiny(conditioner={"input": kind, "patch_size": 2 if latents else 8})
    seen = images.latents if latents else images.pixels
    expected = model.encode_condition(seen)[[*range(8), 0, 1]]
    conditioning = conditioned_on("image", model, stored, table)
    tokens = [conditioning.tokens(range(4)), conditioning.tokens(range(4, 10))]
    torch.testing.assert_close(torch.cat(tokens), expected)
    noise = seeded_noise(seen.shape[1:], seed=0, indices=range(8, 10), stream="condition")
    null = conditioning.null_tokens(range(8, 10))
    torch.testing.assert_close(null, model.encode_condition(noise))


@torch.no_grad()
def test_classes_come_in_turn(table: ClassTable):
    conditioning = class_conditional(table)
    assert torch.equal(conditioning.tokens(range(4, 9)), table(torch.tensor([1, 2, 0, 1, 2])))
    assert torch.equal(conditioning.null_tokens(range(2)), table(torch.tensor([3, 3])))
    assert conditioning.num_classes == 3


def test_seeded_noise_repeats_and_its_streams_differ():
    key: dict[str, Any] = {"seed": 5, "indices": range(2, 4), "stream": "latent"}
    noise, second = seeded_noise((4, 32, 32), **key)
    assert torch.equal(second, seeded_noise((4, 32, 32), **key | {"indices": range(3, 4)})[0])
    for change in ({"seed": 6}, {"indices": range(3, 4)}, {"stream": "condition"}):
        other = seeded_noise((4, 32, 32), **key | change)[0]
        # Of 4096 independent pairs, the correlation stays within five standard errors.
        assert abs(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]) < 5 / 64
    assert abs(noise.mean()) < 5 / 64
    assert abs(noise.std() - 1) < 5 / 64
