"""CIFAR's archives and folders, in both forms: as torchvision reads them, and what is refused."""

import gzip
import hashlib
import os
import pickle  # noqa: TID251 - writes what the reader is tested on
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contradiff.files import sha256_of
from contradiff.sources import cifar
from contradiff.sources.cifar import FORMS, CifarForm, CifarName, Split, TransferSplit, find_cifar
from tests.sources.imagenet_layouts import tar_of

SIZES = {"data_batch_1": 3, "data_batch_2": 2, "train": 6, "test": 2, "test_batch": 2}
CLASSES = {"cifar10": ["airplane", "automobile", "bird"], "cifar100": ["apple", "bear", "cloud"]}
PYTHON, BINARY = FORMS["cifar100"]
each_form = pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name, forms in FORMS.items() for form in forms],
    ids=lambda value: getattr(value, "archive", value),
)


def content_of(name: CifarName, form: CifarForm) -> dict[str, bytes]:
    """A small set in the official form; both forms of a set hold the same."""
    classes, prefix = CLASSES[name], "fine_" if name == "cifar100" else ""
    files: dict[str, bytes] = {}
    for seed, file in enumerate(form.files[:-1]):
        rng = np.random.default_rng(seed)
        number = SIZES.get(file.removesuffix(".bin"), 1)
        data = rng.integers(0, 256, (number, 3072), dtype=np.uint8)
        labels = rng.integers(0, 3, number).tolist()
        if "binary" in form.archive:
            coarse = b"\x09" if prefix else b""
            rows = zip(labels, data, strict=True)
            files[file] = b"".join(coarse + bytes([label]) + row.tobytes() for label, row in rows)
        else:
            names = [f"{file}-{index}.png" for index in range(number)]
            entry = {f"{prefix}labels": labels, "data": data, "filenames": names}
            files[file] = pickle.dumps(entry, protocol=2)
    files[form.names] = "".join(f"{name}\n" for name in [*classes, ""]).encode()
    if "python" in form.archive:
        files[form.names] = pickle.dumps({f"{prefix}label_names": classes}, protocol=2)
    return files


def tar_gz(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.write_bytes(gzip.compress(tar_of(members)))
    return path


def pack(folder: Path, name: CifarName, form: CifarForm) -> Path:
    files = [*content_of(name, form).items(), ("readme.html", b"<html>")]
    members = [(f"{form.folder}/{file}", content) for file, content in reversed(files)]
    return tar_gz(folder / form.archive, members)


def unpack(folder: Path, name: CifarName, form: CifarForm) -> Path:
    place = folder / form.folder
    place.mkdir()
    for file, content in content_of(name, form).items():
        (place / file).write_bytes(content)
    return place


def read(place: Path, name: CifarName = "cifar100", split: Split = "train") -> TransferSplit:
    return cifar.read_cifar(find_cifar(place, name), split=split)


def pixels(split: TransferSplit) -> np.ndarray:
    return split.read(range(len(split.labels)))


def complaint(place: Path, name: CifarName = "cifar100") -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        read(place, name)
    return str(caught.value)


@each_form
@pytest.mark.parametrize("split", ["train", "test"])
def test_torchvision_reads_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: CifarName, form: CifarForm, split: Split
):
    from torchvision.datasets import CIFAR10, CIFAR100

    peer_class, python = CIFAR10 if name == "cifar10" else CIFAR100, FORMS[name][0]
    assert (peer_class.filename, peer_class.base_folder) == (python.archive, python.folder)
    monkeypatch.setattr(peer_class, "_check_integrity", lambda _: True)
    folder = unpack(tmp_path, name, python)
    # its checksum of the class names is looked at apart from the others
    md5 = hashlib.md5((folder / python.names).read_bytes()).hexdigest()
    monkeypatch.setattr(peer_class, "meta", peer_class.meta | {"md5": md5})
    peer = peer_class(str(tmp_path), train=split == "train")
    if form is not python:
        folder = unpack(tmp_path, name, form)
    for place in (folder, pack(tmp_path, name, form)):
        ours = read(place, name, split)
        np.testing.assert_array_equal(pixels(ours).transpose(0, 2, 3, 1), peer.data)
        assert ours.labels.tolist() == peer.targets
        assert list(ours.class_names) == peer.classes
        assert len(set(ours.keys)) == len(peer.targets)


