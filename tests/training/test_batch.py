"""Which views of an image are chosen, and the random numbers of a step."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from contradiff.data.latents import StoredLatents
from contradiff.data.pairs import PairedShards
from contradiff.data.shards import ShardIndex, read_images, read_split, write_split
from contradiff.data.transforms import apply_crop, decode
from contradiff.method.model import ContraDiffModel
from contradiff.method.noise import timestep_probabilities
from contradiff.training.batch import ViewChooser, draw_batch
from contradiff.training.recipe import TrainingRecipe

NUM_IMAGES = 24
Views = dict[bytes, tuple[str, int]]
Build = Callable[..., ContraDiffModel]
Recipe = Callable[..., TrainingRecipe]
Draw = Callable[..., dict[str, Tensor]]


def chooser_of(pairs: PairedShards, **changes: Any) -> ViewChooser:
    settings = {"latent_views": "two", "cond_view": "same", "condition": "pixels", "seed": 0}
    return ViewChooser(pairs, **(settings | changes))


def records(pairs: PairedShards, **changes: bool) -> list[Any]:
    return [pair for shard in range(pairs.num_shards) for pair in pairs.read(shard, **changes)]


def chosen(pairs: PairedShards, *, epochs: int = 1, **changes: Any) -> dict[str, Tensor]:
    """Return all images as one batch, in order. Several epochs are joined."""
    chooser, items = chooser_of(pairs, **changes), records(pairs)
    batches = [chooser(epoch, items) for epoch in range(epochs)]
    axes = {name: 0 if name == "labels" else 1 for name in batches[0]}
    return {name: torch.cat([b[name] for b in batches], dim=axes[name]) for name in axes}


@pytest.fixture(scope="module")
def stored(tiny_data: Path) -> dict[str, StoredLatents]:
    items = map(StoredLatents.of_record, read_split(tiny_data / "latents", "train"))
    return {item.key: item for item in items}


@pytest.fixture(scope="module")
def views(stored: dict[str, StoredLatents]) -> Views:
    """Return a dict from the bytes of moments to the image and the view they belong to."""
    items = stored.items()
    found = {m.tobytes(): (key, view) for key, i in items for view, m in enumerate(i.moments)}
    assert len(found) == 3 * NUM_IMAGES
    return found


def shown(moments: Tensor, views: Views) -> list[tuple[tuple[str, int], tuple[str, int]]]:
    """Return the image and the view of both moments in each pair."""
    first, second = moments.numpy()
    return [(views[a.tobytes()], views[b.tobytes()]) for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize("condition", ["pixels", "latents", "labels"])
def test_a_batch_can_be_pinned(pairs: PairedShards, condition: str):
    """Torch copies a tensor to pinned memory stride by stride, and refuses one that overlaps."""
    batch = chooser_of(pairs, condition=condition)(0, records(pairs)[:3])
    for tensor in batch.values():
        torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)


@pytest.mark.parametrize("cond_view", ["same", "crop", "noise"])
def test_two_latent_views_are_two_views_of_one_image(
    pairs: PairedShards, views: Views, cond_view: str
):
    batch = chosen(pairs, epochs=3, cond_view=cond_view)
    assert batch["moments"].shape == (2, 72, 8, 8, 8)
    assert batch["moments"].dtype == torch.float16
    assert batch["conditions"].shape == (2 if cond_view == "crop" else 1, 72, 3, 32, 32)
    assert batch["conditions"].dtype == torch.uint8
    if cond_view == "crop":  # every condition is a different crop
        crops = {crop.numpy().tobytes() for crop in batch["conditions"].flatten(0, 1)}
        assert len(crops) == 2 * 72
    both = shown(batch["moments"], views)
    assert all(a[0] == b[0] for a, b in both)
    # the centre crop and one of two random crops; each pair occurs 36 times on average
    drawn = [(a[1], b[1]) for a, b in both]
    assert set(drawn) == {(0, 1), (0, 2)}
    assert 18 < drawn.count((0, 1)) < 54


def test_same_latent_view_is_shown_twice(pairs: PairedShards, views: Views):
    both = shown(chosen(pairs, epochs=3, latent_views="same")["moments"], views)
    assert all(a == b for a, b in both)
    assert {a[1] for a, _ in both} == {0, 1, 2}


def test_choices_depend_on_seed_epoch_and_image_alone(pairs: PairedShards):
    items, changes = records(pairs), {"cond_view": "crop"}
    whole, other = (chooser_of(pairs, **changes, seed=seed)(1, items) for seed in (0, 1))
    single = chooser_of(pairs, **changes)(1, [items[5]])
    for name, tensor in whole.items():
        assert single[name][:, 0].equal(tensor[:, 5])
        assert not other[name].equal(tensor)
        assert not chooser_of(pairs, **changes)(2, items)[name].equal(tensor)


@pytest.mark.parametrize("latent_views", ["same", "two"])
@pytest.mark.parametrize("cond_view", ["same", "noise"])
def test_same_condition_is_the_first_views_crop(
    pairs: PairedShards,
    views: Views,
    stored: dict[str, StoredLatents],
    *,
    latent_views: str,
    cond_view: str,
):
    images = {image.key: image.image for image in read_images(pairs.images, "train")}
    batch = chosen(pairs, latent_views=latent_views, cond_view=cond_view)
    for index, ((key, view), _) in enumerate(shown(batch["moments"], views)):
        crop = apply_crop(decode(images[key], name=key), stored[key].crops[view], size=32)
        for condition in batch["conditions"][:, index]:
            assert condition.equal(crop)


@pytest.mark.parametrize("cond_view", ["same", "crop"])
def test_latent_conditions_are_stored_views_and_need_no_images(
    pairs: PairedShards, views: Views, cond_view: str
):
    chooser = chooser_of(pairs, condition="latents", cond_view=cond_view)
    drawn: list[tuple[int, int, int]] = []
    for epoch in range(3):
        batch = chooser(epoch, records(pairs, with_images=False))
        conditions = shown(batch["condition_moments"], views)
        for (a, _), (c, d) in zip(shown(batch["moments"], views), conditions, strict=True):
            assert a[0] == c[0] == d[0]
            drawn.append((a[1], c[1], d[1]))
    if cond_view == "same":
        assert set(drawn) == {(0, 0, 0)}
    else:
        # 72 draws, independent of the view and of each other
        assert {(c, d) for _, c, d in drawn} == {(i, j) for i in range(3) for j in range(3)}


def test_labels_are_those_of_the_images(pairs: PairedShards, views: Views):
    labels = {image.key: image.label for image in read_images(pairs.images, "train")}
    batch = chosen(pairs, condition="labels")
    keys = [first[0] for first, _ in shown(batch["moments"], views)]
    assert batch["labels"].tolist() == [labels[key] for key in keys]
    assert set(batch) == {"moments", "labels"}


@pytest.mark.parametrize("latent_views", ["same", "two"])
def test_mirrored_views_are_drawn_as_often_as_the_others(
    stored: dict[str, StoredLatents], pairs: PairedShards, tmp_path: Path, latent_views: str
):
    """Moments are replaced by numbers: views 0 to 2, and their mirror images 3 to 5."""
    moments = np.stack([np.full((8, 8, 8), view, np.float16) for view in range(6)])
    marked = [StoredLatents(key, moments, i.crops * 2).to_record() for key, i in stored.items()]
    shards = write_split(tmp_path, "train", marked, samples_per_shard=6, compression="none")
    info = pairs.latent_index.info.model_copy(update={"flips": True})
    ShardIndex({"train": shards}, info).write(tmp_path)
    flipped = PairedShards.open(pairs.images, tmp_path, split="train")
    moments = chosen(flipped, epochs=6, latent_views=latent_views)["moments"]
    drawn = [(int(a), int(b)) for a, b in moments[:, :, 0, 0, 0].T]
    assert len(drawn) == 144
    if latent_views == "same":
        expected = {(view, view) for view in range(6)}
    else:
        expected = {(a, b) for a in (0, 3) for b in (1, 2, 4, 5)}
    assert set(drawn) == expected
    # A pair occurs 24 or 18 times on average, with a standard deviation of 4.5 or 4.
    assert min(drawn.count(pair) for pair in expected) > 6


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"latent_views": "two"}, r'loss\.latent_views: "two"'),
        ({"latent_views": "same", "cond_view": "crop", "condition": "latents"}, "conditioner.cond"),
    ],
)
def test_two_views_of_one_are_refused(pairs: PairedShards, changes: dict[str, str], key: str):
    info = pairs.latent_index.info.model_copy(update={"views": 1})
    one_view = replace(pairs, latent_index=replace(pairs.latent_index, info=info))
    with pytest.raises(ValueError, match=rf"^{key}.* set latents\.views to 2"):
        chooser_of(one_view, **changes)
    chooser_of(one_view, latent_views="same", cond_view="crop", condition="pixels")


@pytest.fixture
def draw(build_tiny: Build, pairs: PairedShards, recipe_of: Recipe) -> Draw:
    """Draw several batches and stack each field. Keywords: processes, changes of sections."""
    model = build_tiny()

    def run(
        *, num_batches: int = 4, rank: int = 0, world_size: int = 1, **changes: dict[str, Any]
    ) -> dict[str, Tensor]:
        recipe = recipe_of(**changes)
        views, cond_view = recipe.loss.latent_views, recipe.conditioner.cond_view
        chooser = chooser_of(pairs, latent_views=views, cond_view=cond_view)
        mine = records(pairs)[rank * 12 // world_size : (rank + 1) * 12 // world_size]
        alphas, schedule = model.schedule.alphas_cumprod, recipe.noise.schedule
        process = {"process_index": rank, "num_processes": world_size}
        settings = {
            "model": model,
            "recipe": recipe,
            "probabilities": timestep_probabilities(alphas, schedule=schedule),
            "scaling_factor": 0.5,
            "accelerator": SimpleNamespace(device=torch.device("cpu"), **process),
        }
        numbers = range(num_batches)
        batches = [asdict(draw_batch(chooser(0, mine), number=n, **settings)) for n in numbers]
        return {name: torch.stack([batch[name] for batch in batches]) for name in batches[0]}

    return run


def test_every_image_view_and_level_has_its_own_random_numbers(draw: Draw):
    seen = draw(conditioner={"drop": 0.4, "cond_view": "crop"})
    dropped = seen["dropped"]  # (batches, views, images)
    assert dropped.shape == (4, 2, 12)
    assert dropped.float().mean() == pytest.approx(0.4, abs=0.15)
    assert (dropped.any(-1) & ~dropped.all(-1)).all()  # in each view, some but not all
    assert (dropped[:, 0] != dropped[:, 1]).any()

    noises = {"condition_noise": 2, "noise": 3}  # number of axes before the axis of images
    for name, axes in noises.items():
        noise = seen[name].flatten(0, axes)
        assert noise.mean() == pytest.approx(0.0, abs=0.02)
        assert noise.std() == pytest.approx(1.0, abs=0.02)
        assert (noise.abs() > 2).float().mean() == pytest.approx(0.0455, abs=0.005)
        assert (noise.flatten(1).corrcoef() - torch.eye(len(noise))).abs().max() < 0.4, name
    timesteps = seen["timesteps"].flatten(0, 2)
    assert len(timesteps.unique(dim=0)) == len(timesteps) == 24


@pytest.mark.parametrize("latent_views", ["same", "two"])
def test_views_share_latents_if_asked_to_and_noise_alone_conditions_the_second(
    draw: Draw, latent_views: str
):
    conditioner = {"cond_view": "noise", "drop": 0.3}
    seen = draw(loss={"latent_views": latent_views}, conditioner=conditioner)
    shared = (seen["latents"][:, 0] == seen["latents"][:, 1]).flatten(2).all(-1)
    assert shared.all() if latent_views == "same" else not shared.any()
    first, second = seen["dropped"].unbind(1)
    assert second.all()
    assert first.float().mean() == pytest.approx(0.3, abs=0.2)


def test_with_noise_both_only_reconstruction_sees_an_image(draw: Draw):
    """Each view has its own noise, so that no shared noise marks an image."""
    seen = draw(conditioner={"cond_view": "noise_both", "drop": 0.3})
    first, *others = seen["dropped"].unbind(1)
    assert first.float().mean() == pytest.approx(0.3, abs=0.2)
    assert len(others) == 2
    assert all(dropped.all() for dropped in others)
    noise = seen["condition_noise"].flatten(0, 2).flatten(1)
    assert (noise.corrcoef() - torch.eye(len(noise))).abs().max() < 0.4


@pytest.mark.parametrize(("mix", "shares"), [(0.0, (0.017, 0.017)), (0.5, (0.158, 0.017))])
def test_uniform_draws_are_those_of_reconstruction(
    draw: Draw, mix: float, shares: tuple[float, float]
):
    """`shares` are of timesteps above 700 in views 1 and 2. Only view 1 is reconstructed."""
    seen = draw(num_batches=8, noise={"uniform_mix": mix}, loss={"recon_passes": 3})
    late = (seen["timesteps"] > 700).float().mean(dim=(0, 2, 3))
    assert late.tolist() == pytest.approx(shares, abs=0.09)


@pytest.mark.parametrize("cond_view", ["same", "crop"])
def test_two_processes_draw_the_batches_of_one(draw: Draw, cond_view: str):
    changes = {"conditioner": {"cond_view": cond_view}}
    whole = draw(**changes)
    halves = [draw(rank=rank, world_size=2, **changes) for rank in range(2)]
    for name, tensor in whole.items():
        # The axis of images: after batches and views, and after levels if there are any.
        axis = 3 if name in ("timesteps", "noise") else 2
        assert torch.cat([half[name] for half in halves], dim=axis).equal(tensor), name
