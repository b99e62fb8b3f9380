"""stages.latents: the same shards from one process and two, taken up where it was stopped."""

from stages.runtime.run import Run

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from contradiff.data.encoding import CutImages, LatentEncoder
from contradiff.data.latents import StoredLatents
from contradiff.data.shard_info import LatentInfo
from contradiff.data.shards import Record, ShardIndex, read_split
from contradiff.processes import Part, PartFinished
from stages import latents

ROOT = Path(__file__).resolve().parents[2]
COUNTS = {"num_train": None, "num_val": None}
CROPS = {"views": 2, "flips": True, "crop_scale_min": 0.4, "colour_jitter": 0.5}
SECTIONS: dict[str, Any] = {
    "seed": 0,
    "data": {"source": "imagefolder", "root": "raw", "image_size": 32} | COUNTS,
    "shard": {"samples_per_shard": 6, "compression": "gzip"},
    "latents": CROPS | {"dtype": "bfloat16", "min_psnr": 1.0, "batch_size": 8},
}
NUM_IMAGES = {"train": 24, "val": 8}


@pytest.fixture
def run(workplace: Path, run_of: Callable[[str], Run], tiny_base: Path, tiny_data: Path) -> Run:
    build = workplace / "build"
    build.mkdir()
    shutil.copytree(tiny_base, build / "base")
    shutil.copytree(tiny_data / "images", build / "shards")
    return run_of("latents")


def params_of(**changes: Any) -> latents.Params:
    sections = SECTIONS | {"latents": SECTIONS["latents"] | changes}
    return latents.Params.model_validate(sections)


def outs() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("build/latents").iterdir()}


def test_two_processes_write_what_one_writes(
    run: Run, in_two_processes: Callable[..., list[int | None]]
):
    latents.main(params_of(), run)
    index = ShardIndex.read(Path("build/latents"), LatentInfo)
    assert index.shards("val")[0].name == "val-00000.tar.gz"
    assert {split: index.num_samples(split) for split in index.splits} == NUM_IMAGES
    assert index.info.dtype == "bfloat16"
    stored = map(StoredLatents.of_record, read_split(Path("build/latents"), "train"))
    assert [len(item.crops) for item in stored] == [4] * 24
    assert not any((run.root / ".work" / "latents").iterdir())
    written = (*Path("build/latents").iterdir(), latents.METRICS, latents.FIGURE)
    expected = {path: path.read_bytes() for path in written}
    for path in written:
        path.unlink()
    assert in_two_processes(lambda _: latents.main(params_of(), run)) == [0, 0]
    assert {path: path.read_bytes() for path in written} == expected


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of what is encoded."""
    keys: list[str] = []
    real = LatentEncoder.encode_cut

    def counting(self: LatentEncoder, cut: CutImages) -> Any:
        keys.extend(cut.keys)
        return real(self, cut)

    monkeypatch.setattr(LatentEncoder, "encode_cut", counting)
    return keys


def test_a_whole_run_gathers_parts(run: Run, encoded: list[str]):
    latents.main(params_of(), run)
    expected = outs()
    shutil.rmtree("build/latents")
    for number in (2, 1):
        with pytest.raises(PartFinished):
            latents.main(params_of(), replace(run, part=Part(number, 2)))
        assert not Path("build/latents").exists()
    encoded.clear()
    latents.main(params_of(), run)
    assert outs() == expected
    shown = {key for key in encoded if not key.startswith("val")}
    assert shown == set()


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_stopped_stage_goes_on_shard_by_shard(
    run: Run, encoded: list[str], monkeypatch: pytest.MonkeyPatch
):
    latents.main(params_of(), run)
    expected = outs()
    shutil.rmtree("build/latents")
    real, written = latents.shards.write_shard, 0

    def stopped_at_third(*arguments: Any, **keywords: Any) -> Any:
        nonlocal written
        written += 1
        if written == 3:
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(latents.shards, "write_shard", stopped_at_third)
        with pytest.raises(KeyboardInterrupt):
            latents.main(params_of(), run)
    assert not Path("build/latents").exists()
    encoded.clear()
    with monkeypatch.context() as patch:
        patch.setattr(latents.shards.ShardIndex, "write", full_disk)
        with pytest.raises(ValueError, match=r"^build/latents: no space is left .*command again"):
            latents.main(params_of(min_psnr=2.0), run)  # which decides nothing about the shards
    # 12 of 24 training images; the validation images once for the check and once for their shards
    assert sorted(encoded) == sorted(
        [f"train-{i:03d}" for i in range(12, 24)] + [f"val-{i:03d}" for i in range(8)] * 2
    )
    encoded.clear()
    latents.main(params_of(), run)
    assert {key.split("-")[0] for key in encoded} == {"val"}  # the check beforehand alone
    assert outs() == expected


def test_written_shards_are_checked_before_they_are_published(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    """An untrained VAE shows all images badly: the PSNR has a stand-in."""
    real: Callable[..., Any] = latents.shards.write_shard

    def spoiling(path: Path, records: Any, **keywords: Any) -> Any:
        stored = [StoredLatents.of_record(record) for record in records]
        spoilt: list[Record] = [
            StoredLatents(item.key, 100 * item.moments, item.crops).to_record() for item in stored
        ]
        return real(path, spoilt, **keywords)

    monkeypatch.setattr(latents.shards, "write_shard", spoiling)
    found = iter([30.0, 3.0])
    monkeypatch.setattr("contradiff.base.vae.psnr", lambda *_: torch.tensor([next(found)]))
    message = r"^latents\.min_psnr: .* is 3\.0 dB, below 20 dB.* deviation is 1\d\."
    with pytest.raises(ValueError, match=message):
        latents.main(params_of(min_psnr=20.0), run)
    assert not Path("build/latents").exists()


def test_bad_latents_are_refused_before_all_others_are_made(run: Run, encoded: list[str]):
    with pytest.raises(ValueError, match=r"^latents\.min_psnr: .* dB, below 90 dB"):
        latents.main(params_of(min_psnr=90.0), run)
    assert {key.split("-")[0] for key in encoded} == {"val"}
    assert not Path("build/latents").exists()


def test_a_full_disk_is_refused_before_anything_is_encoded(
    run: Run, encoded: list[str], monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(".")._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"100\.0 kB .*, or lower latents\.views"):
        latents.main(params_of(), run)
    assert encoded == []


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(run: Run):
    """Under torchrun, as `dvc repro` starts it: the second of two finds a damaged shard."""
    path = Path("build/shards/train-00003.tar")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    runtime = {"device": "cpu", "num_workers": 1, "log_every": 1, "checkpoint_every": 1}
    with (run.root / "params.yaml").open("w") as file:
        YAML().dump(SECTIONS | {"runtime": runtime}, file)
    for name in ("stages", "contradiff"):
        (run.root / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, "-m", "stages.latents"],
        env=os.environ | {"CONTRADIFF_NUM_PROCESSES": "2"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    assert "contradiff: latents: build/shards/train-00003.tar: damaged" in done.stderr
    assert not Path("build/latents").exists()
