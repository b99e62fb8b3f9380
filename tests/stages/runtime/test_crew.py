"""stages.runtime.crew: what processes tell each other through files."""

from stages.runtime.crew import Crew

from pathlib import Path

import pytest


@pytest.fixture
def crew(tmp_path: Path) -> list[Crew]:
    members = [Crew(tmp_path, rank, 3) for rank in range(3)]
    for member in members:
        member.begin()
    return members


@pytest.mark.parametrize("count", [0, 2, 3, 10])
def test_shares_are_the_whole_list_and_even(crew: list[Crew], count: int):
    shares = [list(member.share(range(count))) for member in crew]
    assert sorted(item for share in shares for item in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_progress_is_that_of_all(crew: list[Crew]):
    assert crew[0].count_done() == 0
    crew[1].say_done(5)
    crew[2].say_done(7)
    crew[1].say_done(6)
    assert crew[0].count_done() == 13
    crew[1].begin()
    assert crew[2].count_done() == 7


def test_waiting_ends_when_all_is_done(crew: list[Crew]):
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1

    crew[0].wait(lambda: looks == 3, on_look=look)
    assert looks == 3


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failing_process_ends_the_others_waiting(crew: list[Crew], error: type[BaseException]):
    with pytest.raises(error), crew[1].failing_together():
        raise error
    with pytest.raises(ChildProcessError, match="process 1 has failed"):
        crew[0].wait(lambda: False, on_look=lambda: None)
    # what is whole counts, whoever failed afterwards
    crew[0].wait(lambda: True, on_look=lambda: None)
    # and a new run does not take up an old failure
    crew[1].begin()
    looks = iter([False, True])
    crew[0].wait(lambda: next(looks), on_look=lambda: None)
