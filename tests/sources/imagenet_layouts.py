"""One small set of images in each layout that people have ImageNet in."""

import gzip
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

WORDS = {"n01440764": "tench, Tinca tinca", "n02119789": "kit fox", "n04557648": "water bottle"}
WNIDS = tuple(WORDS)
ILSVRC_IDS = {"n02119789": 1, "n04557648": 898, "n01440764": 450}
"""Not in the order of the wnids, as in the real kit."""


class Photo(NamedTuple):
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
    order = rng.permutation(np.repeat(WNIDS, num_val)).tolist()
    return train + [
        Photo("val", wnid, f"ILSVRC2012_val_{number:08d}.JPEG", content())
        for number, wnid in enumerate(order, start=1)
    ]


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_folder(root: Path, photos: Sequence[Photo]) -> None:
    for photo in photos:
        _write(root / photo.split / photo.wnid / photo.name, photo.content)
    write_synsets(root)


def write_synsets(root: Path) -> None:
    lines = (f"{wnid} {words}\n" for wnid, words in WORDS.items())
    _write(root / "LOC_synset_mapping.txt", "".join(lines).encode())


def write_kaggle(root: Path, photos: Sequence[Photo]) -> None:
    rows = ["ImageId,PredictionString"]
    for split, wnid, name, content in photos:
        folder = split if split == "val" else f"train/{wnid}"
        _write(root / f"ILSVRC/Data/CLS-LOC/{folder}/{name}", content)
        if split == "val":
            rows.insert(1, f"{Path(name).stem},{wnid} 85 1 499 272 {wnid} 1 2 3 4 ")
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


def write_archives(root: Path, photos: Sequence[Photo]) -> None:
    val = {photo.name: photo for photo in photos if photo.split == "val"}
    classes = {
        wnid: tar_of((p.name, p.content) for p in photos if (p.split, p.wnid) == ("train", wnid))
        for wnid in reversed(WNIDS)  # the real archive is not sorted either
    }
    train = tar_of((f"{wnid}.tar", content) for wnid, content in classes.items())
    _write(root / "ILSVRC2012_img_train.tar", train)
    images = tar_of((name, photo.content) for name, photo in reversed(val.items()))
    _write(root / "ILSVRC2012_img_val.tar", images)
    write_devkit(root, [ILSVRC_IDS[val[name].wnid] for name in sorted(val)])


def meta_mat() -> bytes:
    """`synsets` as in the kit: classes and, behind them, a synset above, which has children."""
    import scipy.io

    names = "ILSVRC2012_ID WNID words gloss num_children children wordnet_height num_train_images"
    rows = [
        (float(number), wnid, WORDS[wnid], "a gloss", 0.0, np.empty((0, 0)), 0.0, 1300.0)
        for wnid, number in sorted(ILSVRC_IDS.items(), key=lambda item: item[1])
    ]
    rows.append((1001.0, "n00001740", "entity", "all", 2.0, np.array([1, 898]), 9.0, 0.0))
    synsets = np.empty((len(rows), 1), dtype=[(name, "O") for name in names.split()])
    for index, row in enumerate(rows):
        synsets[index, 0] = row
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"synsets": synsets})
    return buffer.getvalue()


def write_devkit(root: Path, ground_truth: Iterable[object], *, packed: bool = True) -> None:
    text = "".join(f"{number}\n" for number in ground_truth).encode()
    folder = "ILSVRC2012_devkit_t12"
    files = {"meta.mat": meta_mat(), "ILSVRC2012_validation_ground_truth.txt": text}
    named = [(f"{folder}/data/{name}", content) for name, content in files.items()]
    if packed:
        content = gzip.compress(tar_of([(f"{folder}/readme.txt", b"x"), *named]))
        _write(root / f"{folder}.tar.gz", content)
    for name, content in () if packed else named:
        _write(root / name, content)


def write_parquet(
    root: Path,
    photos: Sequence[Photo],
    *,
    rows_a_group: int = 3,
    has_names: bool = True,
    path_of: Any = lambda photo: f"{Path(photo.name).stem}_{photo.wnid}.JPEG",
    val_name: str = "validation",
) -> None:
    """Two shards a split, as `datasets` writes them: classes' names are in the metadata."""
    import pyarrow as pa
    from pyarrow import parquet

    (root / "data").mkdir(parents=True, exist_ok=True)
    label = {"names": list(WORDS.values()), "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": label}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields = [("image", image), ("label", pa.int64())]
    schema = pa.schema(fields, metadata=metadata if has_names else None)
    for split, name in (("train", "train"), ("val", val_name)):
        mine = [photo for photo in photos if photo.split == split]
        order = np.random.default_rng(7).permutation(len(mine))
        for number, indices in enumerate(np.array_split(order, 2)):
            chosen = [mine[index] for index in indices]
            columns = {
                "image": [{"bytes": p.content, "path": path_of(p)} for p in chosen],
                "label": [WNIDS.index(p.wnid) for p in chosen],
            }
            table = pa.Table.from_pydict(columns, schema=schema)
            path = root / "data" / f"{name}-{number:05d}-of-00002.parquet"
            parquet.write_table(table, path, row_group_size=rows_a_group)


WRITERS: dict[str, Any] = {
    "imagefolder": write_folder,
    "archives": write_archives,
    "kaggle": write_kaggle,
    "parquet": write_parquet,
}
