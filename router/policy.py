"""Which pair of workers serves a request: pure functions from what is known about the workers to a choice.

The predicted cost is in seconds, so that its terms can be compared and added:

    prefill   (tokens queued before it + tokens left after the prefix hit, these with a surcharge) / prefill rate;
              without the surcharge a prompt that another one is computing just now would be computed elsewhere again
    transfer  tokens the decode worker lacks × seconds a token
    decode    steps the request is expected to take × step time, stretched by the sequences that share the steps,
              plus the wait for a slot when all are taken, plus a little for a full cache
    blame     a worker on which this very request has just failed comes last

A pair must hold the same model in the same format and version, and the prefill worker must not have reported the decode
worker as unreachable. Ties go to the lower names, so equal inputs give equal choices.

To try another policy, implement `Policy` and pass it to the dispatcher.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Protocol

import msgspec

from llm_engine.api.messages import WorkerInfo

DEFAULT_PREFILL_TOKENS_PER_S = 2000.0  # until a worker has measured its own
DEFAULT_STEP_S = 0.02
WORK_SURCHARGE = 0.5  # what a computed token costs the requests that come after, relative to its own time
TRANSFER_S_PER_TOKEN = 2e-6
EXPECTED_STEPS = 256  # the true output length is unknown
FULL_CACHE_S = 0.05
BLAME_S = 30.0


class Demand(msgspec.Struct, frozen=True):
    """What a request asks of a pair: tokens to prefill, and the most tokens it may still produce."""

    num_tokens: int
    max_output: int
    avoid: frozenset[str] = frozenset()  # workers on which it has failed since its last progress


def kind(info: WorkerInfo) -> tuple[str, str, str, int]:
    """Workers of one kind may use each other's caches."""
    return info.model, info.format_id, info.weight_version, info.block_tokens


def max_tokens(info: WorkerInfo) -> int:
    """Longest sequence a worker can hold."""
    return min(info.max_model_len, info.num_blocks * info.block_tokens)


class PrefillState(msgspec.Struct, frozen=True):
    """A worker that may prefill, as the policy sees it."""

    info: WorkerInfo
    backlog_tokens: int = 0  # waiting there, including what was sent since its last report
    tokens_per_s: float = 0.0  # 0: not measured yet
    hit_tokens: int = 0  # of this request, in its prefix cache
    bad_peers: Sequence[str] = ()  # incarnations of decode workers it can't reach


class DecodeState(msgspec.Struct, frozen=True):
    """A worker that may decode, as the policy sees it."""

    info: WorkerInfo
    num_seqs: int = 0  # running or on their way
    blocks_available: int = 0  # free or cached, less what is on its way
    idle: bool = True  # no sequence, no lease: what is not available now never will be
    step_s: float = 0.0  # 0: not measured yet
    hit_tokens: int = 0


class Choice(msgspec.Struct, frozen=True):
    """The best pair now, as indices into the states given. `decode` is None when `aggregated` serves alone."""

    prefill: int
    decode: int | None
    cost_s: float
    ttft_s: float
    hit_tokens: int


class Shortage(enum.Enum):
    """Why there is no pair."""

    NO_PAIR = "no_pair"  # no compatible prefill and decode worker is alive
    FULL = "full"  # every decode worker lacks blocks now; some will have them
    TOO_LONG = "too_long"  # no worker could ever hold the sequence


class Policy(Protocol):
    """Chooses a pair. `prefills` and `decodes` are the pools; `aggregated` are workers that do both, given as both."""

    def __call__(
        self,
        demand: Demand,
        prefills: Sequence[PrefillState],
        decodes: Sequence[DecodeState],
        aggregated: Sequence[tuple[PrefillState, DecodeState]],
    ) -> Choice | Shortage: ...


def prefill_time(demand: Demand, state: PrefillState) -> float:
    """Seconds until the first token, if the request is sent to this worker now."""
    return (state.backlog_tokens + _left(demand, state)) / (state.tokens_per_s or DEFAULT_PREFILL_TOKENS_PER_S)


def prefill_cost(demand: Demand, state: PrefillState) -> float:
    """`prefill_time` and the surcharge."""
    tokens = state.backlog_tokens + (1.0 + WORK_SURCHARGE) * _left(demand, state)
    return tokens / (state.tokens_per_s or DEFAULT_PREFILL_TOKENS_PER_S)


def _left(demand: Demand, state: PrefillState) -> int:
    return max(1, demand.num_tokens - state.hit_tokens)


