"""stages.generate: what the shards and the grid say, on one process or two, whole or resumed."""

from stages.runtime.run import Run

import os
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from contradiff.base.loading import load_vae
from contradiff.base.vae import decode_latents
from contradiff.config import parse
from contradiff.data.shard_info import SampleInfo
from contradiff.data.shards import ShardIndex, read_split
from contradiff.data.transforms import decode
from contradiff.files import sha256_of
from contradiff.generation.class_table import ClassTable
from contradiff.generation.class_table_folder import save_class_table
from contradiff.generation.condition_images import condition_images
from contradiff.generation.params import ClassConditionParams
from contradiff.method.checkpoint import base_digest
from stages import conditions, generate
from tests.settings import ARCHITECTURE, GENERATE

SAMPLES, TABLE = Path("build/samples"), Path("build/class_condition")


def content_with(**changes: Any) -> dict[str, Any]:
    counts = {"image_size": 32, "num_train": 24, "num_val": 8}
    return ARCHITECTURE | {
        "seed": 0,
        "data": {"source": "toy", "root": "data/raw/toy", **counts},
        "shard": {"samples_per_shard": 4, "compression": "none"},
        "generate": GENERATE | changes,
    }


def run_stage(run: Run, **changes: Any) -> None:
    params = parse(generate.Params, content_with(**changes), source="params.yaml")
    generate.main(params, replace(run, stage="generate"))


def call(run: Run, **changes: Any) -> tuple[list[dict[str, bytes]], dict[str, Any]]:
    """Run the stage, and that of its conditions; returns the samples' records and their info."""
    content = content_with(**changes)
    wanted = {name: content[name] for name in ("shard", "generate")}
    conditions.main(parse(conditions.Params, wanted, source="params.yaml"), run)
    run_stage(run, **changes)
    info = ShardIndex.read(SAMPLES, SampleInfo).info.model_dump()
    return list(read_split(SAMPLES, "sample")), info


def save_table(*, lora: bool) -> None:
    torch.manual_seed(0)
    table = ClassTable(num_classes=3, width=8, cross_attention_dim=16)
    torch.nn.init.normal_(table.to_tokens.weight)
    params = ClassConditionParams(epochs=1, width=8, drop=0.1, batch_size=4, lr=0.01, lora=lora)
    save_class_table(
        TABLE, table, checkpoint=Path("build/pretrain"), num_classes=3, num_steps=6, params=params
    )


def test_unconditional_samples(trained_project: Run):
    """Neither the latents nor a table of classes is needed."""
    (trained_project.root / "build/latents").unlink()
    records, info = call(trained_project)
    assert [set(record) for record in records] == [{"__key__", "png"}] * 5
    written = GENERATE | {"kind": "samples", "condition": "unconditional: c(noise)", "seed": 0}
    written["checkpoint_sha256"] = sha256_of(Path("build/pretrain/model.safetensors"))
    written["base_sha256"] = base_digest(Path("build/base"))
    del written["batch_size"]
    assert info == written
    assert [record["__key__"] for record in records] == [b"%06d" % i for i in range(5)]
    assert decode(generate.GRID.read_bytes(), name="grid").shape == (3, 64, 16 * 64)


