"""stages.latents: the same shards from one process and two, taken up where it was stopped."""

from stages.runtime.run import Run

import errno
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from contradiff.data import encoding
from contradiff.data.encoding import Reconstruction
from contradiff.data.latents import StoredLatents
from contradiff.data.shard_info import LatentInfo
from contradiff.data.shards import Record, Shard, ShardIndex, read_split
from contradiff.data.transforms import decode
from stages import latents

ROOT = Path(__file__).resolve().parents[2]
SECTIONS: dict[str, Any] = {
    "seed": 0,
    "data": {
        "source": "imagefolder",
        "root": "raw",
        "image_size": 32,
        "num_train": None,
        "num_val": None,
    },
    "shard": {"samples_per_shard": 6, "compression": "gzip"},
    "latents": {
        "views": 2,
        "flips": True,
        "crop_scale_min": 0.4,
        "colour_jitter": 0.5,
        "dtype": "bfloat16",
        "min_psnr": 1.0,
        "batch_size": 8,
    },
}
NUM_IMAGES = {"train": 24, "val": 8}


class Killed(BaseException):
    """As a signal would end the stage."""


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


def _stage_of(rank: int, port: int, run: Run) -> None:
    from accelerate.state import AcceleratorState

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    latents.main(params_of(), run)


def test_two_processes_write_what_one_writes(run: Run):
    latents.main(params_of(), run)
    index = ShardIndex.read(Path("build/latents"), LatentInfo)
    assert {split: index.num_samples(split) for split in index.splits} == NUM_IMAGES
    assert index.info.dtype == "bfloat16"
    stored = map(StoredLatents.of_record, read_split(Path("build/latents"), "train"))
    assert [len(item.crops) for item in stored] == [4] * 24
    assert not any((run.root / ".work" / "latents").iterdir())
    expected, metrics = outs(), Path("metrics/latents.json").read_bytes()
    for name in ("build/latents", "metrics"):
        shutil.rmtree(name)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_stage_of, args=(rank, port, run)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert outs() == expected
    assert Path("metrics/latents.json").read_bytes() == metrics


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of what is encoded."""
    keys: list[str] = []
    real: Callable[..., Any] = encoding.encode_views

    def counting(vae: Any, views: Any, **keywords: Any) -> Any:
        keys.extend(views.keys)
        return real(vae, views, **keywords)

    monkeypatch.setattr(encoding, "encode_views", counting)
    return keys


def test_killed_stage_goes_on_shard_by_shard(
    run: Run, encoded: list[str], monkeypatch: pytest.MonkeyPatch
):
    latents.main(params_of(), run)
    expected = outs()
    shutil.rmtree("build/latents")
    real, written = latents.write_noted_shard, 0

    def killed_at_third(*arguments: Any, **keywords: Any) -> Any:
        nonlocal written
        written += 1
        if written == 3:
            raise Killed
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(latents, "write_noted_shard", killed_at_third)
        with pytest.raises(Killed):
            latents.main(params_of(), run)
    assert not Path("build/latents").exists()
    encoded.clear()
    latents.main(params_of(min_psnr=2.0), run)  # which decides nothing about the shards
    # 12 of 24 training images; the validation images once for the check and once for their shards
    assert sorted(encoded) == sorted(
        [f"train-{i:03d}" for i in range(12, 24)] + [f"val-{i:03d}" for i in range(8)] * 2
    )
    assert outs() == expected


def finish(run: Run, shard: Shard, content: bytes) -> None:
    """Put a shard where another run of the same work, on its way, would have put it."""
    (work,) = (run.root / ".work" / "latents").iterdir()
    (work / shard.name).write_bytes(content)
    (work / f"{shard.name}.json").write_text(json.dumps(asdict(shard)))


def test_a_shard_that_another_run_finishes_meanwhile_shifts_no_other(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    latents.main(params_of(), run)
    expected = outs()
    second = ShardIndex.read(Path("build/latents"), LatentInfo).shards("train")[1]
    shutil.rmtree("build/latents")
    real: Callable[..., Any] = encoding.encode_views

    def finishing(vae: Any, views: Any, **keywords: Any) -> Any:
        if views.keys[0] == "train-000":  # the stage has looked already what is to be done
            finish(run, second, expected[second.name])
        return real(vae, views, **keywords)

    monkeypatch.setattr(encoding, "encode_views", finishing)
    latents.main(params_of(), run)
    assert outs() == expected


def test_all_processes_wait_for_another_run_of_the_same_work(
    run: Run, encoded: list[str], monkeypatch: pytest.MonkeyPatch
):
    """The second of two; the other run ends while the main process waits for the lock."""
    latents.main(params_of(), run)
    expected, index = outs(), ShardIndex.read(Path("build/latents"), LatentInfo)
    encoded.clear()

    def other_run_ends() -> None:
        for shards in index.splits.values():
            for shard in shards:
                finish(run, shard, expected[shard.name])

    accelerator = SimpleNamespace(
        process_index=1, num_processes=2, is_main_process=False, wait_for_everyone=other_run_ends
    )
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(Run, "accelerator", lambda _: accelerator)
    latents.main(params_of(), run)
    assert encoded == []


def test_written_shards_are_checked_before_they_are_published(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    """An untrained VAE shows all images badly: a stand-in for the PSNR sees the latents' scale."""
    real: Callable[..., Any] = latents.write_noted_shard

    def spoiling(path: Path, records: Any, **keywords: Any) -> Any:
        stored = [StoredLatents.of_record(record) for record in records]
        spoilt: list[Record] = [
            StoredLatents(item.key, 100 * item.moments, item.crops).to_record() for item in stored
        ]
        return real(path, spoilt, **keywords)

    monkeypatch.setattr(latents, "write_noted_shard", spoiling)
    monkeypatch.setattr(
        Reconstruction, "psnr", property(lambda self: 30.0 if self.std < 1 else 3.0)
    )
    with pytest.raises(ValueError, match=r"^latents\.min_psnr: .* at 3\.0 dB where 20 are"):
        latents.main(params_of(min_psnr=20.0), run)
    assert not Path("build/latents").exists()


