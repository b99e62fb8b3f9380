"""An interrupted writer leaves what was there before."""

from pathlib import Path

import pytest

from contradiff.files import replace_dir, replace_file, sha256_of


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_at_the_end_only(tmp_path: Path):
    path = tmp_path / "made" / "here" / "file.txt"
    with replace_file(path) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == path.parent  # one file system, so that the rename is atomic
        assert not path.exists()
    assert path.read_text() == "whole"
    assert names(path.parent) == ["file.txt"]


def test_failure_keeps_the_earlier_file(tmp_path: Path):
    path = tmp_path / "file.txt"
    path.write_text("earlier")

    def write() -> None:
        with replace_file(path) as temporary:
            temporary.write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "earlier"
    assert names(tmp_path) == ["file.txt"]


def test_folder_replaces_the_earlier_one_whole(tmp_path: Path):
    path = tmp_path / "made" / "folder"
    for name in ("first", "second"):
        with replace_dir(path) as temporary:
            (temporary / name).touch()
        assert names(path) == [name]
    assert names(path.parent) == ["folder"]


def test_failure_keeps_the_earlier_folder(tmp_path: Path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "earlier").touch()

    def write() -> None:
        with replace_dir(path) as temporary:
            (temporary / "half").touch()
            raise SystemExit(143)

    with pytest.raises(SystemExit):
        write()
    assert names(path) == ["earlier"]
    assert names(tmp_path) == ["folder"]


def test_leftover_of_a_killed_writer_is_no_part_of_the_next_folder(tmp_path: Path):
    path = tmp_path / "folder"
    with replace_dir(path) as temporary:
        pass
    temporary.mkdir()  # as SIGKILL leaves it, and the process id comes round again
    (temporary / "stale").touch()
    with replace_dir(path) as temporary:
        assert names(temporary) == []


def test_sha256_is_that_of_the_standard(tmp_path: Path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
