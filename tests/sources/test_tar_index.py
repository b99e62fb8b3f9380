"""Against Python's tarfile, and whatever may be wrong with a tar."""

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contradiff.sources.tar_index import (
    Member,
    identity_of,
    load_index,
    sampled_digest,
    store_index,
    walk_tar,
)
from tests.sources.imagenet_layouts import tar_of


def walk(content: bytes, *, before: int = 0, after: int = 0) -> list[Member]:
    """Index a tar that lies between other bytes."""
    with open(os.memfd_create("tar"), "w+b") as file:  # noqa: PTH123
        file.write(b"?" * before + content + b"?" * after)
        file.flush()
        end = before + len(content)
        return list(walk_tar(file.fileno(), start=before, end=end, shown="a.tar"))


def peer(content: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]


names = st.text("abé/_.", min_size=1, max_size=150).filter(
    lambda name: ".." not in name and not name.startswith("/") and not name.endswith("/")
)


@settings(max_examples=60)
@given(
    files=st.lists(st.tuples(names, st.binary(max_size=1200)), max_size=5),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    before=st.integers(0, 700),
)
def test_members_are_where_tarfile_finds_them(
    files: list[tuple[str, bytes]], form: int, before: int
):
    """Long names, names beyond ASCII, empty files; also as a tar within another file."""
    try:
        content = tar_of(files, format=form)
    except ValueError:  # the oldest format has no long names
        return
    expected = [(name, offset + before, size) for name, offset, size in peer(content)]
    found = walk(content, before=before, after=9)
    assert [(m.name, m.offset, m.num_bytes) for m in found] == expected
    assert len(found) == len(files)


def test_times_in_pax_headers_are_passed_over(tmp_path: Path):
    """Tarfile writes such a header for each real file."""
    (tmp_path / "a.jpg").write_bytes(b"pixels")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(tmp_path, "folder")
    assert [member.name for member in walk(buffer.getvalue())] == ["folder/a.jpg"]


def with_member(name: str, **fields: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name)
        for field, value in fields.items():
            setattr(member, field, value)
        archive.addfile(member)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (with_member("../a.jpg"), r"a\.tar: \.\./a\.jpg has `\.\.` in its path"),
        (with_member("x/../a.jpg"), r"a\.tar: x/\.\./a\.jpg has `\.\.` in its path"),
        (with_member("/etc/a.jpg"), r"a\.tar: /etc/a\.jpg has an absolute path"),
        (with_member(f"/{'long' * 60}.jpg"), r"long\.jpg has an absolute path"),
        (with_member("a.jpg", type=tarfile.SYMTYPE, linkname="b"), r"a\.tar: a\.jpg is a link"),
        (with_member("a.jpg", type=tarfile.LNKTYPE, linkname="b"), r"a\.tar: a\.jpg is a link"),
        (with_member("a.jpg", type=tarfile.FIFOTYPE), r"a\.tar: a\.jpg is no plain file"),
        (b"no tar " * 200, r"a\.tar is no tar archive"),
        (b"", r"a\.tar is truncated at byte 0"),
    ],
)
def test_what_no_archive_of_images_has_is_refused(content: bytes, fault: str):
    with pytest.raises(ValueError, match=rf"^data\.root: {fault}|^data\.root: .*{fault}"):
        walk(content, after=2000)


@settings(max_examples=60)
@given(data=st.data())
def test_a_truncated_tar_is_refused_wherever_it_ends(data: st.DataObject):
    content = tar_of([("a.jpg", b"a" * 700), ("b.jpg", b"b" * 512)])
    # 10240 bytes, of which all behind b.jpg are zero; one block of them closes the archive
    last = 2 * 512 + 1024 + 512
    length = data.draw(st.integers(0, last + 511))
    with pytest.raises(ValueError, match=r"data\.root: a\.tar is truncated"):
        walk(content[:length], after=5000)


def test_damage_in_a_header_is_noticed():
    content = bytearray(tar_of([("a.jpg", b"a" * 700), ("b.jpg", b"b")]))
    content[512 + 1024 + 3] ^= 1
    with pytest.raises(ValueError, match=r"a\.tar is damaged at byte 1536 \(bad checksum\)"):
        walk(bytes(content))


def test_index_is_found_again_until_the_file_changes(tmp_path: Path):
    tar, cache = tmp_path / "a.tar", tmp_path / "cache/a.json"
    tar.write_bytes(tar_of([("a.jpg", b"a")]))
    groups = {"x": [Member("a.jpg", 512, 1)], "y": [], "": [Member("é\udcff", 3, 4)]}
    identity = identity_of(tar)
    assert load_index(cache, identity) is None
    store_index(cache, identity, groups)
    assert load_index(cache, identity_of(tar)) == groups
    os.utime(tar, ns=(1, 1))
    assert load_index(cache, identity_of(tar)) is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"identity": "1", "groups": {"a": [1]}}'])
def test_a_damaged_index_is_as_good_as_none(tmp_path: Path, content: str):
    (tmp_path / "a.json").write_text(content)
    assert load_index(tmp_path / "a.json", "1") is None


def test_sampled_digest_sees_both_ends_and_the_size(tmp_path: Path):
    path = tmp_path / "a"
    digests: set[str] = set()
    zeros = bytes(1_000_000)
    for content in (
        zeros,
        zeros[:-1],
        zeros + b"\0",
        b"1" + zeros[1:],
        zeros[1:] + b"1",
        b"",
        b"1",
    ):
        path.write_bytes(content)
        digests.add(sampled_digest(path))
    assert len(digests) == 7