@pytest.mark.parametrize(("number", "columns"), [(3, 3), (16, 16), (20, 16)])
def test_every_image_of_the_figure_stands_above_its_reconstruction(
    run: Run, number: int, columns: int
):
    """Whole rows or not: image i is of grey level i, its reconstruction of level 255 - i."""
    levels = torch.arange(number, dtype=torch.uint8)[:, None, None, None]
    images = levels.expand(-1, 3, 64, 64)
    latents.show(Reconstruction(images, 255 - images, 1.0), run)
    figure = decode(Path("build/figures/reconstructions.png").read_bytes(), name="figure")
    seen = figure[0, 32::64, 32::64]
    assert seen.shape == (2 * -(-number // columns), columns)
    assert seen[::2].flatten()[:number].tolist() == list(range(number))
    assert seen[1::2].flatten()[:number].tolist() == [255 - i for i in range(number)]


def test_a_disk_that_runs_full_is_told_and_whole_shards_are_kept(
    run: Run, encoded: list[str], monkeypatch: pytest.MonkeyPatch
):
    real, written = latents.write_noted_shard, 0

    def full_at_second(*arguments: Any, **keywords: Any) -> Any:
        nonlocal written
        written += 1
        if written == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(latents, "write_noted_shard", full_at_second)
        with pytest.raises(ValueError, match=r"no space is left .*run the same command again"):
            latents.main(params_of(), run)
    encoded.clear()
    latents.main(params_of(), run)
    again = sorted(key for key in encoded if key.startswith("train"))
    assert again == [f"train-{i:03d}" for i in range(6, 24)]


def test_a_full_disk_at_the_end_loses_no_shard(
    run: Run, encoded: list[str], monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(ShardIndex, "write", full)
        with pytest.raises(ValueError, match=r"^build: no space is left .*same command again"):
            latents.main(params_of(), run)
    encoded.clear()
    latents.main(params_of(), run)
    assert {key.split("-")[0] for key in encoded} == {"val"}  # the check beforehand alone


def test_bad_latents_are_refused_before_all_others_are_made(run: Run, encoded: list[str]):
    with pytest.raises(ValueError, match=r"^latents\.min_psnr: .* dB where 90 are asked for"):
        latents.main(params_of(min_psnr=90.0), run)
    assert {key.split("-")[0] for key in encoded} == {"val"}
    assert not Path("build/latents").exists()


def test_a_full_disk_is_refused_before_anything_is_encoded(
    run: Run, encoded: list[str], monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(".")._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"100\.0 kB are free, .*, or lower latents\.views"):
        latents.main(params_of(), run)
    assert encoded == []


def test_a_damaged_image_shard_makes_no_latents(run: Run):
    path = Path("build/shards/val-00001.tar")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"val-00001\.tar: damaged"):
        latents.main(params_of(), run)
    assert not Path("build/latents").exists()


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