def test_samples_that_do_not_fit_on_the_disk_are_refused_first(
    trained_project: Run, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(ValueError, match=r"are to be written, but .*, or lower generate.num_sam"):
        run_stage(trained_project, num_samples=10**11)
    assert "generate: 100,000,000,000 images, at most 61" in capsys.readouterr().err


def test_disk_and_hours_are_said_before_the_work(
    trained_project: Run, capsys: pytest.CaptureFixture[str]
):
    run_stage(trained_project, num_samples=11, batch_size=1)
    said = capsys.readouterr().err
    lines = (
        r": 11 images, at most .* kB\n",
        r": about \S+ hours with 1 process",
        r": made 11 images",
    )
    places = [re.search(f"generate{line}", said) for line in lines]
    assert all(places), said
    assert places == sorted(places, key=lambda found: found.start() if found else -1)


def test_image_conditional_samples_lie_below_their_images(trained_project: Run):
    records, info = call(trained_project, condition="image", guidance=2.0, num_samples=18)
    assert info["condition"].startswith("image-conditional")
    assert info["guidance"] == 2.0
    assert set(records[0]) == {"__key__", "png"}
    # two rows of 16 conditions, each above its samples; every image is shown at twice its side
    grid = decode(generate.GRID.read_bytes(), name="grid")[:, ::2, ::2]
    assert grid.shape == (3, 4 * 32, 16 * 32)
    cells = grid.unflatten(2, (16, 32)).unflatten(1, (4, 32)).permute(1, 3, 0, 2, 4)
    samples = torch.stack([decode(record["png"], name="sample") for record in records])
    assert torch.equal(cells[1], samples[:16])
    assert torch.equal(cells[3, :2], samples[16:])
    images = condition_images(conditions.CONDITIONS, start=0)
    for number, (image, _) in enumerate(islice(images, 18)):
        assert torch.equal(cells[number // 16 * 2, number % 16], image[0])
    assert (cells[2:, 2:] == 255).all()


def test_class_conditional_samples_have_their_labels(trained_project: Run):
    save_table(lora=True)
    records, info = call(trained_project, condition="class", guidance=1.5)
    assert [record["cls"] for record in records] == [b"0", b"1", b"2", b"0", b"1"]
    assert info["condition"].startswith("class-conditional")
    save_table(lora=False)  # which takes part in the images
    without, _ = call(trained_project, condition="class", guidance=1.5)
    assert [record["png"] for record in without] != [record["png"] for record in records]


@pytest.fixture
def run_to_be_killed(trained_project: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run that dies at the fourth batch: in the second of the shards of two batches each."""
    decoded = 0

    def dying(vae: Any, latents: Any, *, first: int) -> Any:
        nonlocal decoded
        decoded += 1
        if decoded == 4:
            raise KeyboardInterrupt
        return decode_latents(vae, latents, first=first)

    monkeypatch.setattr("contradiff.generation.sampling.decode_latents", dying)
    return trained_project


def test_a_killed_run_goes_on_where_it_was(
    run_to_be_killed: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    settings = {"num_samples": 10, "batch_size": 2, "solver": "unipc"}
    with pytest.raises(KeyboardInterrupt):
        call(run_to_be_killed, **settings)
    assert not SAMPLES.exists()
    [work] = (run_to_be_killed.root / ".work/generate").iterdir()
    assert decode((work / "preview.png").read_bytes(), name="preview").shape == (3, 64, 16 * 64)
    assert [path.name for path in work.glob("*.tar")] == ["sample-00000.tar"]
    monkeypatch.undo()
    os.chdir(run_to_be_killed.root)
    resumed, _ = call(run_to_be_killed, **settings)
    assert "resumed: 6 of 10 images are still missing" in capfd.readouterr().err
    assert not work.exists()
    whole, _ = call(run_to_be_killed, **settings)
    assert resumed == whole
    assert [record["__key__"] for record in whole] == [b"%06d" % i for i in range(10)]


def test_what_another_checkpoint_made_is_not_taken_up(run_to_be_killed: Run):
    with pytest.raises(KeyboardInterrupt):
        call(run_to_be_killed, num_samples=10, batch_size=2)
    [first] = (run_to_be_killed.root / ".work/generate").iterdir()
    checkpoint = run_to_be_killed.root / "build/pretrain"
    weights, config = checkpoint / "model.safetensors", checkpoint / "config.json"
    content, old = bytearray(weights.read_bytes()), sha256_of(weights)
    content[-1] ^= 1
    weights.write_bytes(content)
    config.write_text(config.read_text().replace(old, sha256_of(weights)))
    call(run_to_be_killed, num_samples=10, batch_size=2)
    assert list((run_to_be_killed.root / ".work/generate").iterdir()) == [first]


@pytest.mark.parametrize(
    "settings",
    [{"solver": "dpmsolver++"}, {"condition": "image", "guidance": 2.0}],
    ids=["noise", "image"],
)
def test_two_processes_make_the_same_samples(
    trained_project: Run,
    in_two_processes: Callable[..., list[int | None]],
    settings: dict[str, Any],
):
    """Bit for bit: three shards, of which the last is short."""
    settings |= {"num_samples": 9, "batch_size": 3}
    call(trained_project, **settings)
    paths = [*SAMPLES.iterdir(), generate.GRID]
    expected = {path: path.read_bytes() for path in paths}
    for path in paths:
        path.unlink()
    assert in_two_processes(lambda _: run_stage(trained_project, **settings)) == [0, 0]
    assert {path: path.read_bytes() for path in paths} == expected
    assert list((trained_project.root / ".work/generate").iterdir()) == []


def test_a_failing_process_ends_the_other(
    trained_project: Run, in_two_processes: Callable[..., list[int | None]]
):
    """And what the other has made is kept for the next run."""

    def failing(rank: int) -> int:
        if rank == 1:

            def fail(*_: Any, **__: Any) -> Any:
                raise ValueError

            generate.generate = fail
        try:
            run_stage(trained_project, num_samples=9)
        except ChildProcessError as error:
            return 3 if "process 1 has failed" in str(error) else 4
        except ValueError:
            return 2
        return 0

    assert in_two_processes(failing) == [3, 2]
    assert not SAMPLES.exists()
    [work] = (trained_project.root / ".work/generate").iterdir()
    kept = sorted(path.name for path in work.glob("*.tar"))
    assert kept == ["sample-00000.tar", "sample-00002.tar"]
    assert in_two_processes(lambda _: run_stage(trained_project, num_samples=9)) == [0, 0]
    assert len(list(read_split(SAMPLES, "sample"))) == 9


def test_bf16_keeps_the_vae_in_float32(trained_project: Run, monkeypatch: pytest.MonkeyPatch):
    seen: list[torch.dtype] = []

    def load(folder: Path) -> Any:
        vae = load_vae(folder)
        vae.decoder.register_forward_hook(lambda *args: seen.append(args[2].dtype))
        return vae

    monkeypatch.setattr(generate, "load_vae", load)
    exact, _ = call(trained_project)
    rounded, info = call(trained_project, precision="bf16")
    assert set(seen) == {torch.float32}
    assert info["precision"] == "bf16"
    assert exact != rounded
