"""What it reads, and above all what it refuses."""

import os
import pickle  # noqa: TID251 - writes what the reader is tested on
import struct
from pathlib import Path

import numpy as np
import pytest

from contradiff.sources.cifar import CifarSplit, read_cifar
from contradiff.sources.cifar_files import Split, find_cifar

CLASSES = ["apple", "aquarium_fish", "baby"]


def read_cifar100(root: Path, *, split: Split) -> CifarSplit:
    return read_cifar(find_cifar(root, "cifar100", shown_root="data"), "cifar100", split=split)


def write(path: Path, content: object, *, protocol: int = 2) -> None:
    path.write_bytes(pickle.dumps(content, protocol=protocol))


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)


@pytest.fixture
def root(tmp_path: Path, images: np.ndarray) -> Path:
    write(tmp_path / "meta", {b"fine_label_names": [name.encode() for name in CLASSES]})
    for split, part in (("train", images), ("test", images[:1])):
        labels = [index % 3 for index in range(len(part))]
        write(tmp_path / split, {b"data": part.reshape(len(part), -1), b"fine_labels": labels})
    return tmp_path


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_round_trip(root: Path, images: np.ndarray, protocol: int):
    content = {b"data": images.reshape(4, -1), b"fine_labels": [0, 1, 2, 0], b"filenames": [b"a"]}
    write(root / "train", content, protocol=protocol)
    split = read_cifar100(root, split="train")
    np.testing.assert_array_equal(split.images, images)
    np.testing.assert_array_equal(split.labels, [0, 1, 2, 0])
    assert split.class_names == CLASSES
    assert split.keys == [f"train-{index:05d}" for index in range(4)]
    assert split.images.flags.writeable
    assert len(read_cifar100(root, split="test").images) == 1


def test_text_keys_and_fortran_order(root: Path, images: np.ndarray):
    data = np.asfortranarray(images.reshape(4, -1))
    write(root / "train", {"data": data, "fine_labels": [0, 1, 2, 0]})
    write(root / "meta", {"fine_label_names": CLASSES})
    split = read_cifar100(root, split="train")
    np.testing.assert_array_equal(split.images, images)
    assert split.images.flags.c_contiguous
    assert split.class_names == CLASSES


def python2_pickle(images: np.ndarray, labels: list[int]) -> bytes:
    """The opcodes that Python 2's cPickle and numpy 1 wrote: byte strings, no `_codecs`."""

    def string(value: bytes) -> bytes:
        if len(value) < 256:
            return b"U" + bytes([len(value)]) + value
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    dtype = (
        b"cnumpy\ndtype\n(" + string(b"u1") + b"K\x00K\x01tR"
        b"(K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    data = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + string(b"b") + b"tR"
        b"(K\x01(" + number(len(images)) + number(3072) + b"t" + dtype + b"I00\n"
        + string(images.tobytes()) + b"tb"
    )  # fmt: skip
    fine = b"](" + b"".join(number(label) for label in labels) + b"e"
    return b"\x80\x02}(" + string(b"data") + data + string(b"fine_labels") + fine + b"u."


def test_reads_what_python_2_wrote(root: Path, images: np.ndarray):
    content = python2_pickle(images, [2, 1, 0, 2])
    # The hand-written bytes are a true pickle: numpy itself restores them.
    theirs = pickle.loads(content, encoding="bytes")
    np.testing.assert_array_equal(theirs[b"data"].reshape(images.shape), images)

    (root / "train").write_bytes(content)
    split = read_cifar100(root, split="train")
    np.testing.assert_array_equal(split.images, images)
    np.testing.assert_array_equal(split.labels, [2, 1, 0, 2])


