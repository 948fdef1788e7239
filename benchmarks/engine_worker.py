"""Decode steps of a worker's engine on its step thread, over a slice of the model: what the host adds to the device.

Sequences are admitted as after a hand-off, with one prompt's caches copied to all of them. Logits are steered, so that
a fixed share of the drafts is right. Deltas are encoded on the asyncio thread, as for a router, and go nowhere.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.engine_run import BLOCK_TOKENS, WARM_UP, Point
from llm_engine.api.config import ClusterConfig, KvConfig, build
from llm_engine.api.handoff import FirstToken
from llm_engine.api.messages import Codec, Deltas, Role, RouterMessage, Submit
from llm_engine.api.request import SamplingParams, pack_tokens
from llm_engine.ops import ForwardBatch, Ops
from llm_engine.runtime.batch import SequenceRows, States, build_batch
from llm_engine.runtime.engine import Engine
from llm_engine.runtime.kv_store import KvStore, plan_layout
from llm_engine.runtime.readback import Readback
from llm_engine.runtime.recorded import Recorded
from llm_engine.runtime.runner import Model, Passed
from llm_engine.sched import Reservation, StepResult
from llm_engine.serving.step_loop import StepLoop, StepReport

_TOKEN = 7  # that every row of the main model draws
_WRONG_EVERY = 7  # drafts
_SPARE_STEPS = 8  # that may run until the loop has stopped
_PARTS = ("plan", "build", "launch", "commit", "rest")
_DEADLINE_S = 600.0
_LEAST_BLOCKS = 8  # of a cache


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Medians in seconds of a step, and the tokens that it gives a sequence on average.

    `device`: of the passes. `gap`: from the arrival of a step's tokens to the launch of the next step's first pass.
    `host`: what the step thread does, by part.
    """

    step: float
    device: float
    gap: float
    host: dict[str, float]
    tokens: float


