from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.desired import Present, plan
from deploy.rollout import Member, next_drain, with_surge

CARDS = {"prefill": 1, "decode": 1}


class Site:
    """Members that start and drain one event at a time, in the order that a test draws."""

    def __init__(self, prefill: int, decode: int, max_cards: int | None) -> None:
        self.sizes = {"prefill": prefill, "decode": decode}
        self.max_cards = max_cards
        self.members = [
            Member(name=f"{pool}-{i}", pool=pool, current=False, ready=True)
            for pool, size in self.sizes.items()
            for i in range(size)
        ]

    def reconcile(self) -> None:
        """What the controller does with the two functions."""
        sizes = with_surge(self.sizes, self.members, CARDS, self.max_cards)
        present = [Present(name=m.name, pool=m.pool, draining=m.draining, current=m.current) for m in self.members]
        steps = plan(sizes, present, CARDS, self.max_cards)
        leaving = {*steps.drain, next_drain(sizes, self.members)}
        self.members = [replace(m, draining=m.draining or m.name in leaving) for m in self.members]
        self.members += [Member(name=n, pool=p, current=True, ready=False) for p, n in steps.start]

    def pending(self) -> list[Member]:
        """Members to which something is about to happen."""
        return [member for member in self.members if member.draining or not member.ready]

    def happens(self, member: Member) -> None:
        """A drained worker is gone, a new one serves."""
        self.members.remove(member)
        if not member.draining:
            self.members.append(replace(member, ready=True))

    def serving(self, pool: str, current: bool | None = None) -> int:
        return sum(m.ready and not m.draining and m.pool == pool and current in (None, m.current) for m in self.members)


def roll(site: Site, draw: st.DataObject) -> list[Site]:
    """To the end; the site after each event."""
    for _ in range(200):
        site.reconcile()
        check(site)
        pending = site.pending()
        if not pending:
            return []
        site.happens(draw.draw(st.sampled_from(sorted(pending, key=lambda m: m.name))))
        check(site)
    raise AssertionError(f"it does not end: {site.members}")


def check(site: Site) -> None:
    held = len(site.members)
    if site.max_cards is not None:
        assert held <= max(site.max_cards, sum(site.sizes.values()))
    if site.max_cards is None or site.max_cards >= sum(site.sizes.values()) + 2:
        for pool, size in site.sizes.items():
            assert site.serving(pool) >= size, "a pool served with less than its size"
        assert any(all(site.serving(pool, revision) for pool in site.sizes) for revision in (False, True)), (
            "no revision has both halves"
        )
    elif min(site.sizes.values()) > 1:
        assert any(all(site.serving(pool, revision) for pool in site.sizes) for revision in (False, True)), (
            "no revision has both halves"
        )


@given(st.integers(1, 5), st.integers(1, 5), st.none() | st.integers(2, 14), st.data())
def test_a_rollout_ends_and_always_leaves_a_complete_pair(
    prefill: int, decode: int, max_cards: int | None, data: st.DataObject
) -> None:
    if max_cards is not None:
        max_cards = max(max_cards, prefill + decode)
    site = Site(prefill, decode, max_cards)
    roll(site, data)
    assert all(member.current and member.ready and not member.draining for member in site.members)
    assert {pool: site.serving(pool) for pool in site.sizes} == site.sizes


def test_a_new_worker_that_does_not_start_stops_the_rollout() -> None:
    site = Site(2, 2, None)
    for _ in range(5):
        site.reconcile()
    assert [m.name for m in site.members if m.draining] == []
    assert sorted(m.name for m in site.pending()) == ["decode-2", "prefill-2"]


def test_an_old_worker_that_does_not_serve_goes_at_once() -> None:
    stuck = Member(name="decode-3", pool="decode", current=False, ready=False)
    fine = Member(name="decode-0", pool="decode", current=False, ready=True)
    assert next_drain({"decode": 2}, [fine, stuck]) == "decode-3"


@pytest.mark.parametrize("draining", [True, False])
def test_nobody_drains_while_somebody_else_starts_or_leaves(draining: bool) -> None:
    busy = Member(name="decode-1", pool="decode", current=True, ready=draining, draining=draining)
    old = Member(name="decode-0", pool="decode", current=False, ready=True)
    assert next_drain({"decode": 1}, [busy, old]) is None
