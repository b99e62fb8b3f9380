"""bench.gpu on the tiny preset, on the CPU; and the rig's guards."""

import json
import time
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench._rig import Rig, line

CPU = torch.device("cpu")


@pytest.mark.slow
def test_variants_give_the_same_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with torch.random.fork_rng(devices=[]):
        groups = "matmul,training,sampling,features,correctness"
        gpu.main(["--tiny", "--output", str(tmp_path / "gpu.json"), "--rows", groups])
    found = json.loads((tmp_path / "gpu.json").read_text())
    rows = {row["row"]: row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) > 20
    assert not [row for row in rows.values() if "failed" in row or "skipped" in row]
    assert not [row for row in rows.values() if not row.get("same", True)]
    assert 0 < found["error_of_bf16"] < 0.1
    assert "equal, bit for bit" in rows["resuming"]["note"]
    table = capsys.readouterr().out.splitlines()[2:]
    assert [text.startswith(name) for text, name in zip(table, rows, strict=True)]
    # Half passes for features cost less than whole ones; guidance costs twice as much.
    ours, theirs = rows["features, as they are, 4 images"], rows["training, as it is, 4 images"]
    assert 0 < ours["flops"] < theirs["flops"]
    once, twice = (rows[f"sampling in bf16, as it is, batch 2{end}"] for end in ("", " guided"))
    assert twice["flops"] == pytest.approx(2 * once["flops"], rel=0.01)


def test_a_row_that_fails_does_not_fit_or_never_ends_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rig = Rig(CPU, seconds=1000.0, output=tmp_path / "rows.json")
    one, other = torch.ones(3), torch.tensor([1.0, 1.0, 2.0])
    rig.measure("one", lambda: one, images=1, flops=1, reference="same", needs=0)
    rig.measure("other", lambda: other, images=1, reference="same", tolerance=0.1, needs=0)
    rig.measure("broken", lambda: one @ torch.ones(4), images=1, needs=0)
    monkeypatch.setattr(rig, "left", lambda: 1.0)
    rig.measure("large", lambda: one, images=1, needs=60)
    rig.attempt("endless", lambda: time.sleep(60) or {}, needs=0)
    texts = [line(row) for row in json.loads((tmp_path / "rows.json").read_text())["rows"]]
    assert texts[0].endswith(" 0.0e+00")
    assert texts[1].endswith(" 5.8e-01 NOT EQUAL")
    assert "failed: RuntimeError" in texts[2]
    assert "skipped: needs 60 s" in texts[3]
    assert "failed: TimeoutError" in texts[4]