class Steered:
    """A model that draws `_TOKEN` always, while one in `_WRONG_EVERY` drafts is another."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.spec, self.max_len, self.row_tile = model.spec, model.max_len, model.row_tile
        self.dtype, self.has_mtp = model.dtype, model.has_mtp
        self.forward, self.mtp = model.forward, model.mtp

    def logits(self, hidden_MH: Tensor) -> Tensor:
        """`Model`."""
        logits_MV = self._model.logits(hidden_MH)
        logits_MV[:, _TOKEN] = 1e4
        return logits_MV

    def draft_logits(self, hidden_MH: Tensor) -> Tensor:
        """`Model`. Which drafts are wrong depends on the state, as if at random."""
        logits_MV = self._model.draft_logits(hidden_MH)
        logits_MV[:, _TOKEN] = 1e4
        wrong_M = (hidden_MH[:, :16].float().abs().sum(1) * 1e4).long() % _WRONG_EVERY == 0
        logits_MV[:, _TOKEN + 1] = wrong_M * 3e4 - 1e4
        return logits_MV


class Watch:
    """What a step takes, by part. On the step thread, but for `arrivals`."""

    def __init__(self, engine: Engine, passes: WatchedPasses) -> None:
        self.arrivals: list[float] = []  # of results, on the asyncio thread
        self.host: list[dict[str, float]] = []
        self.gaps: list[float] = []
        self._engine, self._passes = engine, passes
        self._spent: dict[str, float] = defaultdict(float)
        self._known: float | None = None  # when the newest tokens were

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time the parts of every step from now on."""
        engine, wait = self._engine, Readback.wait
        steps = engine._steps
        watched = [
            (engine, "step", "step"), (engine, "wait", "waited"), (engine._decode, "plan", "plan"),
            (steps, "go_on", "launch"), (steps, "launch", "launch"), (steps, "wait", "wait"),
            (engine._commits, "commit", "commit"),
        ]  # fmt: skip
        for owner, name, part in watched:
            setattr(owner, name, self._timed(getattr(owner, name), part))

        def noted(read: Readback) -> Any:
            values = wait(read)
            self._known = time.perf_counter()
            return values

        setattr(Readback, "wait", noted)  # noqa: B010
        self._passes.on_launch = self._launched
        try:
            yield
        finally:
            setattr(Readback, "wait", wait)  # noqa: B010
            self._passes.on_launch = lambda spent: None
            for owner, name, _ in watched:
                delattr(owner, name)

    def _timed(self, original: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = original(*args, **options)
            self._spent[part] += time.perf_counter() - started
            if part == "step":
                self._end_step()
            return result

        return timed

    def _launched(self, spent: float) -> None:
        self._spent["passes"] += spent
        if self._known is not None:
            self.gaps.append(time.perf_counter() - self._known)
            self._known = None

    def _end_step(self) -> None:
        spent, self._spent = self._spent, defaultdict(float)
        waited = spent["wait"] - spent["waited"]  # within the step
        parts = {
            "plan": spent["plan"],
            "build": spent["launch"] - spent["passes"],
            "launch": spent["passes"],
            "commit": spent["commit"],
            "rest": spent["step"] - waited - spent["plan"] - spent["launch"] - spent["commit"],
        }
        self.host.append(parts)


@dataclass
class WatchedPasses:
    """`runner.RecordedPasses`, with the time that the device spends on them."""

    recorded: Recorded
    device: torch.device
    spans: list[Callable[[], float]] = field(default_factory=list)
    on_launch: Callable[[float], None] = lambda spent: None

    def decode(self, batch: ForwardBatch, late_M: Tensor | None = None) -> Passed | None:
        """`RecordedPasses`."""
        return self._run(lambda: self.recorded.decode(batch, late_M))

    def draft(self, batch: ForwardBatch, states: States, late_M: Tensor | None = None) -> Passed | None:
        """`RecordedPasses`."""
        return self._run(lambda: self.recorded.draft(batch, states, late_M))

    def _run(self, launch: Callable[[], Passed | None]) -> Passed | None:
        started = time.perf_counter()
        if self.device.type == "cpu":
            passed = launch()
            spent = time.perf_counter() - started
            self.spans.append(lambda: spent)
        else:
            begin, end = (torch.Event(self.device, enable_timing=True) for _ in range(2))
            begin.record()
            passed = launch()
            end.record()
            spent = time.perf_counter() - started
            self.spans.append(lambda: begin.elapsed_time(end) / 1e3)
        self.on_launch(spent)
        return passed


class DecodingWorker:
    """The engine of a decode worker with all sequences of a point admitted."""

    def __init__(self, model: Model, ops: Ops, point: Point, *, fp8: bool, ahead: bool | None = None) -> None:
        """`ahead`: see `Engine`."""
        self._point, self._ops, self._model = point, ops, Steered(model)
        steps = WARM_UP + point.steps + _SPARE_STEPS
        self._max_len = point.context + 1 + (steps + 1) * point.rows_per_seq
        blocks = max(point.batch * -(-self._max_len // BLOCK_TOKENS), _LEAST_BLOCKS)
        pages = torch.uint8 if fp8 else ops.dtype
        layout = plan_layout(
            model.spec, KvConfig(block_tokens=BLOCK_TOKENS, num_blocks=blocks), pages, with_mtp=point.mtp > 0
        )
        self._store = KvStore.allocate(layout, pages, ops.device)
        recorded = Recorded(
            self._model, self._store, ops, num_drafts=point.mtp, max_num_seqs=point.batch, max_len=self._max_len
        )
        self._passes = WatchedPasses(recorded, ops.device)
        self.engine = Engine(
            _config(point), self._model, self._store, role=Role.DECODE, format_id="slice", recorded=self._passes,
            race=ops.race, ahead=ahead,
        )  # fmt: skip
        self._admit()

    async def run(self) -> StepTimes:
        """Decode on a step thread."""
        for _ in range(WARM_UP):  # passes are recorded as they are first needed
            self.engine.step()
        self._passes.spans.clear()
        watch, codec, done = Watch(self.engine, self._passes), Codec[Any](b"benchmark", RouterMessage), asyncio.Event()
        tokens = 0

        def on_step(report: StepReport[StepResult]) -> None:
            nonlocal tokens
            for deltas in report.result.deltas.values():
                codec.encode(Deltas(items=deltas))
                tokens += sum(len(delta.tokens) for delta in deltas) * (len(watch.arrivals) < self._point.steps)
            watch.arrivals.append(time.perf_counter())
            if len(watch.arrivals) == self._point.steps:
                done.set()

        loop: StepLoop[Engine, StepResult] = StepLoop(self.engine, on_step)
        with watch.watching():
            loop.start()
            assert loop.failure is not None
            waiter: asyncio.Future[Any] = asyncio.ensure_future(done.wait())
            await asyncio.wait({waiter, loop.failure}, timeout=_DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
            stopped = await loop.stop(_DEADLINE_S)
        if loop.failure.done():
            loop.failure.result()
        if not (stopped and waiter.done()):
            raise TimeoutError(f"{self._point.steps} steps took longer than {_DEADLINE_S} s")
        return self._times(watch, tokens / (self._point.steps * self._point.batch))

    def run_steps(self, count: int) -> None:
        """So many steps on the calling thread, for a profile."""
        for _ in range(count):
            self.engine.step()
        self.engine.wait()

    def _times(self, watch: Watch, tokens: float) -> StepTimes:
        per_step = 1 + self._point.mtp  # catching up, each further draft, verifying
        spans = [span() for span in self._passes.spans]
        device = [sum(spans[at : at + per_step]) for at in range(0, len(spans) - per_step + 1, per_step)]
        return StepTimes(
            step=statistics.median(after - before for before, after in pairwise(watch.arrivals)),
            device=statistics.median(device),
            gap=statistics.median(watch.gaps) if watch.gaps else 0.0,
            host={part: statistics.median(parts[part] for parts in watch.host) for part in _PARTS},
            tokens=tokens,
        )

    def _admit(self) -> None:
        point, vocab, first_blocks = self._point, self._model.spec.vocab_size, list[int]()
        state = torch.zeros(self._model.spec.hidden_size, dtype=self._model.dtype, device="cpu")
        hidden = state.view(torch.uint8).numpy().tobytes() if point.mtp else b""
        for seq in range(point.batch):
            tokens = [(7919 * seq + position) % vocab for position in range(point.context)]
            submit = Submit(
                request_id=f"sequence-{seq}", attempt=1, router_id="router", tokens=pack_tokens(tokens),
                num_prompt=point.context, deadline_s=2 * _DEADLINE_S,
                sampling=SamplingParams(seed=seq, max_tokens=1 << 30, temperature=0.0, ignore_eos=True),
            )  # fmt: skip
            reservation = self.engine.reserve(submit, point.context)
            assert isinstance(reservation, Reservation), reservation
            if seq == 0:
                first_blocks = reservation.blocks
                self._prefill(tokens, first_blocks)
            else:
                self._copy(first_blocks, reservation.blocks)
            self.engine.admit(
                submit, reservation, FirstToken(token=_TOKEN, logprobs=None, hidden=hidden, cached_tokens=0)
            )

    @torch.inference_mode()
    def _prefill(self, tokens: list[int], blocks: list[int]) -> None:
        for start in range(0, len(tokens), self._point.chunk):
            rows = [SequenceRows(tokens[start : start + self._point.chunk], start, blocks)]
            batch = build_batch(rows, block_tokens=BLOCK_TOKENS, row_tile=self._ops.row_tile).to(self._ops.device)
            hidden_RH = self._model.forward(batch, self._store)
            if self._point.mtp:
                self._model.mtp(batch, hidden_RH, self._store)

    def _copy(self, source: list[int], target: list[int]) -> None:
        layers = [*self._store.layers, *([] if self._store.mtp is None else [self._store.mtp])]
        for plane in (plane for layer in layers for plane in (layer.latent, layer.index) if plane is not None):
            plane[target] = plane[source]


def _config(point: Point) -> ClusterConfig:
    return build(
        {
            "model": {"path": "the slice"},
            "engine": {"num_drafts": point.mtp},
            "kv": {"block_tokens": BLOCK_TOKENS},
            "scheduler": {"max_num_seqs": point.batch},
        }
    )


def numbers_of(times: StepTimes) -> dict[str, Any]:
    """For the report, in milliseconds."""
    return {
        "step_ms": round(times.step * 1e3, 3),
        "device_ms": round(times.device * 1e3, 3),
        "host_overhead": round(max(1 - times.device / times.step, 0), 4),
        "gap_ms": round(times.gap * 1e3, 3),
        "host_ms": {part: round(spent * 1e3, 3) for part, spent in times.host.items()},
        "tokens_per_step": round(times.tokens, 3),
        "tpot_ms": round(times.step / times.tokens * 1e3, 3),
    }
