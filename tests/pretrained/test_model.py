"""A user's calls give the pipeline's own numbers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from contradiff.base.vae import decode_latents
from contradiff.data.png import encode_png
from contradiff.data.shards import read_images
from contradiff.data.transforms import decode
from contradiff.features.cache import FeatureCache, ModelFolders
from contradiff.pretrained.folder import Parts
from contradiff.pretrained.model import ContraDiff
from contradiff.pretrained.project import export
from stages import features, probe
from tests.pretrained.conftest import copy_project, run_stage

NAME = "attention:mid@401-201-101"


@pytest.fixture(scope="module")
def model(parts: Parts) -> ContraDiff:
    return ContraDiff(parts, device="cpu")


@pytest.fixture(scope="module")
def files(project: Path) -> list[Path]:
    """The validation images as files."""
    folder = project / "val"
    folder.mkdir()
    stored = list(read_images(project / "build/shards", "val"))
    for sample in stored:
        (folder / f"{sample.key}.png").write_bytes(sample.image)
    return [folder / f"{sample.key}.png" for sample in stored]


@pytest.fixture(scope="module")
def cache(project: Path) -> FeatureCache:
    build = project / "build"
    return FeatureCache.open(
        build / "features", ModelFolders(build / "pretrain", build / "base", project)
    )


def test_features_are_those_of_the_cache(model: ContraDiff, files: list[Path], cache: FeatureCache):
    """By index, and in whatever form an image comes."""
    expected = cache.column("val", NAME).float()
    h = model.features(files)
    assert h.shape == (8, model.width)
    torch.testing.assert_close(h, expected, atol=2e-3, rtol=2e-3)
    opened = [Image.open(file) for file in files]
    forms: list[Any] = [opened, [np.asarray(image.convert("RGB")) for image in opened]]
    forms.append([decode(file.read_bytes(), name="") for file in files])
    forms.append(torch.stack(forms[-1]))
    forms.append([str(file) for file in files])
    for form in forms:
        assert model.features(form).equal(h)
    some = model.features(files[5:2:-1], indices=[5, 4, 3], batch_size=2)
    torch.testing.assert_close(some, expected[[5, 4, 3]], atol=2e-3, rtol=2e-3)
    assert model.features(files[5]).shape == (1, 16)
    assert (model.features(files[5]) - expected[5]).abs().max() > 1e-2  # another index


def test_classes_are_those_of_the_probe(
    model: ContraDiff, project: Path, files: list[Path], cache: FeatureCache
):
    metrics = json.loads((project / "metrics/probe.json").read_text())["probe"]
    found = model.classify(files, top=2)
    labels = cache.labels("val").tolist()
    right = [each.classes[0] == "abc"[label] for each, label in zip(found, labels, strict=True)]
    assert sum(right) / 8 == metrics["top1"]
    assert [each.name for each in found] == list(map(str, files))
    assert {len(each.classes) for each in found} == {2}
    assert sum(model.classify(files[0])[0].probabilities) == pytest.approx(1)


def test_noised_images_are_what_the_unet_reads(model: ContraDiff, files: list[Path]):
    """Two images, whose three levels pass the UNet at once, by level and then by image."""
    unet, read = model._features.model.unet, list[Any]()
    hook = unet.conv_in.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    model.features(files[:2], indices=[3, 5])
    hook.remove()
    decoded = decode_latents(model._vae, read[0]).permute(0, 2, 3, 1).numpy()
    found = model.noised(files[:2], indices=[3, 5], batch_size=1)
    assert [[level.info["timestep"] for level in each] for each in found] == [
        ["401", "201", "101"]
    ] * 2
    for image in range(2):
        for level in range(3):
            difference = np.asarray(found[image][level]).astype(int) - decoded[2 * level + image]
            assert abs(difference).max() <= 1
    assert abs(decoded[0].astype(int) - decoded[2]).max() > 10


def test_an_attentive_probe_brings_its_own_head(project: Path, tmp_path: Path, files: list[Path]):
    changes = {"probe": {"head": "attentive", "headline": "sgd"}}
    root = copy_project(project, tmp_path / "project", **changes)
    run_stage(root, features, **changes)
    run_stage(root, probe, **changes)
    export(tmp_path / "new", root=root)
    base = project / "build/base"
    model = ContraDiff.from_pretrained(tmp_path / "new", base=base, device="cpu")
    right = [each.classes[0] == "abc"[n % 3] for n, each in enumerate(model.classify(files))]
    metrics = json.loads((root / "metrics/probe.json").read_text())["probe"]
    assert sum(right) / 8 == metrics["top1"]


def png_of(image: Image.Image) -> bytes:
    return encode_png(torch.from_numpy(np.array(image)).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("settings", "condition"),
    [
        ({}, None),
        ({"condition": "image", "guidance": 2.0}, "files"),
        ({"condition": "class", "guidance": 1.5}, ["a", "b", "c"]),
    ],
    ids=["noise", "image", "class"],
)
def test_samples_are_those_of_the_shards(
    model: ContraDiff,
    files: list[Path],
    samples: Callable[..., list[dict[str, bytes]]],
    settings: dict[str, Any],
    condition: Any,
):
    expected = [record["png"] for record in samples(**settings)]
    condition = files if condition == "files" else condition
    options = {"condition": condition, "guidance": settings.get("guidance")}
    found = model.generate(5, **options)
    assert list(map(png_of, found)) == expected
    assert [image.info["name"] for image in found] == [f"{n:06d}" for n in range(5)]
    [third] = model.generate(1, first_index=3, **options)
    difference = np.asarray(third).astype(int) - np.asarray(found[3])
    assert abs(difference).max() <= 1
    assert third.info == found[3].info
    if condition is not None:
        assert third.info["condition"] in (str(files[3]), "a")
    assert list(map(png_of, model.generate(5, seed=1, **options))) != expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.features([]), "there are no images"),
        (lambda m: m.features("nowhere.png"), "nowhere.png: the image cannot be read"),
        (lambda m: m.features([__file__]), "not a readable image"),
        (lambda m: m.features(torch.zeros(3, 8, 8)), "image 0: torch.float32 .* give uint8"),
        (lambda m: m.features(np.zeros((8, 8, 2), np.uint8)), "uint8 with the shape .8, 8, 2. is"),
        (lambda m: m.features(np.zeros((8, 8, 3), np.uint8), indices=[1, 2]), "2 indices for 1"),
        (lambda m: m.generate(1, condition="dog"), "'dog' is neither a class .* nor a file"),
        (lambda m: m.generate(1, condition=3), "there is no class 3; the last is 2"),
        (lambda m: m.generate(1, condition=["a", __file__]), "either images or classes"),
        (lambda m: m.generate(0), "num_samples"),
        (lambda m: m.generate(1, guidance=2.0), "guidance: 2 has no effect"),
        (lambda m: m.noised("nowhere.png"), "nowhere.png: the image cannot be read"),
    ],
)
def test_faults_are_said(model: ContraDiff, call: Callable[[ContraDiff], Any], message: str):
    with pytest.raises(ValueError, match=message):
        call(model)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "I;16"])
def test_every_mode_is_an_image(model: ContraDiff, mode: str):
    assert model.prepare(Image.new(mode, (50, 20))).shape == (3, 32, 32)


def test_a_gpu_and_a_type_that_are_not_there_are_refused(parts: Parts):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='no GPU; use "cpu"'):
            ContraDiff(parts, device="cuda")
    with pytest.raises(ValueError, match=r"dtype: torch\.float16 is not possible"):
        ContraDiff(parts, device="cpu", dtype=torch.float16)


def test_bfloat16_is_near(parts: Parts, model: ContraDiff, files: list[Path]):
    rounded = ContraDiff(parts, device="cpu", dtype=torch.bfloat16)
    first, second = rounded.features(files), model.features(files)
    assert 1e-4 < (first - second).abs().mean() < 0.05
    a, b = (np.asarray(each.generate(1)[0]).astype(int) for each in (rounded, model))
    assert 0 < abs(a - b).mean() < 5


def test_importing_contradiff_loads_nothing_heavy():
    code = "import sys, contradiff; print(*({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
