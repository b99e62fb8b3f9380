"""Where members lie, and whatever may be wrong with a tar."""

import os
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contradiff.sources import tars
from contradiff.sources.tars import Member, kept_index, sampled_digest, walk_tar
from tests.sources.imagenet_layouts import tar_of

names = st.text("abé/_.", min_size=1, max_size=150).filter(
    lambda name: ".." not in name and not name.startswith("/") and not name.endswith("/")
)


@settings(max_examples=60)
@given(
    files=st.lists(st.tuples(names, st.binary(max_size=1200)), max_size=5),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    is_inner=st.booleans(),
)
def test_members_lie_where_they_are_said_to(
    files: list[tuple[str, bytes]], form: int, is_inner: bool
):
    try:
        content = tar_of(files, format=form)
    except ValueError:  # the oldest format has no long names
        return
    if is_inner:
        content = tar_of([("before", bytes(700)), ("inner.tar", content), ("after", b"?")])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.tar")
        path.write_bytes(content)
        inner = walk_tar(path)[1] if is_inner else None
        members = walk_tar(path, inner=inner)
    start = inner.offset_data if inner else 0
    places = [slice(start + m.offset_data, start + m.offset_data + m.size) for m in members]
    assert [(m.name, content[place]) for m, place in zip(members, places, strict=True)] == files


def test_only_headers_are_read(tmp_path: Path):
    """Three members of 1 TB in a sparse file, in a tar within a tar: reading them takes hours."""
    path, size = tmp_path / "a.tar", 1 << 40
    with path.open("wb") as file:
        outer = tarfile.TarInfo("n.tar")
        outer.size = 3 * (size + 512) + 1024
        file.write(outer.tobuf(tarfile.GNU_FORMAT))
        for number in range(3):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = size
            file.write(member.tobuf(tarfile.GNU_FORMAT))
            file.seek(size, os.SEEK_CUR)
        file.truncate(file.tell() + 2048)
    [outer] = walk_tar(path)
    assert [member.size for member in walk_tar(path, inner=outer)] == [size] * 3
    assert sampled_digest(path)


def with_member(name: str, **fields: Any) -> bytes:
    member = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(member, field, value)
    return member.tobuf() + bytes(1024)


def test_folders_are_passed_over(tmp_path: Path):
    (tmp_path / "a.tar").write_bytes(with_member("folder", type=tarfile.DIRTYPE))
    assert walk_tar(tmp_path / "a.tar") == []


OUT = "points out of the archive"
LINK = "is a link or a device"
TWO = tar_of([("a.jpg", b"a" * 700), ("b.jpg", b"b" * 512)])


def test_what_no_archive_of_images_has_is_refused(tmp_path: Path):
    for content, fault in (
        (with_member("../a.jpg"), rf"'\.\./a\.jpg' {OUT}"),
        (with_member("/etc/a.jpg"), rf"'/etc/a\.jpg' {OUT}"),
        (with_member(f"/{'long' * 60}.jpg"), rf"long\.jpg' {OUT}"),
        (with_member("a.jpg", type=tarfile.SYMTYPE, linkname="b"), rf"'a\.jpg' {LINK}"),
        (with_member("a.jpg", type=tarfile.FIFOTYPE), rf"'a\.jpg' {LINK}"),
        (with_member("a.jpg", type=tarfile.GNUTYPE_SPARSE), rf"'a\.jpg' {LINK}"),
        (TWO.replace(b"b.jpg", b"c.jpg"), r".*damaged \(no header at byte 1536\)"),  # its checksum
        (b"no tar " * 200, "is not a tar archive, or"),
        (b"", "is not a tar archive, or"),
    ):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(ValueError, match=rf"^data\.root: .*/a\.tar.* ?{fault}.*fetch it again"):
            walk_tar(tmp_path / "a.tar")


@pytest.mark.parametrize("is_inner", [False, True])
def test_a_truncated_tar_is_refused_wherever_it_ends(tmp_path: Path, is_inner: bool):
    # of 10240 bytes those behind b.jpg are zero; a whole block of them closes the archive
    last = 2 * 512 + 1024 + 512
    for length in [*range(0, last, 101), *range(last - 3, last + 512, 37), last + 511]:
        cut, path = TWO[:length], tmp_path / f"{length}.tar"
        path.write_bytes(tar_of([("n.tar", cut), ("more", bytes(9000))]) if is_inner else cut)
        inner = walk_tar(path)[0] if is_inner else None
        with pytest.raises(ValueError, match=rf"{length}\.tar.* is truncated or damaged"):
            walk_tar(path, inner=inner)


def test_index_is_found_again_until_the_file_changes(tmp_path: Path):
    tar, cache = tmp_path / "a.tar", tmp_path / "cache"
    tar.write_bytes(tar_of([("a.jpg", b"a")]))
    groups = {"x": [Member("a.jpg", 512, 1)], "y": [], "": [Member("é\udcff", 3, 4)]}
    read: list[Path] = []

    def read_headers(path: Path) -> tars.Members:
        read.append(path)
        return groups

    def damage(text: str) -> None:
        [note] = cache.iterdir()
        identity = '"identity": ' + note.read_text().split('"identity": ')[1].split(",")[0]
        note.write_text(text.replace('"identity": "1"', identity))

    def overwrite() -> None:
        status = tar.stat()
        tar.write_bytes(b"b" + tar.read_bytes()[1:])
        os.utime(tar, ns=(status.st_atime_ns, status.st_mtime_ns))

    damaged = ("", "[]", "{}", '{"identity": "1"}', '{"identity": "1", "groups": {"a": [1]}}')
    changes = [lambda: os.utime(tar, ns=(1, 1)), overwrite, *(partial(damage, t) for t in damaged)]
    for number, change in enumerate([lambda: None, *changes], start=1):
        change()
        for _ in range(2):
            assert kept_index(tar, cache, read_headers) == groups
            assert read == [tar] * number
    kept_index(tar, None, read_headers)
    assert len(read) == 2 + len(changes)


def test_sampled_digest_sees_both_ends_and_the_size(tmp_path: Path):
    path, zeros = tmp_path / "a", bytes(1_000_000)
    digests: set[str] = set()
    for content in (zeros, zeros[1:], zeros + b"\0", b"1" + zeros[1:], zeros[1:] + b"1", b"", b"1"):
        path.write_bytes(content)
        digests.add(sampled_digest(path))
    assert len(digests) == 7
