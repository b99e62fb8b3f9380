"""An interrupted write leaves the old file; a full disk gives a message that says what to do."""

import errno
import os
import resource
import shutil
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from safetensors import SafetensorError

from contradiff import files
from contradiff.files import hold_lock, replace_dir, replace_file


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


FULL = "no space is left on the disk .* Delete some files, then run the same command again"
READ_ONLY = r"it cannot be written \(Read-only file system\)\. Make .* writable, then run"


def os_error(number: int, *names: str) -> OSError:
    return OSError(number, os.strerror(number), *names)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (os_error(errno.ENOSPC), FULL),
        (os_error(errno.EDQUOT), FULL),
        (SafetensorError("I/O error: No space left on device (os error 28)"), FULL),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]), FULL),
        (os_error(errno.EROFS, ".a.part"), READ_ONLY),
        (SafetensorError("I/O error: Read-only file system (os error 30)"), READ_ONLY),
        (os_error(errno.EFBIG), r"it could not be written \(File too large\)$"),
    ],
)
def test_a_failed_write_names_the_file_and_what_to_do(
    tmp_path: Path, error: Exception, message: str
):
    path = tmp_path / "build/score.json"
    for replace, written in ((replace_file, path), (replace_dir, path.parent)):
        with pytest.raises(ValueError, match=f"^{written}: {message}"), replace(written):
            raise error
    # A file in a folder that is not complete yet is shown under its final name.
    with (
        pytest.raises(ValueError, match=f"^{path}: {message}"),
        replace_dir(path.parent) as temporary,
        replace_file(temporary / path.name),
    ):
        raise error
    assert names(path.parent) == []


def test_a_lock_that_cannot_be_written_is_named(tmp_path: Path):
    """An error while the file is closed must not replace the one with the name."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as on a full disk
    try:
        with (
            pytest.raises(ValueError, match=rf"^{tmp_path}/locks/a: it could not be written"),
            hold_lock(tmp_path / "locks/a"),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with hold_lock(tmp_path / "locks/a"):
        assert (tmp_path / "locks/a").read_text() == str(os.getpid())


@pytest.mark.parametrize(
    "error",
    [
        os_error(errno.EACCES, "/data/raw/a.png"),
        os_error(errno.ENOENT, "/data/raw/a.png"),
        ConnectionError("the server is away"),
        SafetensorError("header too small"),
        KeyError("a bug"),
    ],
)
def test_other_errors_inside_a_write_stay_as_they_are(tmp_path: Path, error: Exception):
    with pytest.raises(type(error)) as caught, replace_file(tmp_path / "score.json"):
        raise error
    assert caught.value is error


def test_a_folder_without_permission_is_named(tmp_path: Path):
    """As root, nothing is forbidden: the errors of `mkdir` and `open` are raised here."""
    path = tmp_path / "build/score.json"
    for refused in (path.parent, path.with_name(".score.json.1.part")):
        expected = pytest.raises(ValueError, match=rf"^{path}: it .*Permission denied")
        with expected, replace_file(path):
            raise os_error(errno.EACCES, str(refused))


@pytest.mark.parametrize("is_zombie", [False, True])
def test_what_killed_processes_left_is_deleted(tmp_path: Path, *, is_zombie: bool):
    killed = subprocess.Popen(["true"])
    # A zombie is one that nobody has waited for: WNOWAIT leaves it so.
    os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)
    if not is_zombie:
        killed.wait()
    of_killed = tmp_path / f".latents.{killed.pid}.part"
    of_living, of_others = (tmp_path / f".latents.{os.getppid()}.part", tmp_path / ".index.1.part")
    for folder in (of_killed, of_living, of_others):
        folder.mkdir()
        (folder / "half").touch()
    with replace_dir(tmp_path / "latents"):
        pass
    killed.wait()
    assert names(tmp_path) == sorted([".index.1.part", of_living.name, "latents"])


def test_a_linked_file_is_the_same_and_without_links_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (source := tmp_path / "a").write_text("whole")
    files.link_or_copy(source, tmp_path / "b")
    assert source.samefile(tmp_path / "b")
    monkeypatch.setattr(os, "link", Mock(side_effect=os_error(errno.EXDEV)))
    files.link_or_copy(source, tmp_path / "c")
    assert (tmp_path / "c").read_text() == "whole"
    assert not source.samefile(tmp_path / "c")
