"""One small set of images in each layout that people have ImageNet in."""

import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WORDS = {"n01440764": "tench, Tinca tinca", "n02119789": "kit fox", "n04557648": "water bottle"}
WNIDS = tuple(WORDS)
ILSVRC_IDS = {"n02119789": 1, "n04557648": 898, "n01440764": 450}
"""Not in the order of the wnids, as in the real kit."""


@dataclass(frozen=True)
class Photo:
    """One image; `name` as ILSVRC has it."""

    split: str
    wnid: str
    name: str
    content: bytes


def make_photos(
    *, seed: int, num_train: int = 4, num_val: int = 2, smallest: int = 1
) -> list[Photo]:
    """Some images a class, of random bytes and sizes; validation numbers mix the classes."""
    rng = np.random.default_rng(seed)

    def content() -> bytes:
        return b"\xff\xd8" + rng.bytes(int(rng.integers(smallest, smallest + 3000)))

    train = [
        Photo("train", wnid, f"{wnid}_{number}.JPEG", content())
        for wnid in WNIDS
        for number in rng.choice(20_000, num_train, replace=False)
    ]
    order = rng.permutation(np.repeat(WNIDS, num_val))
    val = [
        Photo("val", str(wnid), f"ILSVRC2012_val_{number:08d}.JPEG", content())
        for number, wnid in enumerate(order, start=1)
    ]
    return train + val


def write_folder(root: Path, photos: Iterable[Photo]) -> None:
    for photo in photos:
        path = root / photo.split / photo.wnid / photo.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo.content)
    write_synsets(root)


def write_synsets(root: Path) -> None:
    lines = (f"{wnid} {words}\n" for wnid, words in WORDS.items())
    (root / "LOC_synset_mapping.txt").write_text("".join(lines))


def write_kaggle(root: Path, photos: Iterable[Photo]) -> None:
    images = root / "ILSVRC/Data/CLS-LOC"
    rows = ["ImageId,PredictionString"]
    for photo in photos:
        folder = images / photo.split / (photo.wnid if photo.split == "train" else "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / photo.name).write_bytes(photo.content)
        if photo.split == "val":
            boxes = f"{photo.wnid} 85 1 499 272 {photo.wnid} 1 2 3 4 "
            rows.insert(1, f"{Path(photo.name).stem},{boxes}")
    (root / "LOC_val_solution.csv").write_text("\n".join(rows) + "\n")
    write_synsets(root)


def tar_of(files: Iterable[tuple[str, bytes]], **options: Any) -> bytes:
    """A tar of plain files, by Python's own writer."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_archives(root: Path, photos: Iterable[Photo], *, packed: bool = True) -> None:
    root.mkdir(parents=True, exist_ok=True)
    photos = list(photos)
    # the real archive is not sorted either
    classes = [
        (
            f"{wnid}.tar",
            tar_of((p.name, p.content) for p in photos if p.wnid == wnid and p.split == "train"),
        )
        for wnid in reversed(WNIDS)
    ]
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of(classes))
    val = [photo for photo in photos if photo.split == "val"]
    (root / "ILSVRC2012_img_val.tar").write_bytes(
        tar_of((photo.name, photo.content) for photo in reversed(val))
    )
    numbered = sorted(val, key=lambda photo: photo.name)
    write_devkit(root, [ILSVRC_IDS[photo.wnid] for photo in numbered], packed=packed)


def meta_mat(ids: dict[str, int] = ILSVRC_IDS) -> bytes:
    """`synsets` as in the kit: classes and, behind them, the synsets above, which have children."""
    import scipy.io

    kinds = [
        *(("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O")),
        *(("num_children", "O"), ("children", "O"), ("wordnet_height", "O")),
        ("num_train_images", "O"),
    ]
    above = {"n00001740": ("entity", 1001, [1, 898])}
    rows = [
        (float(number), wnid, WORDS[wnid], "a gloss", 0.0, np.empty((0, 0)), 0.0, 1300.0)
        for wnid, number in sorted(ids.items(), key=lambda item: item[1])
    ] + [
        (float(number), wnid, words, "all", float(len(below)), np.array(below), 9.0, 0.0)
        for wnid, (words, number, below) in above.items()
    ]
    synsets = np.empty((len(rows), 1), dtype=kinds)
    for index, row in enumerate(rows):
        synsets[index, 0] = row
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"synsets": synsets})
    return buffer.getvalue()


def write_devkit(root: Path, ground_truth: Iterable[object], *, packed: bool = True) -> None:
    text = "".join(f"{number}\n" for number in ground_truth).encode()
    files = {"meta.mat": meta_mat(), "ILSVRC2012_validation_ground_truth.txt": text}
    folder = "ILSVRC2012_devkit_t12"
    if packed:
        import gzip

        named = [(f"{folder}/readme.txt", b"x")]
        named += [(f"{folder}/data/{name}", content) for name, content in files.items()]
        (root / f"{folder}.tar.gz").write_bytes(gzip.compress(tar_of(named)))
        return
    (root / folder / "data").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / folder / "data" / name).write_bytes(content)


def write_parquet(
    root: Path,
    photos: Iterable[Photo],
    *,
    num_shards: int = 2,
    rows_a_group: int = 3,
    has_names: bool = True,
    path_of: Any = lambda photo: f"{Path(photo.name).stem}_{photo.wnid}.JPEG",
    val_name: str = "validation",
) -> None:
    """As `datasets` writes it: names with the wnid behind them, classes' names in the metadata."""
    import pyarrow as pa
    from pyarrow import parquet

    (root / "data").mkdir(parents=True, exist_ok=True)
    photos = list(photos)
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(WORDS.values()), "_type": "ClassLabel"},
    }
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("label", pa.int64()),
        ],
        metadata=metadata if has_names else None,
    )
    for split, name in (("train", "train"), ("val", val_name)):
        mine = [photo for photo in photos if photo.split == split]
        order = np.random.default_rng(7).permutation(len(mine))
        for number, indices in enumerate(np.array_split(order, num_shards)):
            chosen = [mine[index] for index in indices]
            table = pa.Table.from_pydict(
                {
                    "image": [{"bytes": p.content, "path": path_of(p)} for p in chosen],
                    "label": [WNIDS.index(p.wnid) for p in chosen],
                },
                schema=schema,
            )
            path = root / "data" / f"{name}-{number:05d}-of-{num_shards:05d}.parquet"
            parquet.write_table(table, path, row_group_size=rows_a_group)


WRITERS: dict[str, Any] = {
    "imagefolder": write_folder,
    "archives": write_archives,
    "kaggle": write_kaggle,
    "parquet": write_parquet,
}
