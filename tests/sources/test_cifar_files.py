"""CIFAR's archives and folders, in both forms: as torchvision reads them, and what is refused."""

import hashlib
import io
import pickle  # noqa: TID251 - writes what the reader is tested on
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from contradiff.sources.cifar import CifarSplit, read_cifar
from contradiff.sources.cifar_files import LAYOUTS, CifarName, Layout, Split, find_cifar

SIZES = {"data_batch_1": 3, "data_batch_2": 2, "train": 6, "test": 2, "test_batch": 2}
CLASSES = {"cifar10": ["airplane", "automobile", "bird"], "cifar100": ["apple", "bear", "cloud"]}
EACH = [(name, layout) for name, layouts in LAYOUTS.items() for layout in layouts]
each_layout = pytest.mark.parametrize(
    ("name", "layout"), EACH, ids=lambda v: getattr(v, "archive", v)
)


def content_of(name: CifarName, layout: Layout) -> dict[str, bytes]:
    """A small set in the official form; both forms of a set hold the same."""
    classes = CLASSES[name]
    prefix = "fine_" if name == "cifar100" else ""
    files: dict[str, bytes] = {}
    for seed, file in enumerate(layout.files[:-1]):
        rng = np.random.default_rng(seed)
        number = SIZES.get(file.removesuffix(".bin"), 1)
        data = rng.integers(0, 256, (number, 3072), dtype=np.uint8)
        labels = rng.integers(0, 3, number).tolist()
        if layout.encoding == "binary":
            coarse = [b"\x09"] * number if name == "cifar100" else [b""] * number
            rows = zip(coarse, labels, data, strict=True)
            files[file] = b"".join(c + bytes([label]) + row.tobytes() for c, label, row in rows)
        else:
            names = [f"{file}-{index}.png" for index in range(number)]
            entry = {f"{prefix}labels": labels, "data": data, "filenames": names}
            files[file] = pickle.dumps(entry, protocol=2)
    if layout.encoding == "binary":
        files[layout.names] = "".join(f"{n}\n" for n in classes).encode() + b"\n"
    else:
        files[layout.names] = pickle.dumps({f"{prefix}label_names": classes}, protocol=2)
    return files


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def pack(folder: Path, name: CifarName, layout: Layout) -> Path:
    path = folder / layout.archive
    with tarfile.open(path, "w:gz") as archive:
        top = tarfile.TarInfo(layout.folder)
        top.type = tarfile.DIRTYPE
        archive.addfile(top)
        add(archive, f"{layout.folder}/readme.html", b"<html>")
        for file, content in reversed(content_of(name, layout).items()):
            add(archive, f"{layout.folder}/{file}", content)
    return path


def unpack(folder: Path, name: CifarName, layout: Layout) -> Path:
    place = folder / layout.folder
    place.mkdir()
    for file, content in content_of(name, layout).items():
        (place / file).write_bytes(content)
    return place


def read(place: Path, name: CifarName, split: Split) -> CifarSplit:
    return read_cifar(find_cifar(place, name, shown_root="data"), name, split=split)


def complaint(place: Path, name: CifarName = "cifar100") -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        read(place, name, "train")
    return str(caught.value)


@each_layout
@pytest.mark.parametrize("split", ["train", "test"])
def test_torchvision_reads_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: CifarName, layout: Layout, split: Split
):
    """Packed or not, python or binary; torchvision reads the unpacked python form alone."""
    from torchvision.datasets import CIFAR10, CIFAR100

    peer_class = CIFAR10 if name == "cifar10" else CIFAR100
    monkeypatch.setattr(peer_class, "_check_integrity", lambda _: True)
    folder = unpack(tmp_path, name, LAYOUTS[name][0])
    for entry in (*peer_class.train_list, *peer_class.test_list, [peer_class.meta["filename"]]):
        assert (folder / entry[0]).is_file()
    # its checksum of the class names is looked at apart from the others
    meta = {
        **peer_class.meta,
        "md5": hashlib.md5((folder / layout_names(name)).read_bytes()).hexdigest(),
    }
    monkeypatch.setattr(peer_class, "meta", meta)
    peer = peer_class(str(tmp_path), train=split == "train")

    if layout.encoding == "binary":
        folder = unpack(tmp_path, name, layout)
    archive = pack(tmp_path, name, layout)
    for place in (folder, archive):
        ours = read(place, name, split)
        np.testing.assert_array_equal(ours.images.transpose(0, 2, 3, 1), peer.data)
        assert ours.labels.tolist() == peer.targets
        assert ours.class_names == peer.classes
        assert len(set(ours.keys)) == len(peer.targets)


