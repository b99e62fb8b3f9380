"""Hugging Face's shards, whole and broken."""

from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pyarrow as pa
import pytest
from pyarrow import parquet

from contradiff.sources.parquet import read_row, scan_parquet
from tests.sources.imagenet_layouts import WNIDS, make_photos, write_parquet, write_synsets

FIRST = "data/train-00000-of-00002.parquet"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_parquet(tmp_path, make_photos(seed=0))
    return tmp_path


def contents(root: Path) -> set[tuple[int, bytes]]:
    files = (file for files in scan_parquet(root).splits.values() for file in files)
    return {(file.label, read_row(root, file)) for file in files}


EXPECTED = {(WNIDS.index(photo.wnid), photo.content) for photo in make_photos(seed=0)}


def test_names_as_ilsvrc_has_them_give_the_same_listing(tmp_path: Path):
    """Some copies have the wnid behind each name, some have not: training tells it all the same."""
    photos = make_photos(seed=0)
    write_parquet(tmp_path / "a", photos)
    write_parquet(tmp_path / "b", photos, path_of=lambda photo: f"x/{photo.name}", val_name="val")
    one, other = scan_parquet(tmp_path / "a"), scan_parquet(tmp_path / "b")
    assert one.class_ids == other.class_ids == WNIDS
    for split, files in one.splits.items():
        assert [file.path for file in files] == [file.path for file in other.splits[split]]


@pytest.mark.parametrize(("has_synsets", "name"), [(True, None), (False, None), (False, "a.jpg")])
def test_images_without_names_of_their_own_go_by_row(
    tmp_path: Path, has_synsets: bool, name: str | None
):
    write_parquet(tmp_path, make_photos(seed=0), path_of=lambda _: name, has_names=False)
    if has_synsets:
        write_synsets(tmp_path)
    listing = scan_parquet(tmp_path)
    assert listing.class_ids == (WNIDS if has_synsets else ("0000", "0001", "0002"))
    assert listing.class_names[0] == ("tench" if has_synsets else "0000")
    assert {Path(file.path).name for file in listing.splits["train"]} == {
        f"train_{row:08d}.jpg" for row in range(12)
    }
    assert contents(tmp_path) == EXPECTED


def test_class_names_may_be_the_wnids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tests.sources.imagenet_layouts.WORDS", {wnid: wnid for wnid in WNIDS})
    write_parquet(tmp_path, make_photos(seed=0), path_of=lambda _: None)
    assert scan_parquet(tmp_path).class_ids == scan_parquet(tmp_path).class_names == WNIDS


@pytest.mark.parametrize("rows_a_group", [1, 2, 100])
def test_every_row_is_found_in_any_order(tmp_path: Path, rows_a_group: int):
    photos = make_photos(seed=0)
    write_parquet(tmp_path, photos, rows_a_group=rows_a_group)
    expected = {photo.name: photo.content for photo in photos}
    files = [file for files in scan_parquet(tmp_path).splits.values() for file in files]
    for file in [*files, *reversed(files), *files[::2]]:
        assert read_row(tmp_path, file) == expected[Path(file.path).name]


def test_row_group_is_read_once_in_the_order_of_rows(root: Path, monkeypatch: pytest.MonkeyPatch):
    files = sorted(scan_parquet(root).splits["train"], key=lambda f: (f.stored, f.offset))
    real = parquet.ParquetFile.read_row_group
    counted = create_autospec(real, side_effect=real)
    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", counted)
    for file in files:
        read_row(root, file)
    assert [call.args[1] for call in counted.call_args_list] == [0, 1, 0, 1]


def rewrite(root: Path, shard: str = FIRST, **columns: Any) -> None:
    """Replace columns of a shard; training's have six rows."""
    table = parquet.read_table(root / shard)
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    parquet.write_table(table, root / shard)


