"""How large prefill and decode should be: two loops under one card budget, as pure functions of what was measured.

Each loop turns its signals into a demand, counted in replicas:

    prefill   TTFT as far as it is queueing, seconds of backlog, share of time spent computing
    decode    TPOT, share of KV blocks in use, share of places taken (requests that wait for a place count)

Whatever waits, at the routers, in the queue of prefill or in an open hand-off, counts for the pool that keeps it
waiting: the one that is full.

A pool grows to its demand once that has exceeded its size for `up_after_s`, and shrinks by one when the rest would
have been enough, with a margin, for `down_after_s`. The card budget couples them: the pool in greater need is served
first, and when no card is free a pool with room to spare gives one up (a role flip), never one that is short itself.
Without measurements a pool stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from llm_engine.api.config import AutoscalerConfig

LOOPS = ("prefill", "decode")
_PARTNER = {"prefill": "decode", "decode": "prefill"}
_TOLERANCE = 0.05  # demand beyond the size that is not worth a replica


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolState:
    """A pool now. `replicas`: wanted; `ready`: serving; bounds and cards per replica as configured."""

    replicas: int
    ready: int
    low: int = 1
    high: int = 1024
    cards: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What was measured over the window. None: nothing to judge by, which is not the same as zero."""

    ttft_s: float | None = None  # 90th percentile
    queue_share: float = 0.0  # of TTFT: waiting for prefill to begin
    backlog_s: float | None = None  # prefill work that waits at its workers, in seconds of the pool's work
    prefill_busy: float | None = None  # share of time that prefill workers compute
    prefill_busy_now: float = 0.0  # the same since the last look
    queued_s: float = 0.0  # prefill work of requests that wait at the routers, in seconds of the pool's work
    tpot_s: float | None = None  # 90th percentile
    decode_kv: float | None = None  # share of decode blocks in use at the last look
    decode_kv_mean: float = 0.0  # over the window
    decode_seqs: float | None = None  # share of decode places taken at the last look
    decode_seqs_mean: float = 0.0
    queued_seqs: float = 0.0  # open hand-offs and requests that wait at the routers, as a share of decode places
    seqs_per_decode: float = 0.0  # running sequences per decode worker


@dataclass(frozen=True, slots=True)
class Need:
    """Replicas that a pool's load asks for, and which signal says so. `keep`: fewer would be too few."""

    replicas: float
    reason: str
    keep: float


@dataclass(frozen=True, slots=True)
class Decision:
    """Sizes that the two pools should have, why, and how many replicas change role on the way."""

    sizes: Mapping[str, int]
    reasons: Mapping[str, str]
    flips: int = 0


def need(pool: str, state: PoolState, signals: Signals, config: AutoscalerConfig) -> Need | None:
    """The demand on one pool; None when nothing was measured or no replica serves."""
    if state.ready == 0:
        return None
    loads = _prefill_loads(signals, config) if pool == "prefill" else _decode_loads(state, signals, config)
    if not loads:
        return None
    load, reason = max((load, reason) for load, _, reason in loads)
    return Need(load * state.ready, reason, max(kept for _, kept, _ in loads) * state.ready)


Loads = list[tuple[float, float, str]]  # load relative to its target, load that counts against shrinking, in words


def _prefill_loads(signals: Signals, config: AutoscalerConfig) -> Loads:
    if signals.prefill_busy is None or signals.backlog_s is None:
        return []
    full = max(signals.prefill_busy_now, signals.prefill_busy) >= config.prefill_busy
    blocked = not full and _places_taken(signals) >= config.decode_seqs  # what waits here waits for decode
    backlog_s = 0.0 if blocked else signals.backlog_s + (signals.queued_s if full else 0.0)
    busy, backlog = signals.prefill_busy / config.prefill_busy, backlog_s / config.backlog_s
    loads = [
        (busy, busy, f"prefill computes {signals.prefill_busy:.0%} of the time (target {config.prefill_busy:.0%})"),
        (backlog, backlog, f"prefill backlog {backlog_s:.2g} s (target {config.backlog_s:.2g} s)"),
    ]
    if signals.ttft_s is not None and not blocked:
        # More workers shorten the queue and not the computation of one prompt: only queueing asks for them.
        over = max(0.0, signals.ttft_s / config.ttft_slo_s - 1.0)
        text = f"TTFT p90 {signals.ttft_s:.2g} s (target {config.ttft_slo_s:.2g} s), {signals.queue_share:.0%} queueing"
        load = 1.0 + over * signals.queue_share if over else 0.0
        loads.append((load, load, text))
    return loads


def _decode_loads(state: PoolState, signals: Signals, config: AutoscalerConfig) -> Loads:
    if signals.decode_kv is None or signals.decode_seqs is None:
        return []
    share = _places_taken(signals)
    if share >= config.decode_seqs:
        share += signals.queued_seqs  # else open hand-offs wait for their prefill
    kv, seqs = signals.decode_kv / config.decode_kv, share / config.decode_seqs
    kv_mean, seqs_mean = signals.decode_kv_mean / config.decode_kv, signals.decode_seqs_mean / config.decode_seqs
    loads = [
        (kv, kv_mean, f"decode KV {signals.decode_kv:.0%} in use (target {config.decode_kv:.0%})"),
        (seqs, seqs_mean, f"decode places {share:.0%} taken or waited for (target {config.decode_seqs:.0%})"),
    ]
    if signals.tpot_s is not None:
        tpot = signals.tpot_s / config.tpot_slo_s
        # Workers that hold at most one sequence each are as fast as they get, whatever their number.
        shared = signals.seqs_per_decode * state.ready > state.ready - 1
        text = f"TPOT p90 {signals.tpot_s * 1e3:.3g} ms (target {config.tpot_slo_s * 1e3:.3g} ms)"
        loads.append((tpot if signals.seqs_per_decode > 1 else min(tpot, 1.0), tpot if shared else 0.0, text))
    return loads