def layout_names(name: CifarName) -> str:
    return LAYOUTS[name][0].names


def test_torchvision_expects_the_same_checksum():
    from torchvision.datasets import CIFAR10, CIFAR100

    for peer, name in ((CIFAR10, "cifar10"), (CIFAR100, "cifar100")):
        layout = LAYOUTS[name][0]
        assert (peer.filename, peer.tgz_md5, peer.base_folder) == (
            layout.archive,
            layout.md5,
            layout.folder,
        )


def test_python_comes_before_binary_and_unpacked_before_packed(tmp_path: Path):
    python, binary = LAYOUTS["cifar100"]
    for layout in (binary, python):
        pack(tmp_path, "cifar100", layout)
    assert find_cifar(tmp_path, "cifar100", shown_root="").paths == [tmp_path / python.archive]
    place = unpack(tmp_path, "cifar100", binary)
    pack(place, "cifar100", python)
    files = find_cifar(place, "cifar100", shown_root="")
    assert files.paths == [place / name for name in binary.files]


def test_nothing_found_is_named(tmp_path: Path):
    assert complaint(tmp_path / "absent").startswith("transfer_data.root: data does not exist; ")
    assert complaint(tmp_path).startswith("transfer_data.root: data lacks ")
    assert "put cifar-10-python.tar.gz or cifar-10-binary.tar.gz there" in complaint(
        tmp_path, "cifar10"
    )
    archive = pack(tmp_path, "cifar100", LAYOUTS["cifar100"][0])
    assert complaint(archive, "cifar10") == (
        "transfer_data.root: data is a file, but not "
        "cifar-10-python.tar.gz or cifar-10-binary.tar.gz"
    )


@pytest.mark.parametrize("number", [0, 1])
def test_truncated_archive_is_refused(tmp_path: Path, number: int):
    archive = pack(tmp_path, "cifar100", LAYOUTS["cifar100"][number])
    whole = archive.read_bytes()
    for length in [0, 1, 10, 100, *range(1000, len(whole), 1777), len(whole) - 9, len(whole) - 1]:
        archive.write_bytes(whole[:length])
        assert str(archive) in (message := complaint(archive))
        assert "truncated or damaged" in message
        assert "fetch it again" in message


def test_flipped_byte_is_found(tmp_path: Path):
    archive = pack(tmp_path, "cifar100", LAYOUTS["cifar100"][1])
    whole = archive.read_bytes()
    for place in range(50, len(whole), len(whole) // 7):  # behind gzip's header
        archive.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert str(archive) in complaint(archive)


def test_no_archive_at_all(tmp_path: Path):
    path = tmp_path / "cifar-100-python.tar.gz"
    path.write_bytes(b"<html>404</html>")
    assert "truncated or damaged (Not a gzipped file" in complaint(path)


def hostile(change: Callable[[tarfile.TarInfo], None]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        layout = LAYOUTS["cifar100"][0]
        path = folder / layout.archive
        with tarfile.open(path, "w:gz") as archive:
            for file, content in content_of("cifar100", layout).items():
                add(archive, f"{layout.folder}/{file}", content)
            member = tarfile.TarInfo("cifar-100-python/more")
            change(member)
            archive.addfile(member)
        return path

    return write


def absolute(member: tarfile.TarInfo) -> None:
    member.name = "/etc/passwd"


def upwards(member: tarfile.TarInfo) -> None:
    member.name = "cifar-100-python/../../meta"


def symbolic_link(member: tarfile.TarInfo) -> None:
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"


def hard_link(member: tarfile.TarInfo) -> None:
    member.type, member.linkname = tarfile.LNKTYPE, "cifar-100-python/train"


def device(member: tarfile.TarInfo) -> None:
    member.type = tarfile.CHRTYPE


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (absolute, "'/etc/passwd' points out of the archive"),
        (upwards, "'cifar-100-python/../../meta' points out of the archive"),
        (symbolic_link, "is a link or a device"),
        (hard_link, "is a link or a device"),
        (device, "is a link or a device"),
    ],
)
def test_hostile_members_are_refused(
    tmp_path: Path, change: Callable[[tarfile.TarInfo], None], what: str
):
    message = complaint(hostile(change)(tmp_path))
    assert what in message
    assert "do not unpack it" in message


