"""stages.track: the page of the run, beside the runs of studies/results with another λ."""

import copy
from pathlib import Path
from typing import Any

import pytest

from contradiff.studies.store import Record, Store, add_shared, write_store
from stages import track
from tests.settings import TINY

FLAT: dict[str, Any] = {
    f"{name}.{key}": value
    for name, section in TINY.items()
    if name not in {"seed", "runtime"}
    for key, value in section.items()
}


def record_of(store: Store, *, weight: float, seed: int, **more: Any) -> Record:
    changes = {"loss.lambda": weight, **more}
    base = {key: value for key, value in FLAT.items() if key not in changes}
    facts: dict[str, Any] = {"digest": "", "code": "", "experiment": "", "time": 0}
    facts |= {"revision": f"{weight:07}", "seconds": {}, "curve": {}}
    facts["metrics"] = {"probe.top1": 0.7 + weight}
    base_key = add_shared(store.params, base)
    return Record(changes=changes, seed=seed, base=base_key, **facts)


def test_only_runs_that_differ_in_the_weight_alone_stand_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "studies/results").mkdir(parents=True)
    assert track.other_weights(TINY) == []
    store = Store()
    store.records = [
        record_of(store, weight=0, seed=0),
        record_of(store, weight=1, seed=0),
        record_of(store, weight=0.01, seed=1),
        record_of(store, weight=0.001, seed=0, **{"lora.rank": 4}),
    ]
    write_store(tmp_path, "table8", store)
    # Another study has the same run with other scores.
    more = Store()
    more.records = [record_of(more, weight=1, seed=0)]
    more.records[0].metrics = {"score.fid": 9.0}
    write_store(tmp_path, "table9", more)
    found = track.other_weights(copy.deepcopy(TINY) | {"runtime": {"device": "cpu"}})
    one = {"probe.top1": 1.7, "score.fid": 9.0}
    assert found == [(0, "0000000", {"probe.top1": 0.7}), (1, "0000001", one)]
    (tmp_path / "studies/results/table8.json").write_text('{"records": [{}], "params": {}}')
    with pytest.raises(ValueError, match=r"^studies/results/table8.json: .*git checkout"):
        track.other_weights(TINY)
