"""One model on one device: plan → launch → wait → commit, in every step. Called from one thread only.

`Admission` takes sequences in, `Steps` runs passes over them, `Commits` does what the results say, and they end in the
`Roster` or, on a prefill engine, leave by `Departures`. What happened is in the `Outbox`.

Life of a sequence
  prefill role     add → WAITING → PREFILLING (chunks; the sink hears of finished layers) → token 1 in a delta →
                   `Prefilled` → PREFILLED → release_sent
  decode role      reserve → (hand-off) → admit → DECODING → finish, or a Failure that hands it back to its router
  aggregated role  add → WAITING → PREFILLING → DECODING → …
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch

from llm_engine.api.config import ClusterConfig
from llm_engine.api.handoff import FirstToken
from llm_engine.api.messages import KvSnapshot, Load, Role, Submit
from llm_engine.ops.spec import Race
from llm_engine.runtime.admission import Admission
from llm_engine.runtime.commits import Commits
from llm_engine.runtime.departures import Departures
from llm_engine.runtime.intake import Limits
from llm_engine.runtime.kv_store import KvStore
from llm_engine.runtime.layer_feed import LayerFeed
from llm_engine.runtime.outbox import Outbox
from llm_engine.runtime.roster import Roster
from llm_engine.runtime.runner import Model, RecordedPasses, Runner
from llm_engine.runtime.speculate import Speculator
from llm_engine.runtime.steps import Steps
from llm_engine.sched import LayerSink, Phase, Refusal, Reservation, Sequence, StepResult
from llm_engine.sched.decode import DecodeScheduler
from llm_engine.sched.paged_cache import PagedCache
from llm_engine.sched.plan import Chunk
from llm_engine.sched.prefill import PrefillScheduler
from llm_engine.sched.reservations import Reservations


class Engine:
    """Owns the sequences, the block pool and the prefix cache of one worker; computes them with one model and store.

    `format_id` is the root of the prefix cache's digests. `max_len` is the longest sequence this engine can hold.
    `recorded`: passes of decode over the same model and store that were recorded beforehand. `race`: that of the table.

    `ahead`: launch a pass of decode before the results of the one before are reported (None: on cards). Between calls
    of `step` a pass may then be under way, which writes the blocks of its sequences. Everything may be called as ever:
      - a sequence that ends meanwhile, however, gets nothing of the pass, and its blocks go to nobody, neither to a
        reservation nor to another sequence, before the pass has ended;
      - a sequence that is admitted or added takes part from the next pass on;
      - passes with chunks of prompts never go ahead, so prefill engines have none under way.
    """

    def __init__(
        self,
        config: ClusterConfig,
        model: Model,
        store: KvStore,
        *,
        role: Role,
        format_id: str,
        on_layer: LayerSink | None = None,
        recorded: RecordedPasses | None = None,
        race: Race | None = None,
        ahead: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        speculates = config.engine.num_drafts > 0 and model.has_mtp and store.mtp is not None
        self.max_len = min(model.max_len, store.num_blocks * store.block_tokens)
        self._role = role
        self._ahead = role is not Role.PREFILL and (store.device.type != "cpu" if ahead is None else ahead)
        self._clock = clock
        self._max_num_seqs = config.scheduler.max_num_seqs
        self._num_evicted = 0
        self._cache = cache = PagedCache(
            store.num_blocks,
            store.block_tokens,
            format_id=format_id,
            prefix_cache=config.kv.prefix_cache,
            with_mtp=speculates,
        )
        self._prefill = prefill = PrefillScheduler(
            cache, max_step_tokens=config.scheduler.max_step_tokens, max_waiting=config.scheduler.max_waiting
        )
        self._decode = decode = DecodeScheduler(
            cache, num_drafts=config.engine.num_drafts if speculates else 0, max_len=self.max_len, reclaim=self._reclaim
        )
        self._reservations = Reservations(cache)
        self._outbox = outbox = Outbox()
        self._runner = runner = Runner(model, store, self._max_num_seqs, recorded, race)
        speculator = Speculator(runner, cache) if speculates else None
        hands_off = role is Role.PREFILL
        self._roster = roster = Roster(cache, prefill, decode, runner, speculator, outbox, pins=hands_off)
        feed = None
        if on_layer is not None:
            feed = LayerFeed(
                on_layer, num_layers=model.spec.num_layers, with_mtp=speculates, block_tokens=store.block_tokens
            )
        self._departures = Departures(speculator, feed, roster, outbox, clock) if hands_off else None
        self._steps = Steps(cache, runner, speculator, feed, outbox, ahead=self._ahead, clock=clock)
        self._commits = Commits(cache, prefill, decode, speculator, self._departures, roster, outbox, clock)
        self._admission = Admission(
            cache,
            prefill,
            decode,
            self._reservations,
            runner,
            speculator,
            roster,
            limits=Limits(self.max_len, model.spec.vocab_size, model.spec.eos_ids),
            max_num_seqs=self._max_num_seqs,
            clock=clock,
        )

    # -- prefill and aggregated ---------------------------------------------------------------------------------------

    def add(self, submit: Submit) -> Sequence | Refusal:
        """Queue a request.

        A newer attempt ends the older one of its request (a Failure `stale`); an older or equal one is refused.
        """
        if self._role is Role.DECODE:
            raise ValueError("a decode engine takes sequences by reserve and admit")
        return self._admission.add(submit)

    def release_sent(self, seq: Sequence) -> None:
        """Unpin the blocks of a sequence that has left a prefill engine: after Accepted, Withdraw, failure or abort.

        On a prefill engine the blocks of every started sequence, however it ended, stay pinned until this call, since a
        sender may still read them. Idempotent; a no-op for a sequence that never started. Raises ValueError for one
        that is still waiting or computing.
        """
        self._roster.unpin(seq)

    def digests(self, seq: Sequence) -> list[bytes]:
        """Of the full blocks of a sequence that was added, by which other engines find its prefix."""
        return self._cache.digests_of(seq)

    # -- decode -------------------------------------------------------------------------------------------------------

    def reserve(
        self, submit: Submit, num_tokens: int, digests: Seq[bytes] | None = None
    ) -> Reservation | Refusal | None:
        """Set blocks aside for the first `num_tokens` tokens of an offered request. None: no room now, ask again later.

        The engine's own prefix hits are pinned and count as received. Refusal: it can never be taken here, or a newer
        attempt is known. An older attempt that is still running ends (a Failure `stale`). `digests`: of the tokens'
        full blocks, or none, when the tokens themselves come later (`expect`); None: `submit` has them.
        """
        return self._admission.reserve(submit, num_tokens, digests)

    def expect(self, submit: Submit, reservation: Reservation) -> None:
        """The tokens of a reservation are here: check them now, so that `admit`, which will object, is quick."""
        self._admission.expect(submit, reservation)

    def release_reservation(self, reservation: Reservation, *, quarantine: bool) -> None:
        """Give a reservation up.

        `quarantine`: a writer may still write, so the leased blocks wait for `free_quarantined`.
        """
        self._reservations.release(reservation, quarantine=quarantine)

    def free_quarantined(self, reservation: Reservation) -> None:
        """The writer is proven stopped: the quarantined blocks of this reservation may be used again."""
        self._reservations.free(reservation)

    def admit(self, submit: Submit, reservation: Reservation, first: FirstToken) -> Sequence:
        """Take over a handed-off sequence whose blocks are verified. The next step restates token 1 and decodes on.

        Raises ValueError, and changes nothing, when the parts do not fit each other or a newer attempt is here.
        """
        return self._admission.admit(submit, reservation, first)

    # -- any role -----------------------------------------------------------------------------------------------------

    def abort(self, request_id: str, attempt: int) -> Sequence | None:
        """Stop this attempt and every older one. No delta follows. Returns the sequence, None if there was none.

        A reservation is not touched: its lease decides.
        """
        seq = self._roster.get(request_id)
        if seq is None or seq.attempt > attempt:
            return None
        self._roster.drop(seq)
        return seq

    def drain(self, *, hand_back: bool = False) -> None:
        """Take no new work.

        `hand_back`: the next step also fails every waiting, prefilling and decoding sequence with `draining`.
        """
        self._admission.draining = True
        for seq in self._roster if hand_back else ():
            if seq.phase is not Phase.PREFILLED:
                self._roster.fail(seq, "draining", "this worker is being drained", retryable=True)

    @torch.inference_mode()
    def step(self) -> StepResult | None:
        """Advance by one step. None: nothing happened and nothing can be done until the next call from outside.

        Where passes go ahead, the next one is launched as soon as the tokens of the last one are committed, and runs
        while their result is taken care of. It is waited for by the next call.
        """
        if not self._steps.under_way:
            self._begin(self._clock())
        self._steps.wait()
        now = self._clock()
        if self._goes_ahead() and not self._roster.is_due(now):
            self._steps.go_on(self._decode.running)
        landed = self._steps.take()
        if landed is not None:
            self._commits.commit(landed, went_on=self._steps.went_on)
        if self._steps.went_on or self._goes_ahead():
            self._begin(now)
        evicted = self._cache.pool.num_evicted
        self._outbox.stats.evicted_blocks += evicted - self._num_evicted
        self._num_evicted = evicted
        return self._outbox.take(self._cache.index.take_events())

    @torch.inference_mode()
    def wait(self) -> None:
        """Until the pass under way has ended, if there is one. What is done before the next step has its part in it."""
        self._steps.wait()

    @property
    def under_way(self) -> bool:
        """A pass was launched whose tokens the next step will commit."""
        return self._steps.under_way

    @property
    def rest_s(self) -> float:
        """Seconds for which a pass that is under way will go on, cautiously; 0: the next step need not be put off."""
        return self._steps.rest_s

    def waiting(self) -> Seq[Sequence]:
        """Sequences not yet started, in the order in which they will be (for early offers)."""
        return tuple(self._prefill.waiting)

    @property
    def is_idle(self) -> bool:
        """No sequence, pinned block, reservation or quarantined block is left, and no pass is under way."""
        left = len(self._roster) or self._roster.num_pinned or len(self._reservations)
        return not (left or self._steps.under_way)

    @property
    def draining(self) -> bool:
        return self._admission.draining

    def load(self) -> Load:
        """Counts for the router. `seq`, the step clocks, `pending_handoffs` and the health fields are the worker's."""
        blocks = self._cache.pool.counts()
        prefilling = [*self._prefill.waiting, *self._prefill.active]
        return Load(
            seq=0,
            num_waiting=len(self._prefill.waiting),
            num_running=len(self._prefill.active) + len(self._decode.running),
            waiting_tokens=sum(seq.num_pending for seq in prefilling),
            blocks_free=blocks.free,
            blocks_cached=blocks.cached,
            blocks_live=blocks.live,
            blocks_leased=blocks.leased,
            blocks_quarantined=blocks.quarantined,
            prefill_tokens_per_s=self._commits.prefill_tokens_per_s,
            draining=self.draining,
        )

    def kv_snapshot(self) -> KvSnapshot:
        """The whole prefix index as of the last event handed out in a StepResult."""
        return self._cache.index.snapshot()

    def check(self) -> None:
        """Verify every invariant of the block pool, prefix index and schedulers. Raises AssertionError."""
        self._cache.check()
        self._prefill.check()
        self._decode.check()
        if self.is_idle:
            counts = self._cache.pool.counts()
            assert counts.live == counts.leased == counts.quarantined == 0, f"blocks leaked: {counts}"

    # -- inside -------------------------------------------------------------------------------------------------------

    def _begin(self, now: float) -> None:
        """Plan and launch a pass, if there is anything to compute; or the rest of one that has gone on."""
        self._roster.expire(now)
        if self._departures is not None and self._departures.catch_up():
            return
        plan = self._decode.plan()
        for seq in plan.preempted:
            self._outbox.stats.preempted += 1
            self._roster.fail(seq, "preempted", "decode blocks ran out", retryable=True)
        chunks: list[Chunk] = []
        if not self._steps.went_on:
            chunks = self._prefill.plan(self._max_num_seqs - len(plan.seqs), headroom=len(plan.seqs))
        if plan.seqs or chunks:
            self._steps.launch(plan, chunks)

    def _goes_ahead(self) -> bool:
        """The next pass may be launched before this step's results are reported: it has no chunks of prompts."""
        may_start = self._prefill.waiting and len(self._decode.running) < self._max_num_seqs
        return self._ahead and not (self._prefill.active or may_start)

    def _reclaim(self) -> bool:
        """Free the blocks of the youngest sequence being prefilled; it starts over later."""
        seq = self._prefill.yield_youngest()
        if seq is None:
            return False
        self._roster.retire(seq)
        return True