class Runs:
    """Unpickles into a call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("file", ["train", "meta"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_runs_nothing(root: Path, file: str, protocol: int):
    mark = root / "mark"
    write(root / file, {b"data": Runs(os.system, f"touch {mark}")}, protocol=protocol)
    with pytest.raises(ValueError, match=rf"{file}: .*asks for \w+\.system"):
        read_cifar100(root, split="train")
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(U\x011tR.",
        b"cnumpy\nload\n.",
        b"cnumpy.core.multiarray\nscalar\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__base__\x93.",
        b"i__builtin__\neval\n.",
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.",
    ],
)
def test_other_names_are_refused(root: Path, content: bytes):
    (root / "train").write_bytes(content)
    with pytest.raises(ValueError, match="train: not a file of CIFAR"):
        read_cifar100(root, split="train")


def test_every_truncation_is_refused(root: Path, images: np.ndarray):
    whole = python2_pickle(images[:1], [0])
    for length in [*range(200), *range(len(whole) - 100, len(whole))]:
        (root / "train").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=str(root / "train")):
            read_cifar100(root, split="train")


def test_arbitrary_bytes_are_refused(root: Path):
    rng = np.random.default_rng(0)
    for _ in range(200):
        (root / "train").write_bytes(rng.bytes(40))
        with pytest.raises(ValueError, match=str(root / "train")):
            read_cifar100(root, split="train")


GOOD = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("data", "labels", "message"),
    [
        (np.zeros((2, 3071), np.uint8), [0, 1], "2 x 3071 of u1; expected n x 3072"),
        (np.zeros((2, 3072), np.int8), [0, 1], "of i1; expected n x 3072 of u1"),
        (np.zeros((2, 3072), np.float32), [0, 1], "of f4"),
        (np.zeros((2, 3072), object), [0, 1], "no numpy matrix"),
        (np.zeros((2, 3, 1024), np.uint8), [0, 1], "no numpy matrix"),
        (np.zeros((0, 3072), np.uint8), [], "data has 0 bytes for 0 images"),
        ([[0] * 3072], [0], "no numpy matrix"),
        (GOOD, [0], "1 fine_labels for 2 images"),
        (GOOD, [0, 3], r"fine_labels\[1\] is 3; expected 0 to 2"),
        (GOOD, [0, -1], r"fine_labels\[1\] is -1"),
        (GOOD, [0, 1.0], r"fine_labels\[1\] is 1.0"),
        (GOOD, [0, True], r"fine_labels\[1\] is True"),
        (GOOD, (0, 1), "fine_labels is no list but tuple"),
    ],
)
def test_wrong_content_is_named(root: Path, data: object, labels: object, message: str):
    write(root / "train", {b"data": data, b"fine_labels": labels}, protocol=4)
    with pytest.raises(ValueError, match=rf"train: .*{message}"):
        read_cifar100(root, split="train")


def test_byte_count_must_match_the_shape(root: Path, images: np.ndarray):
    # numpy would refuse this state as well; here it is our own check.
    content = python2_pickle(images, [0, 1, 2, 0]).replace(
        b"J" + struct.pack("<i", 4), b"J" + struct.pack("<i", 5)
    )
    (root / "train").write_bytes(content)
    with pytest.raises(ValueError, match="12288 bytes for 5 images of 3072"):
        read_cifar100(root, split="train")


def test_file_names_are_the_keys(root: Path, images: np.ndarray):
    content = {b"data": images.reshape(4, -1), b"fine_labels": [0, 1, 2, 0]}
    names = [b"apple_s_000.png", b"b.png", b"c.png", b"d.png"]
    write(root / "train", content | {b"filenames": names})
    assert read_cifar100(root, split="train").keys == [name.decode() for name in names]


def test_missing_files_and_entries(root: Path):
    write(root / "train", {b"data": GOOD, b"labels": [0, 1]})
    with pytest.raises(ValueError, match=r"train: no entry 'fine_labels'.*other CIFAR"):
        read_cifar100(root, split="train")
    write(root / "train", [1, 2])
    with pytest.raises(ValueError, match="train: expected a mapping, found list"):
        read_cifar100(root, split="train")
    write(root / "meta", {b"fine_label_names": []})
    with pytest.raises(ValueError, match="meta: fine_label_names is empty"):
        read_cifar100(root, split="train")
    (root / "meta").unlink()
    with pytest.raises(ValueError, match=r"transfer_data\.root: data lacks meta; put"):
        read_cifar100(root, split="train")