def decode_cost(demand: Demand, state: DecodeState) -> float:
    """Seconds of decoding that the request is expected to take there, waiting included."""
    info = state.info
    step_s = state.step_s or DEFAULT_STEP_S
    steps = min(demand.max_output, EXPECTED_STEPS)
    load = state.num_seqs / info.max_num_seqs
    cost = steps * step_s * (1.0 + load)
    if load >= 1.0:
        cost += EXPECTED_STEPS * step_s * (load - 1.0 + 1.0 / info.max_num_seqs)  # slots come free one by one
    cost += TRANSFER_S_PER_TOKEN * max(0, demand.num_tokens - state.hit_tokens)
    return cost + FULL_CACHE_S * (1.0 - max(0, state.blocks_available) / info.num_blocks)


def can_prefill(demand: Demand, info: WorkerInfo) -> bool:
    """Whether the worker can hold the prompt."""
    return demand.num_tokens <= max_tokens(info)


def can_decode(demand: Demand, info: WorkerInfo) -> bool:
    """Whether the worker can hold the sequence to its end."""
    return demand.num_tokens + demand.max_output <= max_tokens(info)


def blocks_needed(demand: Demand, state: DecodeState) -> int:
    """New blocks for the prompt and its first output tokens."""
    block = state.info.block_tokens
    tokens = min(demand.num_tokens + min(demand.max_output, block), max_tokens(state.info))
    return -(-tokens // block) - state.hit_tokens // block


def has_room(demand: Demand, state: DecodeState) -> bool:
    """Whether the blocks are there. An idle worker always has room for what fits it: cached blocks can be evicted."""
    return state.idle or blocks_needed(demand, state) <= state.blocks_available


def work_together(prefill: PrefillState, decode: DecodeState) -> bool:
    """Whether the pair has one kind of cache, and a connection."""
    a, b = prefill.info, decode.info
    return (
        a.format_id == b.format_id
        and a.weight_version == b.weight_version
        and a.block_tokens == b.block_tokens
        and a.model == b.model
        and b.incarnation not in prefill.bad_peers
    )


def cheapest_pair(
    demand: Demand,
    prefills: Sequence[PrefillState],
    decodes: Sequence[DecodeState],
    aggregated: Sequence[tuple[PrefillState, DecodeState]],
) -> Choice | Shortage:
    """The pair of the lowest predicted cost. O(P log P + D log D) when all workers are compatible."""
    by_cost_p = sorted(
        [
            (prefill_cost(demand, p) + _blame(demand, p.info), p.info.name, i)
            for i, p in enumerate(prefills)
            if can_prefill(demand, p.info)
        ]
    )
    by_cost_d = sorted(
        [
            (decode_cost(demand, d) + _blame(demand, d.info), d.info.name, j)
            for j, d in enumerate(decodes)
            if can_decode(demand, d.info) and has_room(demand, d)
        ]
    )
    best: tuple[float, str, str, int, int | None] | None = None  # cost, names, indices
    for cost_p, name_p, i in by_cost_p:
        for cost_d, name_d, j in by_cost_d:
            pair = (cost_p + cost_d, name_p, name_d, i, j)
            if best is not None and pair > best:
                break  # as is every later one of this row
            if work_together(prefills[i], decodes[j]):
                best = pair
        if best is not None and by_cost_d and cost_p + by_cost_d[0][0] > best[0]:
            break
    for i, (p, d) in enumerate(aggregated):
        if can_decode(demand, d.info) and has_room(demand, d):
            cost = prefill_cost(demand, p) + decode_cost(demand, d) + 2 * _blame(demand, p.info)
            if best is None or (cost, p.info.name, d.info.name) < best[:3]:
                best = (cost, p.info.name, d.info.name, i, None)
    if best is None:
        return _shortage(demand, prefills, decodes, aggregated)
    cost, _, _, i, partner = best
    state = prefills[i] if partner is not None else aggregated[i][0]
    return Choice(i, partner, cost, prefill_time(demand, state), state.hit_tokens)


def _blame(demand: Demand, info: WorkerInfo) -> float:
    return BLAME_S if info.name in demand.avoid else 0.0


def _shortage(
    demand: Demand,
    prefills: Sequence[PrefillState],
    decodes: Sequence[DecodeState],
    aggregated: Sequence[tuple[PrefillState, DecodeState]],
) -> Shortage:
    """Of the reasons why no pair is possible the one that is easiest to overcome."""
    pairs = [(p, d) for p in prefills for d in decodes if work_together(p, d)] + list(aggregated)
    if not pairs:
        return Shortage.NO_PAIR
    fits = any(can_prefill(demand, p.info) and can_decode(demand, d.info) for p, d in pairs)
    return Shortage.FULL if fits else Shortage.TOO_LONG