def test_python_comes_before_binary_and_unpacked_before_packed(tmp_path: Path):
    for form in (BINARY, PYTHON):
        pack(tmp_path, "cifar100", form)
    assert find_cifar(tmp_path, "cifar100").paths == [tmp_path / PYTHON.archive]
    place = unpack(tmp_path, "cifar100", BINARY)
    pack(place, "cifar100", PYTHON)
    assert find_cifar(place, "cifar100").paths == [place / name for name in BINARY.files]


def test_nothing_found_is_named(tmp_path: Path):
    key, absent = "transfer_data.root", tmp_path / "absent"
    assert complaint(absent).startswith(f"{key}: {absent} does not exist; download cifar-100-py")
    (tmp_path / "meta").touch()
    assert complaint(tmp_path).startswith(f"{key}: {tmp_path} lacks train, test; download cifar")
    archive = pack(tmp_path, "cifar100", PYTHON)
    assert complaint(archive, "cifar10") == (
        f"{key}: {archive} is a file, but its name is not "
        "cifar-10-python.tar.gz or cifar-10-binary.tar.gz"
    )


@each_form
def test_archives_must_be_the_official_ones(tmp_path: Path, name: CifarName, form: CifarForm):
    path = pack(tmp_path, name, form)
    expected = (
        rf"{path}: this is not the official {path.name}: its sha256 is {sha256_of(path)}, expected "
        rf"{cifar.SHA256S[form.archive]}; fetch .* transfer_data\.verify to false"
    )
    with pytest.raises(ValueError, match=expected):
        find_cifar(path, name).verify()
    find_cifar(unpack(tmp_path, name, form), name).verify()  # unpacked files have no checksum