@pytest.mark.parametrize(
    ("columns", "fault"),
    [
        ({"label": ["cat"] * 6}, r"has the columns \(image: .*, label: string\); expected `image`"),
        ({"image": [b"x"] * 6}, r"has the columns \(image: binary, label: int64\); expected"),
        ({"image": [{"path": "a.jpg"}] * 6}, r"has the columns \(image: struct<path: string>"),
        ({"label": [0, 1, 2, 3, 0, 1]}, r"train-0.*: row 3 .* has the label 3; expected 0 to 2"),
        ({"label": [0, -1, 2, 2, 0, 1]}, r"row 1 .* has the label -1; .* test split has no label"),
        ({"label": [0, None, 2, 2, 0, 1]}, r"row 1 .* has the label -1"),
    ],
)
def test_wrong_columns_are_named(root: Path, columns: dict[str, Any], fault: str):
    rewrite(root, **columns)
    with pytest.raises(ValueError, match=rf"^data\.root: .* ?{fault}"):
        scan_parquet(root)


def test_label_that_does_not_follow_the_wnid_is_named(root: Path):
    shard = "data/validation-00001-of-00002.parquet"
    labels = parquet.read_table(root / shard)["label"].to_pylist()
    rewrite(root, shard, label=[(label + 1) % 3 for label in labels])
    expected = r"validation-00001.*: row 0 \(.*\) has the label \d, but other images .* n0"
    with pytest.raises(ValueError, match=expected):
        scan_parquet(root)


def test_labels_in_another_order_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By the ids of ILSVRC's kit, say: models would disagree with those of other sources."""
    monkeypatch.setattr("tests.sources.imagenet_layouts.WNIDS", tuple(reversed(WNIDS)))
    write_parquet(tmp_path, make_photos(seed=0))
    with pytest.raises(ValueError, match=r"labels must follow the wnids' order, but n"):
        scan_parquet(tmp_path)


@pytest.mark.parametrize(("split", "label"), [("train", "train"), ("validation", "val")])
def test_missing_shards_are_named(root: Path, split: str, label: str):
    first, second = sorted(root.glob(f"data/{split}-*"))
    first.unlink()
    expected = rf"{root}/data has 1 of 2 files like {second.name}; missing: 00000"
    with pytest.raises(ValueError, match=expected):
        scan_parquet(root)
    second.unlink()
    with pytest.raises(ValueError, match=rf"{root} has no {label} files, such as .*{split}-\*"):
        scan_parquet(root)


@pytest.mark.parametrize("keep", [0, 3, 0.5])
def test_truncated_shard_is_named(root: Path, keep: float):
    content = (root / FIRST).read_bytes()
    (root / FIRST).write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    with pytest.raises(ValueError, match=rf".*/{FIRST} is damaged, truncated or no parquet"):
        scan_parquet(root)


def test_damaged_page_is_named(root: Path):
    files = [file for file in scan_parquet(root).splits["train"] if file.stored == FIRST]
    size = (root / FIRST).stat().st_size
    with (root / FIRST).open("r+b") as file:
        file.seek(4)
        file.write(b"\xff" * (size // 2))
    with pytest.raises(ValueError, match=rf"data\.root: .*{FIRST}: row \d+ cannot be read"):
        [read_row(root, file) for file in files]


def test_image_without_bytes_is_named(root: Path):
    images = parquet.read_table(root / FIRST)["image"].to_pylist()
    rewrite(root, image=[images[0] | {"bytes": None}, *images[1:]])
    file = next(f for f in scan_parquet(root).splits["train"] if (f.stored, f.offset) == (FIRST, 0))
    with pytest.raises(ValueError, match=rf"{FIRST}: row 0 has no image bytes, only a path"):
        read_row(root, file)


def test_shards_may_be_numbered_otherwise(root: Path):
    """As the hub's own conversion writes them: train/0000.parquet."""
    for path in sorted((root / "data").iterdir()):
        split, number = path.name.split("-")[:2]
        (root / split).mkdir(exist_ok=True)
        path.rename(root / split / f"{number[1:]}.parquet")
    assert contents(root) == EXPECTED
