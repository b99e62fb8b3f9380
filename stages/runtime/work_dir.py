"""Where an interrupted stage finds its own work again, and never another's.

The folder is named by a fingerprint of all that decides the result: the stage, its parameters, the
content of its inputs, and the source code that it imports. A run with anything else changed gets
another folder, so that a checkpoint is never taken up by a run that would not have written it.
"""

import ast
import hashlib
import json
import shutil
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel

from contradiff.files import hold_lock, sha256_of

PACKAGES = ("contradiff", "stages")


@contextmanager
def keep_until_success(folder: Path, *, stage: str, is_main: bool) -> Generator[Path]:
    """Yield `folder`, created if need be; delete it when the block succeeds, keep it otherwise.

    Of several processes of one run only the main one locks and deletes. Where another run does the
    same work now (experiments side by side, or a killed dvc's child), it is waited for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not is_main:
        yield folder
        return

    def say(owner: str) -> None:
        print(f"{stage}: waiting for process {owner}, which does the same work", file=sys.stderr)

    with hold_lock(folder.parents[1] / "locks" / f"{stage}-{folder.name}", on_wait=say):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


def fingerprint(
    stage: str, *, params: Mapping[str, object], inputs: Sequence[Path], code_root: Path
) -> str:
    """Name the work of a stage: 16 hexadecimal digits that change with whatever decides its result.

    Whole files are hashed, not sizes or dates: latents of other crops have the same sizes.

    Args:
        stage: name of the stage, a module of `stages`.
        params: values or sections; their order does not matter.
        inputs: files and folders, by their paths relative to the working directory.
        code_root: the folder that holds the packages.

    Raises:
        FileNotFoundError: an input does not exist.
    """
    content = {
        "stage": stage,
        "params": params,
        "inputs": {str(path): _hash_tree(path) for path in inputs},
        "code": {
            str(path): sha256_of(code_root / path)
            for path in source_files(f"stages.{stage}", code_root=code_root)
        },
    }
    text = json.dumps(content, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True)
    return str(value)


def _hash_tree(path: Path) -> dict[str, str]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return {str(file.relative_to(path)): sha256_of(file) for file in files}
    return {"": sha256_of(path)}


def source_files(module: str, *, code_root: Path) -> list[Path]:
    """Return the files that `module` consists of: its own, and those of our packages it imports.

    Imports inside functions count, those for type checkers alone do not; nor do `__init__.py`,
    which are empty here. The paths are relative to `code_root` and sorted.
    """
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = Path(*name.split(".")).with_suffix(".py")
        if name not in found and (code_root / path).is_file():
            found[name] = path
            waiting.extend(_imports(code_root / path))
    return sorted(found.values())


def _imports(path: Path) -> Iterator[str]:
    """Names that a file imports from our packages; `from a import b` may mean `a` or `a.b`."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                waiting.extend(node.orelse)
                continue
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom(module=str(package), level=0):
                names = [package, *(f"{package}.{alias.name}" for alias in node.names)]
            case ast.ImportFrom():
                raise ValueError(
                    f"{path}:{node.lineno}: relative import: write the package's full name"
                )
            case _:
                names = []
        yield from (name for name in names if name.split(".")[0] in PACKAGES)
        waiting.extend(ast.iter_child_nodes(node))
