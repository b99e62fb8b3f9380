"""Compares the processes of several machines, before they work: code, parameters, shared folder."""

from stages.runtime.work_dir import code_digest

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contradiff.config import flatten

SECONDS_TO_APPEAR = 10.0
"""How long a new file may take to appear on other machines."""


def check_agreement(params: Mapping[str, object], root: Path) -> None:
    """Raise the same ValueError in all processes if the machines do not work on the same thing.

    The code, the `params`, and the folders build/ and .work/ must be the same. Processes that one
    launcher has started on one machine are not compared.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        return
    from accelerate.utils import gather_object

    folders = [root / ".work", Path("build").absolute()]
    token = f".seen-{os.getpid()}-{time.time_ns()}"
    is_main = os.environ["RANK"] == "0"
    tokens = [folder / token for folder in folders] if is_main else []
    try:
        for path in tokens:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        where = f"{socket.gethostname()}:{Path.cwd()}"
        mine = {"where": where, "token": token, "code": code_digest(), "params": dict(params)}
        every: list[dict[str, Any]] = gather_object([mine])
        first = every[0]
        unseen = [str(path) for path in folders if not _appears(path / first["token"])]
        for other, missing in zip(every, gather_object([unseen]), strict=True):
            if fault := _difference(first, other, missing):
                raise ValueError(fault)
    finally:
        for path in tokens:
            path.unlink(missing_ok=True)


def _difference(first: Mapping[str, Any], other: Mapping[str, Any], unseen: list[str]) -> str:
    if other["code"] != first["code"]:
        what = "has other code in contradiff/ or stages/ than"
        return f"{other['where']} {what} {first['where']}; check out the same commit in both"
    mine, theirs = (dict(flatten(each["params"])) for each in (first, other))
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) != theirs.get(key):
            values = f"{mine.get(key)} in {first['where']}, but {theirs.get(key)}"
            where = f"in {other['where']}; give all machines the same file"
            return f"params.yaml: {key} is {values} {where}"
    if unseen:
        what = f"{other['where']} does not see what {first['where']} writes: {unseen[0]} is not"
        return f"{what} the same folder; put build/ and .work/ where all machines see them"
    return ""


def _appears(path: Path) -> bool:
    end = time.monotonic() + SECONDS_TO_APPEAR
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
