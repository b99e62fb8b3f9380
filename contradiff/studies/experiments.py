"""DVC's experiments of this clone: git commits with parameters, dvc.lock and metrics.

An experiment's name says nothing about what it computed. Its parameters do, and dvc.lock says
whether its metrics come from these parameters: an experiment that ran only some stages still has
the metrics of the commit that it began from.
"""

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from contradiff.config import flatten
from contradiff.studies.members import digest_of
from contradiff.studies.pipeline import Graph
from contradiff.studies.study import look_up, same_number

_REFERENCE = re.compile(r"^refs/exps/([0-9a-f]{2}/[0-9a-f]{38,})/([^/]+)$")
_CURVES = "loss", "reconstruction", "contrastive"
MAX_POINTS = 32
"""Points of a stored training curve; each is an average over consecutive steps."""


@dataclass(frozen=True)
class Experiment:
    """An experiment of DVC. `baseline` is the commit that it began from; `time` is in seconds."""

    name: str
    commit: str
    baseline: str
    time: int
    params: dict[str, Any]

    @property
    def digest(self) -> str:
        """The digest of the parameters."""
        return digest_of(self.params)


@dataclass(frozen=True)
class Result:
    """What an experiment measured.

    `metrics` has dotted keys; `code` has the hash of each file or folder of code that it used;
    `outs` has the hash of each file or folder that DVC stores for it; `curve` is the training.
    """

    metrics: dict[str, Any]
    code: dict[str, str]
    outs: dict[str, str]
    curve: dict[str, list[float]]