def _places_taken(signals: Signals) -> float:
    """Share of decode places; the mean too, because a place that has just become free is soon taken again."""
    return max(signals.decode_seqs or 0.0, signals.decode_seqs_mean)


class ScalingPolicy:
    """Remembers since when a pool has been too small or too large. Told the time; owns no clock."""

    def __init__(self, config: AutoscalerConfig) -> None:
        self._config = config
        self._small_since: dict[str, float] = {}
        self._large_since: dict[str, float] = {}
        self._changed_at = -math.inf

    def changed(self, now: float, pools: Collection[str] = LOOPS) -> None:
        """Sizes of these pools were changed, by this policy or by anybody else."""
        self._changed_at = now
        self._large_since.clear()
        for pool in pools:  # the other one is as small as it was
            self._small_since.pop(pool, None)

    def decide(self, now: float, pools: Mapping[str, PoolState], signals: Signals, *, others: int = 0) -> Decision:
        """`pools`: prefill and decode. `others`: cards that other pools hold."""
        needs = {pool: need(pool, pools[pool], signals, self._config) for pool in LOOPS}
        sizes = {pool: pools[pool].replicas for pool in LOOPS}
        reasons = {pool: "nothing measured" if found is None else found.reason for pool, found in needs.items()}
        ups = {pool: self._wanted(now, pool, pools[pool], needs[pool]) for pool in LOOPS}
        cool = now - self._changed_at >= self._config.cooldown_s
        flips = self._grow(pools, needs, ups, sizes, reasons, others, cool)
        for pool in LOOPS:
            unchanged = all(sizes[p] == pools[p].replicas for p in LOOPS)
            if self._has_room(now, pool, pools[pool], needs[pool]) and cool and unchanged:
                sizes[pool] -= 1
                reasons[pool] = f"room to spare: {reasons[pool]}"
        return Decision(sizes, reasons, flips)

    def _wanted(self, now: float, pool: str, state: PoolState, found: Need | None) -> int:
        """The size a pool should grow to; its present one if it should not grow (yet)."""
        if found is None or found.replicas <= state.replicas * (1 + _TOLERANCE):
            self._small_since.pop(pool, None)
            return state.replicas
        since = self._small_since.setdefault(pool, now)
        if now - since < self._config.up_after_s:
            return state.replicas
        most = max(state.ready + 1, math.floor(state.ready * self._config.growth))
        return max(state.replicas, min(math.ceil(found.replicas - _TOLERANCE), most, state.high))

    def _grow(
        self,
        pools: Mapping[str, PoolState],
        needs: Mapping[str, Need | None],
        ups: Mapping[str, int],
        sizes: dict[str, int],
        reasons: dict[str, str],
        others: int,
        cool: bool,
    ) -> int:
        """Give out cards one replica at a time, to the pool that is shortest of them; returns the number of flips."""
        flips = 0
        while short := [pool for pool in LOOPS if sizes[pool] < ups[pool]]:
            pool = max(short, key=lambda p: _load(needs[p], sizes[p]))
            missing = self._missing(pools, sizes, pool, others)
            donor = _PARTNER[pool]
            if missing > 0:
                given = math.ceil(missing / pools[donor].cards) if pools[donor].cards else 0
                if not given or not cool or not self._can_give(pools[donor], needs[donor], sizes[donor], given):
                    why = f"{donor} has none to spare" if cool else "the last change is too recent for another flip"
                    reasons[pool] += f"; no card is free and {why}"
                    ups = {**ups, pool: sizes[pool]}
                    continue
                sizes[donor] -= given
                flips += 1
                reasons[donor] = f"gives {given} to {pool}: {reasons[donor]}"
                ups = {**ups, donor: sizes[donor]}
            sizes[pool] += 1
        return flips

    def _missing(self, pools: Mapping[str, PoolState], sizes: Mapping[str, int], pool: str, others: int) -> int:
        """Cards by which one more replica of a pool exceeds the budget."""
        if self._config.max_cards is None:
            return 0
        used = others + sum(sizes[p] * pools[p].cards for p in LOOPS)
        return used + pools[pool].cards - self._config.max_cards

    def _can_give(self, state: PoolState, found: Need | None, size: int, given: int) -> bool:
        """Whether a pool would still be large enough, with the margin."""
        left = size - given
        return found is not None and left >= max(state.low, 1) and found.keep <= left * self._config.down_margin

    def _has_room(self, now: float, pool: str, state: PoolState, found: Need | None) -> bool:
        """Whether one replica less would have been enough for `down_after_s`."""
        settled = state.ready >= state.replicas
        if not settled or not self._can_give(state, found, state.replicas, 1):
            self._large_since.pop(pool, None)
            return False
        since = self._large_since.setdefault(pool, now)
        return now - since >= self._config.down_after_s


def split(cards: int, pools: Mapping[str, PoolState], needs: Mapping[str, Need]) -> dict[str, int]:
    """The sizes that serve this load best with so many cards: the greater relative need gets the next replica."""
    sizes = {pool: max(1, pools[pool].low) for pool in LOOPS}

    def free() -> int:
        return cards - sum(sizes[pool] * pools[pool].cards for pool in LOOPS)

    while fitting := [p for p in LOOPS if sizes[p] < pools[p].high and 0 < pools[p].cards <= free()]:
        sizes[max(fitting, key=lambda p: _load(needs[p], sizes[p]))] += 1
    return sizes


def _load(found: Need | None, size: int) -> float:
    return 0.0 if found is None else found.replicas / max(size, 1)