def test_a_linked_member_is_not_followed(tmp_path: Path):
    """`train` itself is a link to a readable file outside."""
    (tmp_path / "secret").write_text("secret")
    layout = LAYOUTS["cifar100"][0]
    path = tmp_path / layout.archive
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("cifar-100-python/train")
        member.type, member.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        archive.addfile(member)
    assert "is a link or a device" in complaint(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [layout.archive, "secret"]


def test_enormous_member_is_refused_before_it_is_read(tmp_path: Path):
    layout = LAYOUTS["cifar100"][0]
    member = tarfile.TarInfo("cifar-100-python/train")
    member.size = 1 << 40
    path = tmp_path / layout.archive
    with tarfile.open(path, "w:gz") as archive:
        archive.fileobj.write(member.tobuf())  # pyright: ignore[reportOptionalMemberAccess]
    assert "has 1,099,511,627,776 bytes" in complaint(path)


def test_missing_and_repeated_members(tmp_path: Path):
    layout = LAYOUTS["cifar100"][0]
    path = tmp_path / layout.archive
    files = content_of("cifar100", layout)
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "cifar-100-python/meta", files["meta"])
        add(archive, "other/train", files["train"])
    assert f"{path}: lacks cifar-100-python/train" in complaint(path)
    with tarfile.open(path, "w:gz") as archive:
        for _ in range(2):
            add(archive, "cifar-100-python/meta", files["meta"])
    assert "holds cifar-100-python/meta twice" in complaint(path)


def test_pickle_in_an_archive_runs_nothing(tmp_path: Path):
    layout = LAYOUTS["cifar10"][0]
    path = tmp_path / layout.archive
    with tarfile.open(path, "w:gz") as archive:
        for file, content in content_of("cifar10", layout).items():
            bad = b"cos\nsystem\n(X\x04\x00\x00\x00truetR."
            add(archive, f"{layout.folder}/{file}", bad if file == "data_batch_3" else content)
    message = complaint(path, "cifar10")
    assert message.startswith(f"{path}: cifar-10-batches-py/data_batch_3: not a file of CIFAR")
    assert "asks for os.system" in message
    assert len(read(path, "cifar10", "test").labels) == 2  # only what is read is parsed


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_wrong_sizes_of_binary_files(tmp_path: Path, name: CifarName):
    layout = LAYOUTS[name][1]
    place = unpack(tmp_path, name, layout)
    file = place / layout.splits["train"][0]
    whole = file.read_bytes()
    size = 3073 if name == "cifar10" else 3074
    for content in (whole[:-1], whole + b"\0", b""):
        file.write_bytes(content)
        expected = f"{file}: {len(content)} bytes are not a whole number of records of {size}"
        assert complaint(place, name).startswith(expected)


def test_wrong_label_of_a_binary_file(tmp_path: Path):
    layout = LAYOUTS["cifar100"][1]
    place = unpack(tmp_path, "cifar100", layout)
    content = bytearray((place / "train.bin").read_bytes())
    content[3074 + 1] = 3
    (place / "train.bin").write_bytes(content)
    assert complaint(place).endswith("train.bin: fine_labels[1] is 3; expected 0 to 2")
    (place / "fine_label_names.txt").write_text("\n")
    assert complaint(place).endswith("fine_label_names.txt: fine_label_names is empty")


def test_the_other_cifars_pickles_are_named(tmp_path: Path):
    content = content_of("cifar10", LAYOUTS["cifar10"][0])
    (tmp_path / "meta").write_bytes(content_of("cifar100", LAYOUTS["cifar100"][0])["meta"])
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(content["data_batch_1"])
    assert "is it of the other CIFAR?" in complaint(tmp_path)
