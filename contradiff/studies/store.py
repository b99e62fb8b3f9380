"""The results of a study as text in git: studies/results/NAME.json, one line an experiment.

docs/studies is written from this file alone, so everyone can write it again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from contradiff.files import replace_file
from contradiff.studies.study import FOLDER, point_of

RESULTS = FOLDER / "results"
PAGES = Path("docs/studies")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Record(_Strict):
    """An experiment's results."""

    changes: dict[str, Any] = Field(description="changes to the parameters, without the seed")
    seed: int
    digest: str = Field(description="of all parameters except runtime")
    base: str = Field(description="the parameters without the changes: a key of `params`")
    code: str = Field(description="the code: a key of `code`")
    revision: str = Field(description="the commit that the experiment began from")
    experiment: str = Field(description="the experiment's name and commit")
    time: int = Field(description="when it was finished, in seconds since 1970")
    seconds: dict[str, float] = Field(
        description="stage => seconds that this work took, if they are known"
    )
    metrics: dict[str, Any]
    curve: dict[str, list[float]]


class Aside(_Strict):
    """An experiment that answers the question under other conditions, and which."""

    experiment: str
    changes: dict[str, Any]
    seed: int
    why: str


class Store(_Strict):
    """Content of studies/results/NAME.json."""

    params: dict[str, dict[str, Any]] = Field(default_factory=dict[str, dict[str, Any]])
    code: dict[str, dict[str, str]] = Field(default_factory=dict[str, dict[str, str]])
    records: list[Record] = Field(default_factory=list[Record])
    aside: list[Aside] = Field(default_factory=list[Aside])


def samples_of(name: str) -> Path:
    """Return the folder with a study's pictures of samples, named by digests of parameters."""
    return PAGES / f"{name}-samples"


def path_of(root: Path, name: str) -> Path:
    """Return the file of a study's results."""
    return root / RESULTS / f"{name}.json"


def read_store(root: Path, name: str) -> Store:
    """Read a study's results, which may be none; raises ValueError if the file is damaged."""
    path = path_of(root, name)
    if not path.is_file():
        return Store()
    try:
        return Store.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        remedy = f"`git checkout {path.relative_to(root)}` restores it"
        raise ValueError(f"{path.relative_to(root)}: {where}: {first['msg']}; {remedy}") from None


def write_store(root: Path, name: str, store: Store) -> None:
    """Write a study's results, with one line for each experiment. Without results, write none."""
    if not store.records and not store.aside:
        return
    content = store.model_dump(mode="json")
    lines = [f'  "params": {json.dumps(content["params"], sort_keys=True)}']
    lines.append(f'  "code": {json.dumps(content["code"], sort_keys=True)}')
    for key in ("records", "aside"):
        inner = ",\n".join(f"    {json.dumps(each, ensure_ascii=False)}" for each in content[key])
        lines.append(f'  "{key}": [\n{inner}\n  ]' if inner else f'  "{key}": []')
    with replace_file(path_of(root, name)) as path:
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def add_shared(place: dict[str, Any], content: Mapping[str, Any]) -> str:
    """Add parameters or code to those of the store, and return their key, a digest."""
    text = point_of(content)
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    place[key] = dict(content)
    return key


def drop_unused(store: Store, records: Sequence[Record], aside: Sequence[Aside]) -> Store:
    """Return a store with these entries, and only the parameters and code that they name."""
    bases, codes = {each.base for each in records}, {each.code for each in records}
    return Store(
        params={key: value for key, value in store.params.items() if key in bases},
        code={key: value for key, value in store.code.items() if key in codes},
        records=list(records),
        aside=list(aside),
    )