def test_damaged_archive_is_refused(tmp_path: Path):
    archive = pack(tmp_path, "cifar100", BINARY)
    whole = archive.read_bytes()
    for length in [0, 1, 10, 100, *range(1000, len(whole), 1777), len(whole) - 9, len(whole) - 1]:
        archive.write_bytes(whole[:length])
        assert complaint(archive).startswith(f"{archive}: truncated or damaged")
    for place in range(50, len(whole), len(whole) // 7):  # behind gzip's header
        archive.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert str(archive) in complaint(archive)


def test_hostile_missing_repeated_and_enormous_members(tmp_path: Path):
    path, meta = tmp_path / PYTHON.archive, ("cifar-100-python/meta", b"")
    for members, fault in (
        ([("/etc/passwd", b"")], "'/etc/passwd' points out of the archive"),
        ([meta, ("other/train", b"")], "lacks cifar-100-python/train"),
        ([meta, meta], "cifar-100-python/meta exists twice"),
    ):
        assert f"{path}: {fault}" in complaint(tar_gz(path, members))
    member = tarfile.TarInfo("cifar-100-python/train")
    member.size = 1 << 40
    path.write_bytes(gzip.compress(member.tobuf()))
    assert "too large (1,099,511,627,776 B)" in complaint(path)


def test_wrong_sizes_and_labels_of_binary_files(tmp_path: Path):
    place = unpack(tmp_path, "cifar100", BINARY)
    file = place / "train.bin"
    whole = file.read_bytes()
    for content in (whole[:-1], whole + b"\0", b""):
        file.write_bytes(content)
        expected = f"{file}: the size of {len(content)} bytes is not a multiple of 3074"
        assert complaint(place).startswith(expected)
    file.write_bytes(whole[:3075] + b"\3" + whole[3076:])
    assert complaint(place).endswith("train.bin: fine_labels[1] is 3; expected 0 to 2")
    (place / "fine_label_names.txt").write_text("\n")
    assert complaint(place).endswith("fine_label_names.txt: fine_label_names is empty")


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return unpack(tmp_path, "cifar100", PYTHON)


def write(path: Path, content: object, *, protocol: int = 2) -> None:
    path.write_bytes(pickle.dumps(content, protocol=protocol))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_round_trip(root: Path, images: np.ndarray, protocol: int, order: Any):
    data = np.array(images.reshape(4, -1), order=order)
    content = {b"data": data, b"fine_labels": [0, 1, 2, 0], b"filenames": [b"a"]}
    write(root / "train", content, protocol=protocol)
    split = read(root)
    np.testing.assert_array_equal(pixels(split), images)
    np.testing.assert_array_equal(split.labels, [0, 1, 2, 0])
    assert type(pixels(split)) is np.ndarray
    assert split.keys == tuple(f"train-{index:05d}" for index in range(4))
    names = [b"apple_s_000.png", b"b.png", b"c.png", b"d.png"]
    write(root / "train", content | {b"filenames": names})
    assert read(root).keys == tuple(name.decode() for name in names)


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
    theirs = pickle.loads(content, encoding="bytes")  # what we wrote by hand is a true pickle
    np.testing.assert_array_equal(theirs[b"data"].reshape(images.shape), images)
    (root / "train").write_bytes(content)
    split = read(root)
    np.testing.assert_array_equal(pixels(split), images)
    np.testing.assert_array_equal(split.labels, [2, 1, 0, 2])


class Runs:
    """Unpickles into a call of the system's `touch`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("file", ["train", "meta"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_runs_nothing(root: Path, file: str, protocol: int):
    mark = root / "mark"
    write(root / file, {b"data": Runs(mark)}, protocol=protocol)
    assert f"{file}: not a file of CIFAR's python archive: the file calls " in complaint(root)
    assert not mark.exists()


def test_other_names_are_refused(root: Path):
    for content in (
        b"cbuiltins\neval\n(U\x011tR.",
        b"cnumpy\nload\n.",
        b"cnumpy.core.multiarray\nscalar\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__base__\x93.",
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.",
        # an array whose dtype a file would make: the state of one is no dtype
        b"cnumpy\nndarray\n(K\x01tR(K\x01(K\x01tcnumpy\ndtype\nI00\nU\x01atb.",
    ):
        (root / "train").write_bytes(content)
        assert "train: not a file of CIFAR" in complaint(root)


def test_every_truncation_is_refused(root: Path, images: np.ndarray):
    whole, rng = python2_pickle(images[:1], [0]), np.random.default_rng(0)
    contents = [whole[:n] for n in [*range(200), *range(len(whole) - 100, len(whole))]]
    rows = b"J" + struct.pack("<i", 1)  # more of them than there are bytes
    contents.append(whole.replace(rows, b"J" + struct.pack("<i", 2)))
    for content in [*contents, *(rng.bytes(40) for _ in range(200))]:
        (root / "train").write_bytes(content)
        assert str(root / "train") in complaint(root)


GOOD = np.zeros((2, 3072), np.uint8)


def test_wrong_content_is_named(root: Path):
    for data, labels, message in (
        (np.zeros((2, 3071), np.uint8), [0, 1], "data is of shape (2, 3071); expected 2 x 3072"),
        (np.zeros((0, 3072), np.uint8), [], "data is of shape (0, 3072)"),
        (np.zeros((2, 3072), np.int8), [0, 1], "the array has the dtype 'i1', not u1"),
        (np.zeros((2, 3072), object), [0, 1], "the array has the dtype 'O8'"),
        ([[0] * 3072], [0], "data is no numpy array"),
        (GOOD, [0], "data is of shape (2, 3072); expected 1 x 3072"),
        (GOOD, [0, 3], "fine_labels[1] is 3; expected 0 to 2"),
        (GOOD, [0, -1], "fine_labels[1] is -1"),
        (GOOD, [0, 1.0], "fine_labels[1] is 1.0"),
        (
            GOOD,
            (0, 1),
            "no list 'fine_labels', only ['data', 'fine_labels']; check transfer_data.source",
        ),
    ):
        write(root / "train", {b"data": data, b"fine_labels": labels}, protocol=4)
        assert f"{root}/train: " in (fault := complaint(root))
        assert message in fault
    write(root / "train", [1, 2])
    assert "train: expected a mapping, found list" in complaint(root)
