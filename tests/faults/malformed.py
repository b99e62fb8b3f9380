"""Damages files of every kind, and reads each one with the reader that the stages use.

`python -m tests.faults malformed` prints how many damaged files get each verdict. A seed chooses
the damages. Each file is read in a process of its own, so that a crash, a hang or a reader that
fills the memory is a verdict too. The exit code is 1 if a verdict is bad.
"""

import argparse
import gzip
import hashlib
import json
import os
import resource
import signal
import struct
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

# A named error is one whose message names the file, or the folder of which the file is a part.
CLEAN, NAMELESS, TRACEBACK = "named error", "nameless error", "traceback"
SAME, OTHER, HANG = "same content", "other content", "hang"
MEMORY, CRASH = "memory", "crash"
VERDICTS = (CLEAN, NAMELESS, TRACEBACK, SAME, OTHER, HANG, MEMORY, CRASH)
LONGEST_MESSAGE, CPU_SECONDS, MAX_BYTES = 2500, 30, 10**9

HARMLESS = {
    "params": "people write this file, and any valid value is one that they may have meant",
    "json": "the file is valid; DVC compares its hash and runs the stages behind it again",
    "raw": "raw data carry no digest; DVC sees their change and runs the stages again",
    "note": "the note of unfinished work is not used, so the work is done again",
}
"""Why a damaged file may be accepted with other content. Any other kind must be refused."""


class Kind(NamedTuple):
    """Files of one kind. `read` gets the folder of all files and returns what it has read.

    `reason` is a key of HARMLESS, or "" if other content must never be accepted. If `may_lack`, a
    missing file only means that work begins anew.
    """

    name: str
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    reason: str = ""
    may_lack: bool = False


class Case(NamedTuple):
    """One damaged file. `content` is None for a missing file, and False for a folder."""

    kind: Kind
    file: str
    damage: str
    content: bytes | bool | None


class Outcome(NamedTuple):
    """What a reader did with a case: its verdict, and the message of its error."""

    case: Case
    verdict: str
    message: str

    @property
    def is_good(self) -> bool:
        """Whether nothing wrong passed for right, and the error (if any) names the file."""
        kind = self.case.kind
        lacks = kind.may_lack and self.case.damage in {"missing", "folder"}
        is_excused = self.verdict == OTHER and (kind.reason != "" or lacks)
        return is_excused or self.verdict in {CLEAN, SAME}


def cases_of(kinds: Sequence[Kind], folder: Path, *, seed: int) -> list[Case]:
    """Damage each file of each kind in each way."""
    return [
        Case(kind, file, damage, content)
        for number, kind in enumerate(kinds)
        for place, file in enumerate(kind.files)
        for damage, content in damages(
            (folder / file).read_bytes(), file, np.random.default_rng([seed, number, place])
        )
    ]


