"""What dvc.yaml says: which stage makes a file, what a stage needs, and which code it runs."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from contradiff.config import read_params
from contradiff.studies.study import Study, same_number

CHECK = "validate"
"""The stage that reads all code and parameters, and whose result never changes."""


class Graph:
    """The stages of dvc.yaml or dvc.lock: their parameters, and what they read and write."""

    def __init__(self, stages: Mapping[str, Any]) -> None:
        self.stages = {name: stage for name, stage in stages.items() if name != CHECK}
        self.reads = {name: _paths(stage.get("deps")) for name, stage in self.stages.items()}
        self.makers: dict[str, str] = {}
        for name, stage in self.stages.items():
            for kind in ("outs", "metrics", "plots"):
                self.makers |= dict.fromkeys(_paths(stage.get(kind)), name)

    @classmethod
    def read(cls, root: Path) -> "Graph":
        """Read dvc.yaml; raises ValueError if it is missing or malformed."""
        return cls(read_params(root / "dvc.yaml").get("stages", {}))

    def maker(self, path: str) -> str | None:
        """Return the stage that writes a path, or None: then it is code, or checked."""
        places = (path, *(str(parent) for parent in Path(path).parents))
        return next((self.makers[place] for place in places if place in self.makers), None)

    def upstream(self, stages: Sequence[str]) -> list[str]:
        """Return stages and all that they need, each after those that it needs."""
        found: dict[str, None] = {}

        def add(name: str) -> None:
            if name in found or name not in self.stages:
                return
            for path in self.reads[name]:
                if maker := self.maker(path):
                    add(maker)
            found[name] = None

        for name in stages:
            add(name)
        return list(found)

    def check(self, study: Study, name: str) -> None:
        """Raise ValueError if a study's targets are no stages, or leave one of its scores out."""
        where = f"studies/{name}.yaml"
        for target in study.targets:
            if target not in self.stages:
                raise ValueError(f"{where}: targets: dvc.yaml has no stage {target}; correct it")
        run = self.upstream(study.targets or [*self.stages])
        for key in study.keys:
            stage = key.partition(".")[0]
            if stage not in self.stages:
                raise ValueError(f"{where}: columns: {key}: dvc.yaml has no stage {stage}")
            if stage not in run:
                remedy = f"add {stage} to targets"
                raise ValueError(f"{where}: columns: {key}: the targets do not run it; {remedy}")

    def code(self, stages: Sequence[str]) -> list[str]:
        """Return the files and folders of code that the results of stages depend on, sorted."""
        reads = {path for name in self.upstream(stages) for path in self.reads[name]}
        return sorted(path for path in reads if self.maker(path) is None and not _is_built(path))

    def signatures(self, params: Mapping[str, Any]) -> dict[str, str]:
        """Return a digest of each stage's parameters and of those of the stages that it needs.

        Two experiments share a stage's work in DVC's cache if their digests are equal.
        """
        found: dict[str, str] = {}
        for name in self.upstream(list(self.stages)):
            own = {key: same_number(_part(params, key)) for key in _paths(self._params(name))}
            makers = sorted({maker for path in self.reads[name] if (maker := self.maker(path))})
            content = [name, own, [found[maker] for maker in makers]]
            text = json.dumps(content, sort_keys=True)
            found[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return found

    def _params(self, name: str) -> list[Any]:
        return self.stages[name].get("params", [])


def hashes_of(root: Path, paths: Sequence[str]) -> dict[str, str]:
    """Return the hash of files and folders of code in the working tree, as dvc.lock has it."""
    return {path: _hash(root / path) for path in paths if (root / path).exists()}


def _hash(path: Path) -> str:
    if path.is_file():
        return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    files = sorted(
        file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts
    )
    entries = [{"md5": _hash(file), "relpath": file.relative_to(path).as_posix()} for file in files]
    entries.sort(key=lambda entry: entry["relpath"])
    text = json.dumps(entries, sort_keys=True)
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() + ".dir"


def _is_built(path: str) -> bool:
    """Whether a path is no code: the stage that writes it is left out, or is frozen."""
    return path.startswith(("build/", "metrics/", "models/", "data/"))


def _part(params: Mapping[str, Any], key: str) -> Any:
    """Return a section of the parameters, or a single value."""
    value: Any = params
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _paths(entries: Any) -> list[str]:
    """Return the paths of entries, which are `path`, `path: {options}`, or have a key `path`."""
    return list(_each_path(entries or []))


def _each_path(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        elif "path" in entry:
            yield entry["path"]
        else:
            yield from entry
