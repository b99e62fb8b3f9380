"""bench.scale with few images: the trials run, and the tables say where figures come from."""

from pathlib import Path

import pytest

from bench import scale


def test_trials_do_what_they_say(tmp_path: Path):
    scale.write_indexes(tmp_path, 9000)()
    pairs = scale._open(tmp_path)
    assert pairs.sizes == (4096, 4096, 4096)
    assert scale.hash_indexes(tmp_path, 0)() == pairs.digest
    seconds, megabytes = scale.measured(scale.draw_order, tmp_path, 0)
    assert seconds >= 0
    assert megabytes >= 0
    assert len(scale._list(30000).splits["train"]) == 30000
    plan = scale.plan_images(30000)()
    assert isinstance(plan, list)
    scale.save_state(tmp_path, 1000)()
    assert (tmp_path / "state.safetensors").stat().st_size > 12000


def test_tables_say_what_breaks():
    names = (
        *("write both indexes", "open both indexes", "list, check and divide among shards"),
        "save the state of a training",
    )
    tried = {name: scale.Tried(name, 1.0, 3000.0) for name in names}
    lines = list(scale.tables(tried, 10_000_000))
    widths = [line.count("|") for line in lines if line.startswith("|")]
    assert widths[:6] == [4] * 6
    assert any(line.startswith("| 1.3M | 8 |") and line.endswith("| nothing |") for line in lines)
    [largest] = [line for line in lines if line.startswith("| 400M | 256 |")]
    assert "2 images a GPU of a batch of 512 (8.0 ×)" in largest
    assert "logistic regression" in largest


@pytest.mark.parametrize(("number", "text"), [(90, "90.0 s"), (7300, "2.0 h"), (1e6, "11.6 days")])
def test_times_have_a_fitting_unit(number: float, text: str):
    assert scale._time(number) == text