def damages(content: bytes, name: str, rng: np.random.Generator) -> Iterator[tuple[str, Any]]:
    """Yield ways to damage a file: their name, and the damaged content."""
    suffixes = Path(name).suffixes
    yield "missing", None
    yield "folder", False
    yield "empty", b""
    yield "cut", content[: int(rng.integers(1, len(content)))]
    yield "cut by one", content[:-1]
    yield "grown", content + rng.bytes(40)
    yield "noise", rng.bytes(len(content))
    yield "words", b"This is a page of a server: 404.\n"
    yield "not UTF-8", b"\xff\xfe" + content
    hole = int(rng.integers(max(1, len(content) - 64)))
    yield "hole", content[:hole] + bytes(min(64, len(content) - hole)) + content[hole + 64 :]
    for number in range(3):
        place, bit = int(rng.integers(len(content))), 1 << int(rng.integers(8))
        flipped = bytes([content[place] ^ bit])
        yield f"bit {number}", content[:place] + flipped + content[place + 1 :]
    if ".json" in suffixes:
        yield from json_damages(json.loads(content), rng)
    if ".yaml" in suffixes:
        yield "deep", b"a: " + b"[" * 5000
        yield "twice", content + b"\nseed: 1\n"
        yield "tab", content.replace(b"  ", b"\t")
        bomb = [b"a: &a [x, x, x, x, x, x, x, x, x]"]
        bomb += [b"%c: &%c [%s]" % (n, n, b", ".join([b"*%c" % (n - 1)] * 9)) for n in b"bcdefghij"]
        yield "bomb", content + b"\n" + b"\n".join(bomb)
        yield "number", content.replace(b"seed: 0", b"seed: " + b"9" * 5000)
    if ".safetensors" in suffixes:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        yield "long header", (2**62).to_bytes(8, "little") + content[8:]
        first = min(header.keys() - {"__metadata__"})
        huge = {**header, first: {**header[first], "shape": [2**40, 2**40]}}
        for damage, changed in (("huge", huge), ("bare", {}), ("renamed", {"x": header[first]})):
            text = json.dumps(changed).encode()
            yield damage, len(text).to_bytes(8, "little") + text + content[8 + size :]
    if suffixes[-2:] == [".tar", ".gz"]:
        yield "bomb", gzip.compress(bytes(1 << 26), 1) * 24
        yield "cut inside", gzip.compress(gzip.decompress(content)[:-2000])
    if ".png" in suffixes:
        yield "bomb", png_of_size(60_000)


