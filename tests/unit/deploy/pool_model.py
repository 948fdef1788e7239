"""A cluster as a fluid: requests arrive at a rate, prefill works its backlog off, decode slows down with its batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from deploy.scaling_policy import LOOPS, PoolState, ScalingPolicy, Signals
from llm_engine.api.config import AutoscalerConfig


@dataclass(kw_only=True)
class Mix:
    prompt_tokens: float = 2000.0
    output_tokens: float = 200.0


@dataclass(kw_only=True)
class Cluster:
    """Sizes are wanted at once and serve after `start_s`. Rates are per worker."""

    config: AutoscalerConfig
    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LOOPS, 1))
    low: int = 1
    high: int = 64
    prefill_rate: float = 10_000.0
    step_s: float = 0.01
    step_s_per_seq: float = 0.001
    places: int = 64
    kv_tokens: float = 100_000.0
    start_s: float = 20.0
    now: float = 0.0
    changes: list[tuple[float, dict[str, int]]] = field(default_factory=list)
    backlog: float = 0.0
    running: float = 0.0
    waiting: float = 0.0
    flips: int = 0

    def __post_init__(self) -> None:
        self._policy = ScalingPolicy(self.config)
        self._ready = dict(self.sizes)
        self._starting: list[tuple[float, str]] = []
        self.signals = Signals()

    def run(self, seconds: float, rate: Callable[[float], float], mix: Mix) -> None:
        """Let `rate(now)` requests a second arrive; the policy decides every `period_s`."""
        end, next_look = self.now + seconds, self.now
        while self.now < end:
            self._flow(1.0, rate(self.now), mix)
            self.now += 1.0
            self._ready_up()
            if self.now >= next_look:
                next_look += self.config.period_s
                self._decide()

    def pool(self, name: str) -> PoolState:
        return PoolState(replicas=self.sizes[name], ready=self._ready[name], low=self.low, high=self.high)

    def met(self) -> bool:
        """Both latencies are within their targets."""
        assert self.signals.ttft_s is not None
        assert self.signals.tpot_s is not None
        return self.signals.ttft_s <= self.config.ttft_slo_s and self.signals.tpot_s <= self.config.tpot_slo_s

    def turns(self, pool: str) -> int:
        """How often a pool changed its direction."""
        steps = [now[pool] - before[pool] for (_, before), (_, now) in itertools.pairwise(self.changes)]
        signs = [step > 0 for step in steps if step]
        return sum(a != b for a, b in itertools.pairwise(signs))

    def _flow(self, dt: float, rate: float, mix: Mix) -> None:
        power = self._ready["prefill"] * self.prefill_rate
        self.backlog += rate * mix.prompt_tokens * dt
        served = min(self.backlog, power * dt)
        self.backlog -= served
        self.waiting += served / mix.prompt_tokens
        workers, places = self._ready["decode"], self._ready["decode"] * self.places
        admitted = min(self.waiting, max(0.0, places - self.running))
        self.waiting -= admitted
        self.running += admitted
        tpot = self.step_s + self.step_s_per_seq * self.running / workers
        self.running -= min(self.running, self.running * dt / (mix.output_tokens * tpot))
        places_taken = self.running / places
        kv = min(1.0, self.running * (mix.prompt_tokens + mix.output_tokens / 2) / (workers * self.kv_tokens))
        queue, compute = self.backlog / power, mix.prompt_tokens / self.prefill_rate
        self.signals = Signals(
            ttft_s=queue + compute,
            queue_share=queue / (queue + compute),
            backlog_s=queue,
            prefill_busy=served / (power * dt),
            tpot_s=tpot,
            decode_kv=kv,
            decode_kv_mean=kv,
            decode_seqs=places_taken,
            decode_seqs_mean=places_taken,
            queued_seqs=self.waiting / places,
            seqs_per_decode=self.running / workers,
        )

    def _decide(self) -> None:
        decision = self._policy.decide(self.now, {name: self.pool(name) for name in LOOPS}, self.signals)
        if dict(decision.sizes) != self.sizes:
            self._policy.changed(self.now)
            self.flips += decision.flips
            for name in LOOPS:
                grown = decision.sizes[name] - self.sizes[name]
                self._starting.extend([(self.now + self.start_s, name)] * max(0, grown))
                self._ready[name] = max(1, self._ready[name] + min(0, grown))
            self.sizes = dict(decision.sizes)
        self.changes.append((self.now, dict(self.sizes)))

    def _ready_up(self) -> None:
        for entry in [entry for entry in self._starting if entry[0] <= self.now]:
            self._starting.remove(entry)
            self._ready[entry[1]] = min(self._ready[entry[1]] + 1, self.sizes[entry[1]])
