"""contradiff.imports: the seconds of slow imports."""

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