def git(root: Path, *arguments: str, stdin: bytes = b"", check: bool = True) -> bytes:
    """Run git in the project; raises ValueError, with git's message, if it fails."""
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, check=False)
    if check and done.returncode:
        raise ValueError(f"git {arguments[0]}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def read_blobs(root: Path, names: Sequence[str]) -> list[bytes | None]:
    """Return the content of objects, such as "HEAD:params.yaml"; None for those that git lacks."""
    answer = git(root, "cat-file", "--batch", stdin="".join(f"{name}\n" for name in names).encode())
    found: list[bytes | None] = []
    place = 0
    for _ in names:
        end = answer.index(b"\n", place)
        header, place = answer[place:end], end + 1
        if header.endswith((b" missing", b" ambiguous")):
            found.append(None)
            continue
        size = int(header.rsplit(b" ", 1)[1])
        found.append(answer[place : place + size])
        place += size + 1
    return found


def environment(**more: str) -> dict[str, str]:
    """Return the environment for DVC: programs beside this Python come first on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, **more}


def list_experiments(root: Path) -> list[Experiment]:
    """Return all experiments of the clone, oldest first, those without params.yaml left out."""
    if not (root / ".git").exists():  # a zip download
        return []
    form = "%(refname) %(objectname) %(committerdate:unix)"
    lines = git(root, "for-each-ref", f"--format={form}", "refs/exps").decode().splitlines()
    found = [(re.match(_REFERENCE, line.split()[0]), line.split()) for line in lines]
    named = [(match, fields) for match, fields in found if match]
    texts = read_blobs(root, [f"{fields[1]}:params.yaml" for _, fields in named])
    known: dict[bytes, dict[str, Any]] = {}
    experiments: list[Experiment] = []
    for (match, fields), text in zip(named, texts, strict=True):
        if text is None:
            continue
        if text not in known:
            known[text] = parse_yaml(text)
        baseline = match[1].replace("/", "")
        experiments.append(Experiment(match[2], fields[1], baseline, int(fields[2]), known[text]))
    return sorted(experiments, key=lambda each: (each.time, each.name))


def read_result(root: Path, experiment: Experiment, *, stages: Sequence[str]) -> Result | str:
    """Return the results of stages, or a sentence that says why they are not this experiment's."""
    names = ["dvc.lock", "metrics/pretrain.csv", *(f"metrics/{name}.json" for name in stages)]
    texts = read_blobs(root, [f"{experiment.commit}:{name}" for name in names])
    lock, curve, *contents = texts
    if lock is None:
        return "it has no dvc.lock"
    locked: dict[str, Any] = parse_yaml(lock).get("stages", {})
    graph = Graph(locked)
    hashes = {
        out["path"]: str(out.get("md5", ""))
        for stage in graph.stages.values()
        for out in stage.get("outs", [])
    }
    metrics: dict[str, Any] = {}
    for name, content in zip(stages, contents, strict=True):
        if name == "pretrain":  # its results are in build/pretrain
            continue
        path = f"metrics/{name}.json"
        if content is None:
            return f"{path} is missing"
        if hashes.get(path) != hashlib.md5(content, usedforsecurity=False).hexdigest():
            return f"{path} is not what the stage {name} wrote"
        metrics |= dict(flatten(json.loads(content)))
    if fault := _first_fault(graph, stages, experiment.params, hashes):
        return fault
    points: dict[str, list[float]] = {}
    if curve is not None and "pretrain" in graph.upstream(stages):
        points = _thinned(curve.decode())
    code = {
        dep["path"]: str(dep["md5"])
        for name in graph.upstream(stages)
        for dep in graph.stages[name].get("deps", [])
        if dep["path"] in graph.code(stages)
    }
    return Result(metrics, dict(sorted(code.items())), hashes, points)


def _first_fault(
    graph: Graph, stages: Sequence[str], params: Mapping[str, Any], hashes: Mapping[str, str]
) -> str | None:
    """Compare dvc.lock with the parameters, and each stage's inputs with what was written."""
    for name in stages:
        if name not in graph.stages:
            return f"the stage {name} has not run"
    for name in graph.upstream(stages):
        stage = graph.stages[name]
        for key, value in stage.get("params", {}).get("params.yaml", {}).items():
            try:
                own = params[key] if key in params else look_up(params, key)
            except KeyError:
                own = None
            if same_number(own) != same_number(value):
                return f"the stage {name} has not run with these parameters ({key})"
        for dep in stage.get("deps", []):
            if dep["path"] in hashes and hashes[dep["path"]] != dep.get("md5"):
                return f"the stage {name} has not run on this {dep['path']}"
    return None


def read_cached(folder: Path | None, md5: str, *parts: str) -> bytes | None:
    """Return a file that DVC stores, or None. `parts` lead to a file in a stored folder."""
    if folder is None or not md5:
        return None
    path = folder / "files/md5" / md5[:2] / md5[2:]
    if not path.is_file():
        return None
    content = path.read_bytes()
    if not parts:
        return content
    inside = {entry["relpath"]: entry["md5"] for entry in json.loads(content)}
    return read_cached(folder, inside.get("/".join(parts), ""))


@cache
def find_cache(root: Path) -> Path | None:
    """Return the folder of DVC's cache, or None if DVC cannot say."""
    command = ["dvc", "cache", "dir"]
    try:
        done = subprocess.run(
            command, cwd=root, env=environment(), capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return root / done.stdout.strip() if done.returncode == 0 else None


def _thinned(text: str) -> dict[str, list[float]]:
    """Return training curves of at most MAX_POINTS points, each an average; six digits."""
    rows = list(csv.DictReader(StringIO(text)))
    size = -(-len(rows) // MAX_POINTS) if rows else 1
    blocks = [rows[place : place + size] for place in range(0, len(rows), size)]
    found: dict[str, list[float]] = {}
    for name in ("step", *_CURVES):
        cells = [[float(row[name]) for row in block if row.get(name)] for block in blocks]
        if all(cells):
            found[name] = [float(f"{sum(each) / len(each):.6g}") for each in cells]
    return found


def parse_yaml(text: bytes) -> dict[str, Any]:
    """Return the mapping in a YAML file; {} if there is another content."""
    from ruamel.yaml import YAML

    content: Any = YAML(typ="safe").load(text.decode())  # pyright: ignore[reportUnknownMemberType]
    return content if isinstance(content, dict) else {}
