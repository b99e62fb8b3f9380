"""stages.generate: what the shards and the grid say about each kind of condition."""

from stages._runtime import Run

from pathlib import Path
from typing import Any

import pytest
import torch

from contradiff.class_condition import ClassConditionParams, ClassTable, save_class_table
from contradiff.config import parse
from contradiff.data.shards import ShardIndex, read_split
from contradiff.data.transforms import decode
from contradiff.sampling import endless_images
from stages import generate

SAMPLES, TABLE = Path("build/samples"), Path("build/class_condition")


def call(run: Run, **changes: Any) -> tuple[list[dict[str, bytes]], dict[str, Any]]:
    """Run the stage; returns the samples' records and the facts about them."""
    section: dict[str, Any] = {
        "condition": "noise",
        "guidance": 1.0,
        "num_samples": 5,
        "num_inference_steps": 2,
        "batch_size": 4,
    }
    content = {
        "seed": 0,
        "data": {
            "source": "toy",
            "root": "data/raw/toy",
            "image_size": 32,
            "num_train": 24,
            "num_val": 8,
        },
        "shard": {"samples_per_shard": 4, "compression": "none"},
        "generate": section | changes,
    }
    generate.main(parse(generate.Params, content, source="params.yaml"), run)
    return list(read_split(SAMPLES, "sample")), dict(ShardIndex.read(SAMPLES).facts)


def save_table(*, lora: bool) -> None:
    torch.manual_seed(0)
    table = ClassTable(num_classes=3, width=8, cross_attention_dim=16)
    torch.nn.init.normal_(table.to_tokens.weight)
    params = ClassConditionParams(epochs=1, width=8, drop=0.1, batch_size=4, lr=0.01, lora=lora)
    save_class_table(
        TABLE,
        table,
        checkpoint=Path("build/pretrain"),
        num_classes=3,
        num_steps=6,
        params=params,
    )


def test_unconditional_samples(trained_project: Run):
    """Neither the data nor a table of classes is needed."""
    (trained_project.root / "build/shards").unlink()
    records, facts = call(trained_project)
    assert [set(record) for record in records] == [{"__key__", "png"}] * 5
    assert facts == {
        "kind": "samples",
        "condition": "unconditional: c(noise)",
        "guidance": 1.0,
        "seed": 0,
        "num_inference_steps": 2,
    }
    assert decode(generate.GRID.read_bytes(), name="grid").shape == (3, 64, 16 * 64)


def test_image_conditional_samples_lie_below_their_images(trained_project: Run):
    records, facts = call(trained_project, condition="image", guidance=2.0, num_samples=18)
    assert facts["condition"].startswith("image-conditional")
    assert facts["guidance"] == 2.0
    assert set(records[0]) == {"__key__", "png"}
    # two rows of 16 conditions, each above its samples; every image is shown at twice its side
    grid = decode(generate.GRID.read_bytes(), name="grid")[:, ::2, ::2]
    assert grid.shape == (3, 4 * 32, 16 * 32)
    cells = grid.unflatten(2, (16, 32)).unflatten(1, (4, 32)).permute(1, 3, 0, 2, 4)
    samples = torch.stack([decode(record["png"], name="sample") for record in records])
    assert torch.equal(cells[1], samples[:16])
    assert torch.equal(cells[3, :2], samples[16:])
    images = endless_images(Path("build/shards"), Path("build/latents"), batch_size=8)
    for number, image in zip(range(18), images, strict=False):
        shown = cells[number // 16 * 2, number % 16].float() / 127.5 - 1
        torch.testing.assert_close(shown[None], image.pixels, rtol=0, atol=1e-5)
    assert (cells[2:, 2:] == 255).all()


def test_class_conditional_samples_have_their_labels(trained_project: Run):
    save_table(lora=True)
    records, facts = call(trained_project, condition="class", guidance=1.5)
    assert [record["cls"] for record in records] == [b"0", b"1", b"2", b"0", b"1"]
    assert facts["condition"].startswith("class-conditional")


def test_the_table_says_whether_lora_takes_part(trained_project: Run):
    contents = []
    for lora in (True, False):
        save_table(lora=lora)
        contents.append([r["png"] for r in call(trained_project, condition="class")[0]])
    assert contents[0] != contents[1]


def test_table_of_another_checkpoint_is_refused(trained_project: Run):
    save_table(lora=True)
    weights = trained_project.root / "build/pretrain/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"build/class_condition: trained with another model"):
        call(trained_project, condition="class")
    assert not SAMPLES.exists()
