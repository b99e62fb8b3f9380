"""An interrupted write leaves the old file; a full disk gives a message that says what to do."""

import errno
import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from contradiff import files
from contradiff.files import replace_dir, replace_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def interrupted(writer: AbstractContextManager[Path], write: Any) -> None:
    def begin() -> None:
        with writer as temporary:
            write(temporary)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin()


def test_a_file_appears_at_the_end_only(tmp_path: Path):
    path = tmp_path / "made" / "here" / "file.txt"
    with replace_file(path) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == path.parent  # the same file system makes the rename atomic
        assert not path.exists()
    assert path.read_text() == "whole"
    interrupted(replace_file(path), lambda temporary: temporary.write_text("ha"))
    assert (path.read_text(), names(path.parent)) == ("whole", ["file.txt"])


def test_a_folder_replaces_the_earlier_one_whole(tmp_path: Path):
    path = tmp_path / "made" / "folder"
    for name in ("first", "second"):
        with replace_dir(path) as temporary:
            (temporary / name).touch()
        assert names(path) == [name]
    interrupted(replace_dir(path), lambda temporary: (temporary / "half").touch())
    assert (names(path), names(path.parent)) == (["second"], ["folder"])
    # Files left after a SIGKILL do not enter a new folder of a process with the same id.
    with replace_dir(path) as temporary:
        pass
    temporary.mkdir()
    (temporary / "stale").touch()
    with replace_dir(path) as temporary:
        assert names(temporary) == []


def test_sha256_is_that_of_the_standard(tmp_path: Path):
    path = tmp_path / "abc"
    path.write_bytes(b"abc")  # the example of FIPS 180-2, appendix B.1
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256_of(path) == digest


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [(0, "0.0 kB"), (999_949, "999.9 kB"), (1_000_000, "1.0 MB"), (163_840_000_000, "163.8 GB")],
)
def test_sizes_are_in_decimal_units(num_bytes: int, shown: str):
    assert files.describe_bytes(num_bytes) == shown


def test_what_fits_with_some_to_spare_may_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(".")._replace(free=files.SPARE_BYTES + 5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    files.check_free_space(tmp_path, 5_000_000)
    with pytest.raises(ValueError, match=r"5\.1 MB are to be .* free 100\.0 kB more") as error:
        files.check_free_space(tmp_path, 5_100_000)
    assert str(error.value).startswith(str(tmp_path.resolve()))
    with pytest.raises(ValueError, match=r"larger disk, or lower latents\.views$"):
        files.check_free_space(tmp_path, 5_100_000, ways_out="lower latents.views")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    files.check_free_space(tmp_path, 0)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_explained(tmp_path: Path, number: int):
    fault = rf"^{tmp_path}: no space is left .*run the same command again"
    with pytest.raises(ValueError, match=fault), files.explain_full_disk(tmp_path):
        raise OSError(number, os.strerror(number))
    with pytest.raises(PermissionError), files.explain_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "no")
