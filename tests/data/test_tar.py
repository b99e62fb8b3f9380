"""Byte for byte what webdataset and tarfile write."""

import io
import tarfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from webdataset.writer import TarWriter as WebdatasetWriter

from contradiff.data.tar import LARGEST_SIZE, TarWriter, header_of, padded_size

keys = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
contents = st.binary(max_size=1500)


def archive(files: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    writer = TarWriter(buffer)
    for name, content in files:
        writer.add(name, content)
    writer.finish()
    return buffer.getvalue()


@settings(max_examples=50)
@given(samples=st.lists(st.tuples(keys, contents, contents), max_size=12))
@example(samples=[("x" * 96, b"", b"0"), ("x" * 97, b"", b"0"), ("é", b"1", b"2")])
def test_bytes_are_webdatasets(samples: list[tuple[str, bytes, bytes]]):
    buffer = io.BytesIO()
    with WebdatasetWriter(buffer, encoder=False, mtime=0) as writer:
        for key, image, label in samples:
            writer.write({"__key__": key, "jpg": image, "cls": label})
    files = [
        pair
        for key, image, label in samples
        for pair in ((f"{key}.cls", label), (f"{key}.jpg", image))
    ]
    assert archive(files) == buffer.getvalue()


@settings(max_examples=50)
@given(files=st.lists(st.tuples(keys, contents), max_size=30))
def test_tarfile_reads_them(files: list[tuple[str, bytes]]):
    written = archive(files)
    assert len(written) % tarfile.RECORDSIZE == 0
    with tarfile.open(fileobj=io.BytesIO(written)) as file:
        read = [(info.name, file.extractfile(info).read()) for info in file]
        assert all((info.mode, info.mtime, info.uid) == (0o444, 0, 0) for info in file)
    assert read == [(name.rstrip("/"), content) for name, content in files]


@pytest.mark.parametrize("num_bytes", [0, 1, 512, LARGEST_SIZE, LARGEST_SIZE + 1, 10**12])
def test_header_says_any_size(num_bytes: int):
    with tarfile.open(fileobj=io.BytesIO(header_of("a.jpg", num_bytes)), mode="r|") as file:
        assert file.next().size == num_bytes


@given(content=contents)
def test_size_is_foretold(content: bytes):
    buffer = io.BytesIO()
    writer = TarWriter(buffer)
    writer.add("a.jpg", content)
    assert len(buffer.getvalue()) == writer.num_bytes == padded_size(len(content))
