"""Sizes as people say them, and refusals that say what would do."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from contradiff.files import SPARE_BYTES, check_free_space, describe_bytes, explain_full_disk


def leave_free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    usage = shutil.disk_usage(".")._replace(free=num_bytes)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [(0, "0.0 kB"), (999_949, "999.9 kB"), (1_000_000, "1.0 MB"), (163_840_000_000, "163.8 GB")],
)
def test_sizes_are_in_decimal_units(num_bytes: int, shown: str):
    assert describe_bytes(num_bytes) == shown


def test_what_fits_with_some_to_spare_is_let_pass_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    leave_free(monkeypatch, SPARE_BYTES + 5_000_000)
    check_free_space(tmp_path, 5_000_000)
    with pytest.raises(ValueError, match=r"5\.1 MB are to be .* free 100\.0 kB more") as error:
        check_free_space(tmp_path, 5_100_000)
    assert str(error.value).startswith(str(tmp_path.resolve()))
    with pytest.raises(ValueError, match=r"larger disk, or lower latents\.views$"):
        check_free_space(tmp_path, 5_100_000, ways_out="lower latents.views")


def test_nothing_to_write_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    leave_free(monkeypatch, 0)
    check_free_space(tmp_path, 0)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_explained(tmp_path: Path, number: int):
    fault = rf"^{tmp_path}: no space is left .*run the same command again"
    with pytest.raises(ValueError, match=fault), explain_full_disk(tmp_path):
        raise OSError(number, os.strerror(number))


def test_other_errors_pass_as_they_are(tmp_path: Path):
    with pytest.raises(PermissionError), explain_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "no")
