"""python -m bench: ratios, the table and JSON of the promise, and the list."""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from bench import __main__ as bench
from bench import _promise
from bench._page import replace_between
from bench._turns import Row, compare, ratios

ROW = Row("step", "a peer", "time", 2.3, 1e-7, 1e-5, "note", 2.5, 2.4, 2.6, 5.0, 2.0, 3)


def record(module: str, row: Row) -> _promise.Record:
    return _promise.as_record(module, row) | {"commit": "abc", "date": "2026-11-27"}


def test_a_ratio_is_the_median_of_the_rounds():
    seconds = [(1.0, 2.0), (2.0, 8.0), (1.0, 3.0)]
    assert ratios(seconds, "speed") == (3.0, 2.0, 4.0, 1.0, 3.0, 3)
    assert ratios(seconds, "time") == (1 / 3, 1 / 4, 1 / 2, 1.0, 3.0, 3)


def test_different_results_are_not_timed():
    work = Mock()
    row = compare("x", "y", (work, work), rounds=2, error=lambda: 0.1, tolerance=0.01, goal=1.0)
    assert not row.is_equal
    assert (row.figure, row.reached, work.call_count) == (None, None, 0)
    assert "not timed" in _promise.figure(record("step", row))
    nan = compare("x", "y", (work, work), rounds=2, error=lambda: float("nan"), tolerance=0.01)
    assert not nan.is_equal


def test_equal_results_are_timed_in_turns_after_a_round_to_warm_up():
    order: list[str] = []
    works = (lambda: order.append("ours")), (lambda: order.append("peer"))
    row = compare("x", "y", works, rounds=2, error=lambda: 0.0, tolerance=0.0)
    assert order == ["ours", "peer"] * 3
    assert (row.is_equal, row.rounds, row.reached) == (True, 2, None)


def test_goals_are_least_speeds_or_most_times():
    assert ROW.reached is False
    assert replace(ROW, figure=2.2).reached is True
    assert replace(ROW, kind="speed").reached is True
    assert replace(ROW, kind="speed", figure=2.2).reached is False


def test_table_shows_what_is_missed(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- promise: begin -->\nold\n<!-- promise: end -->\nafter\n")
    probe = Row("probe", "", "speed", None, figure=2.0, lowest=2.0, highest=2.0, rounds=1)
    _promise.write_table(page, [record("step", ROW), record("probe", probe)])
    text = page.read_text()
    assert text.startswith("before\n<!-- promise: begin -->\n")
    assert text.endswith("<!-- promise: end -->\nafter\n")
    assert "old" not in text
    figure = "| step | a peer | 2.50× the time (2.40–2.60) | ≤ 2.3 | **no** |"
    assert f"{figure} 1.0e-07, allowed 1e-05 | note | 2026-11-27, abc, 3 rounds |" in text
    assert "| probe |  | 2.00× as fast |  |  |  |  | 2026-11-27, abc, 1 rounds |" in text
    with pytest.raises(ValueError, match="other: begin"):
        replace_between(tmp_path / "page.md", "other", [])


def test_rows_that_did_not_run_are_kept(tmp_path: Path):
    file = tmp_path / "rows.json"
    _promise.write_json(file, [record("step", ROW), record("repro", ROW)])
    other = replace(ROW, name="new")
    written = _promise.write_json(file, [record("startup", ROW), record("step", other)])
    assert [each["bench"] for each in written] == ["step", "startup", "repro"]
    assert json.loads(file.read_text())["rows"] == written
    assert written[0]["name"] == "new"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"machine": "other"}))
    with pytest.raises(SystemExit, match="another machine"):
        _promise.write_json(file, [record("step", ROW)])


def test_list_names_each_row_and_tool_once(capsys: pytest.CaptureFixture[str]):
    assert bench.main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[0] == " "]
    assert listed == [*_promise.ALL_ROWS, *bench.TOOLS]
    assert {"gpu", "flops", "scale", "same", "smoke"} <= set(bench.TOOLS)
    with pytest.raises(SystemExit):
        bench.main(["nothing"])
    assert "there is no measurement 'nothing'" in capsys.readouterr().err


def test_all_rows_run_and_unequal_ones_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [record("step", ROW)]
    run = Mock(return_value=rows)
    monkeypatch.setattr(_promise, "run", run)
    output = tmp_path / "rows.json"
    assert bench.main(["--output", str(output)]) == 0
    assert run.call_args == ((_promise.ROWS,), {"rounds": 5})
    assert json.loads(output.read_text())["rows"] == rows
    assert "2.50× the time (2.40–2.60), goal 2.3 MISSED" in capsys.readouterr().out
    rows.append(record("probe", replace(ROW, error=1.0)))
    assert bench.main(["probe", "--rounds", "1"]) == 1