def json_damages(content: dict[str, Any], rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Yield ways to damage a JSON object: their name, and the damaged file."""
    yield "deep", b"[" * 100_000
    yield "list", b"[1]"
    yield "null", b"null"
    yield "NaN", json.dumps(dict.fromkeys(content, float("nan"))).encode()
    yield "number", b'{"a": ' + b"9" * 5000 + b"}"
    for key, value in content.items():
        yield f"without {key}", json.dumps({k: v for k, v in content.items() if k != key}).encode()
        wrong = [None, [], {}, "x", -1, float("inf")][int(rng.integers(6))]
        if type(wrong) is not type(value):
            yield f"wrong {key}", json.dumps({**content, key: wrong}).encode()


def png_of_size(side: int) -> bytes:
    """Return a small PNG that says that it has `side` by `side` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def judge(case: Case, folder: Path, expected: str) -> Outcome:
    """Put the damaged file into `folder`, read it in another process, and put the file back."""
    path = folder / case.file
    kept = path.read_bytes()
    try:
        path.unlink()
        if case.content is False:
            path.mkdir()
        elif isinstance(case.content, bytes):
            path.write_bytes(case.content)
        verdict, message = _in_child(partial(read_once, case.kind, folder))
    finally:
        if path.is_dir():
            path.rmdir()
        path.parent.mkdir(exist_ok=True)  # a reader may delete the folder of unusable work
        path.write_bytes(kept)
    if verdict == "error":
        is_named = path.name in message or f"{path.parent}" in message
        verdict = CLEAN if is_named and len(message) <= LONGEST_MESSAGE else NAMELESS
    elif verdict == "read":
        verdict = SAME if message == expected else OTHER
    return Outcome(case, verdict, message)


def read_once(kind: Kind, folder: Path) -> tuple[str, str]:
    """Return "read" and a hash of the content, or what went wrong and the message."""
    try:
        return "read", digest_of(kind.read(folder))
    except (ValueError, OSError) as error:  # what `execute` prints without a traceback
        return "error", str(error)
    except MemoryError as error:
        return MEMORY, repr(error)
    except Exception as error:  # noqa: BLE001 - that is the verdict
        return TRACEBACK, f"{type(error).__name__}: {error}"[:2000]


def _in_child(read: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    """Call `read` in a forked process with limits of CPU time and memory."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            os.close(receiver)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * os.sysconf("SC_PAGE_SIZE") + 4 * MAX_BYTES  # the machine survives
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            answer = read()
            used = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
            answer = (MEMORY, f"{used:,} bytes") if used > MAX_BYTES else answer
            with os.fdopen(sender, "wb") as file:
                file.write(json.dumps(answer).encode())
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver, "rb") as file:
        content = file.read()
    status = os.waitpid(child, 0)[1]
    if content:
        verdict, message = json.loads(content)
        return verdict, message
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return (HANG if number in {signal.SIGXCPU, signal.SIGKILL} else CRASH), f"signal {number}"


def digest_of(value: object) -> str:
    """Return a hash of what a reader has returned."""
    return hashlib.sha256(repr(_plain(value)).encode(errors="replace")).hexdigest()


def _plain(value: Any) -> Any:  # noqa: PLR0911 - one for each type
    match value:
        case Tensor():
            content = value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
            return [str(value.dtype), *value.shape, content]
        case np.ndarray():
            return [str(value.dtype), *value.shape, value.tobytes()]
        case nn.Module():
            return _plain(value.state_dict())
        case BaseModel():
            return _plain(dict(value))
        case Mapping():
            return sorted((str(key), _plain(entry)) for key, entry in value.items())
        case list() | tuple():
            return [_plain(entry) for entry in value]
        case _ if is_dataclass(value):
            return [_plain(getattr(value, field.name)) for field in fields(value)]
        case _:
            return repr(value)


@dataclass(frozen=True)
class Results:
    """All outcomes, and the table that shows them."""

    outcomes: Sequence[Outcome]

    @property
    def bad(self) -> list[str]:
        """Return a line for each outcome in which something wrong passed, or a message is bad."""
        return [
            f"{case.kind.name}: {case.file}, {case.damage}: {verdict}: {message[:300]}"
            for case, verdict, message in self.outcomes
            if not Outcome(case, verdict, message).is_good
        ]

    def table(self) -> str:
        """Return the number of each verdict for each kind of file, and the reasons."""
        kinds = list(dict.fromkeys(outcome.case.kind for outcome in self.outcomes))
        counts = Counter((each.case.kind.name, each.verdict) for each in self.outcomes)
        total = Counter(each.verdict for each in self.outcomes)
        shown = [verdict for verdict in VERDICTS if total[verdict]]
        lines = [f"{'kind of file':<30}" + "".join(f"{verdict:>16}" for verdict in shown)]
        for kind in kinds:
            numbers = (counts[kind.name, verdict] or "" for verdict in shown)
            lines.append(f"{kind.name:<30}" + "".join(f"{number:>16}" for number in numbers))
        sums = "".join(f"{total[verdict]:>16}" for verdict in shown)
        lines += [f"{f'{len(self.outcomes)} damaged files':<30}{sums}", ""]
        for reason in sorted({e.case.kind.reason for e in self.outcomes if e.verdict == OTHER}):
            names = ", ".join(kind.name for kind in kinds if kind.reason == reason)
            if reason:
                lines.append(f"{names}: other content is harmless, because {HARMLESS[reason]}")
        return "\n".join([*lines, *(f"BAD: {line}" for line in self.bad)])


def run(folder: Path, *, seed: int = 0, stride: int = 1, only: str = "") -> Results:
    """Write good files of all kinds to `folder`; judge every `stride`-th damaged file.

    `only` is a part of the names of the kinds that are judged.
    """
    from tests.faults.good_files import write_good_files

    kinds = [kind for kind in write_good_files(folder) if only in kind.name]
    expected: dict[str, str] = {}
    for kind in kinds:
        verdict, expected[kind.name] = read_once(kind, folder)
        assert verdict == "read", f"{kind.name}: good files are refused: {expected[kind.name]}"
    cases = cases_of(kinds, folder, seed=seed)[seed % stride :: stride]
    return Results([judge(case, folder, expected[case.kind.name]) for case in cases])


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults malformed", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stride", type=int, default=1, help="judge every n-th file only")
    parser.add_argument("--only", default="", help="judge only kinds whose name contains this")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        results = run(Path(folder), **vars(options))
    print(results.table())
    sys.exit(bool(results.bad))
