"""contradiff.imports: the seconds of slow imports."""

import gc
import time

import pytest

from contradiff import imports


def test_seconds_of_all_blocks_are_added(monkeypatch: pytest.MonkeyPatch):
    clock = iter([10.0, 13.0, 20.0, 20.5])
    monkeypatch.setattr(imports, "_seconds", [])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert imports.seconds_of_slow_imports() == 0
    for _ in range(2):
        with imports.slow_import():
            pass
    assert imports.seconds_of_slow_imports() == pytest.approx(3.5)


def test_the_collector_sleeps_and_wakes_even_after_an_error():
    awake: list[bool] = []

    def fail() -> None:
        with imports.slow_import():
            awake.append(gc.isenabled())
            raise ImportError

    with pytest.raises(ImportError):
        fail()
    assert [*awake, gc.isenabled()] == [False, True]
