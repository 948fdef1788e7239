"""Runs of free ids against a plain set."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from llm_engine.sched.free_runs import FreeRuns

NUM_IDS = 40


def _runs_of(ids: set[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for block in sorted(ids):
        if runs and sum(runs[-1]) == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs


@given(st.lists(st.tuples(st.booleans(), st.integers(0, NUM_IDS), st.integers(-1, NUM_IDS)), max_size=60), st.randoms())
def test_runs_are_those_of_the_set(actions: list[tuple[bool, int, int]], random) -> None:  # type: ignore[no-untyped-def]
    runs, free = FreeRuns(NUM_IDS), set(range(NUM_IDS))
    for taking, n, after in actions:
        if taking and n <= len(free):
            fits = [start for start, length in _runs_of(free) if length >= n]
            prolongs = after in [start for start, _ in _runs_of(free)]
            taken = runs.take(n, after)
            assert len(set(taken)) == n
            assert set(taken) <= free
            if n and prolongs:
                assert taken[0] == after
            elif n and fits:
                assert taken == list(range(taken[0], taken[0] + n)), "a run that is long enough was cut up"
            free -= set(taken)
        elif not taking:
            back = random.sample(sorted(set(range(NUM_IDS)) - free), min(n, NUM_IDS - len(free)))
            runs.add(back)
            free |= set(back)
        assert runs.runs() == _runs_of(free)
        assert len(runs) == len(free)


def test_takes_the_smallest_run_that_fits() -> None:
    runs = FreeRuns(20)
    held = runs.take(20)
    assert held == list(range(20))
    runs.add([0, 1, 2, 3, 4, 7, 8, 9, 15])
    assert runs.take(3) == [7, 8, 9]
    assert runs.take(2) == [0, 1]


def test_prolongs_what_the_caller_holds_before_anything_else() -> None:
    runs = FreeRuns(10)
    runs.take(10)
    runs.add([2, 3, 6, 7, 8])
    assert runs.take(3, after=2) == [2, 3, 6]


def test_uses_the_largest_runs_when_none_fits() -> None:
    runs = FreeRuns(12)
    runs.take(12)
    runs.add([0, 2, 3, 5, 6, 7, 11])
    taken = runs.take(6)
    assert taken[:3] == [5, 6, 7]
    assert taken[3:5] == [2, 3]
    assert all(b > a for a, b in pairwise(sorted(taken)))
