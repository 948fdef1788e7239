"""A worker that speaks the whole request plane and computes nothing: for tests and benchmarks of the router.

Prefill takes `prefill_s` plus `1 / prefill_tokens_per_s` a token, one request after the other; a decode step takes
`step_s` and gives every running sequence `tokens_per_step` tokens.

    python -m benchmarks.fake_worker --role prefill --port 5001
    python -m benchmarks.fake_worker --role decode --port 5002 --step-ms 10
"""

from __future__ import annotations

import heapq
import itertools
import os
import secrets
import signal
import sys
import threading
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq

from benchmarks.fake_handoff import ReceivingSide, WritingSide
from benchmarks.fake_model import FakePrefixCache, FakeSequence, logprobs_of
from benchmarks.fake_settings import FakeSettings, parse
from llm_engine.api.config import cluster_key
from llm_engine.api.errors import ConfigError
from llm_engine.api.messages import (
    PROTOCOL_VERSION,
    Cancel,
    Codec,
    Deltas,
    Drain,
    Failed,
    Hello,
    Load,
    Message,
    Role,
    RouterMessage,
    SnapshotRequest,
    Started,
    Submit,
    Welcome,
    WorkerInfo,
    WorkerMessage,
)
from llm_engine.api.request import FinishReason, StageTimes, TokenDelta

MAX_TOMBSTONES = 8192
MAX_LOG = 100_000
SILENCE_S = 3.0


class FakeWorker:
    """One worker on one thread: `start()` and `stop()` in process, or `run()` as a process of its own."""

    def __init__(self, settings: FakeSettings, key: bytes) -> None:
        self.settings = settings
        self.log: deque[RouterMessage] = deque(maxlen=MAX_LOG)  # what routers sent, without Hello
        self._codec: Codec[RouterMessage] = Codec(key, RouterMessage)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._requests = self._bind(settings.port)
        self._control = self._bind(0)
        self._poller = zmq.Poller()
        self._poller.register(self._requests, zmq.POLLIN)
        self._poller.register(self._control, zmq.POLLIN)
        self._writing = WritingSide(
            key, self._context, self._poller, timeout_s=settings.grant_timeout_s, on_failed=self._handoff_failed
        )
        self._receiving = ReceivingSide(
            key, self._control, settings.block_tokens, refusal=self._refusal, on_taken=self._take_over
        )
        self._routers: dict[str, float] = {}  # id → last heard
        self._cache = FakePrefixCache(settings.format_id, settings.block_tokens, settings.num_blocks // 2)
        self._prefilling: list[tuple[float, int, FakeSequence]] = []  # heap by completion
        self._prefill_free_at = 0.0
        self._running: dict[str, FakeSequence] = {}
        self._tombstones: OrderedDict[str, int] = OrderedDict()
        self._next_step = 0.0
        self._next_beat = 0.0
        self._num_loads = 0
        self._draining = False
        self._order = itertools.count()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        decodes = settings.role is not Role.PREFILL
        self.info = WorkerInfo(
            name=settings.name,
            role=settings.role,
            incarnation=secrets.token_hex(8),
            pid=os.getpid(),
            request_addr=self._requests.getsockopt_string(zmq.LAST_ENDPOINT),
            control_addr=self._control.getsockopt_string(zmq.LAST_ENDPOINT) if decodes else "",
            metrics_addr="",
            model=settings.model,
            format_id=settings.format_id,
            weight_version="0",
            block_tokens=settings.block_tokens,
            num_blocks=settings.num_blocks,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
        )

    def start(self) -> WorkerInfo:
        """Serve on a thread of this process."""
        self._thread = threading.Thread(target=self.run, name=self.settings.name, daemon=True)
        self._thread.start()
        return self.info

    def stop(self) -> None:
        """End `run`. From the outside this looks like a process that died: connections close, nothing is said."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(5.0)

    def run(self) -> None:
        """Serve until `stop`."""
        try:
            while not self._stopping.is_set():
                self._serve_once()
        finally:
            for socket in (self._requests, self._control, *self._writing.sockets):
                socket.close(linger=0)
            self._context.term()

    def _serve_once(self) -> None:
        now = time.monotonic()
        due = min(self._next_beat, *(item[0] for item in self._prefilling[:1]), now + 0.01)
        if self._running:
            due = min(due, self._next_step)
        for socket, _ in self._poller.poll(max(0, int((due - now) * 1e3 + 0.999))):
            self._drain_socket(socket)
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + self.settings.heartbeat_s
            self._beat(now)
        while self._prefilling and self._prefilling[0][0] <= now:
            self._prefilled(heapq.heappop(self._prefilling)[2], now)
        if self._running and now >= self._next_step:
            self._next_step = now + self.settings.step_s
            self._step()

    def _drain_socket(self, socket: Any) -> None:
        for _ in range(1024):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if socket is self._requests:
                self._on_router(self._codec.decode(frames[1]))
            elif socket is self._control:
                self._receiving.receive(frames[0], frames[1])
            else:
                self._writing.receive(frames[0])

    # routers

    def _on_router(self, message: RouterMessage) -> None:
        if isinstance(message, Hello):
            fresh = message.router_id not in self._routers
            self._routers[message.router_id] = time.monotonic()
            if fresh:
                self._send(message.router_id, Welcome(version=PROTOCOL_VERSION, info=self.info))
            return
        self.log.append(message)
        match message:
            case Submit():
                self._submit(message)
            case Cancel():
                self._cancel(message.request_id, message.attempt)
            case Drain():
                self._draining = True
            case SnapshotRequest() if self.settings.swallow_snapshots > 0:
                self.settings.swallow_snapshots -= 1
            case SnapshotRequest():
                for router_id in list(self._routers):
                    self._send(router_id, self._cache.snapshot())

    def _submit(self, submit: Submit) -> None:
        settings = self.settings
        sequence = FakeSequence(submit, settings.block_tokens)
        if not sequence.resumes_truly:
            self._fail(submit, "internal", "the emitted tokens are not what this model emits", retryable=False)
        elif settings.fail_next > 0:
            settings.fail_next -= 1
            self._fail(submit, settings.fail_code, "told to fail", retryable=settings.fail_retryable)
        elif self._draining:
            self._fail(submit, "draining", "draining", retryable=True)
        elif len(self._prefilling) >= settings.max_waiting:
            self._fail(submit, "full", "queue is full", retryable=True)
        else:
            now = time.monotonic()
            sequence.received, sequence.started = now, max(now, self._prefill_free_at)
            chain = self._cache.chain(submit)
            sequence.cached_tokens = min(self._cache.hit_tokens(chain), sequence.num_tokens - 1)
            sequence.events = self._cache.store(chain)  # who waits behind it will hit; told when it is computed
            took_s = settings.prefill_s + sequence.num_left / settings.prefill_tokens_per_s
            self._prefill_free_at = sequence.started + took_s
            heapq.heappush(self._prefilling, (self._prefill_free_at, next(self._order), sequence))
            if submit.decode is not None:
                self._writing.offer(sequence)

    def _prefilled(self, sequence: FakeSequence, now: float) -> None:
        submit = sequence.submit
        self._publish(sequence.events)
        if self._is_void(submit):
            return
        tokens, finish = sequence.draw(1)
        times = StageTimes(queue_s=sequence.started - sequence.received, compute_s=now - sequence.started)
        self._deltas(submit.router_id, [self._delta(sequence, tokens, finish, first=times)])
        if submit.decode is None:
            if finish is None:
                self._admit(sequence)
        elif finish is not None:
            self._writing.withdraw(sequence)
        else:
            self._writing.computed(sequence)

    def _step(self) -> None:
        deltas: defaultdict[str, list[TokenDelta]] = defaultdict(list)
        for request_id, sequence in list(self._running.items()):
            tokens, finish = sequence.draw(self.settings.tokens_per_step)
            deltas[sequence.submit.router_id].append(self._delta(sequence, tokens, finish))
            if finish is not None:
                del self._running[request_id]
        for router_id, items in deltas.items():
            self._deltas(router_id, items)

    def _delta(
        self, sequence: FakeSequence, tokens: list[int], finish: FinishReason | None, first: StageTimes | None = None
    ) -> TokenDelta:
        submit = sequence.submit
        return TokenDelta(
            request_id=submit.request_id,
            attempt=submit.attempt,
            index=sequence.num_output - len(tokens),
            tokens=tokens,
            logprobs=logprobs_of(tokens) if submit.sampling.logprobs is not None else None,
            finish=finish,
            cached_tokens=sequence.cached_tokens if first is not None else None,
            times=first,
        )

    def _cancel(self, request_id: str, attempt: int) -> None:
        self._tombstones[request_id] = max(attempt, self._tombstones.get(request_id, 0))
        if len(self._tombstones) > MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)
        held = self._running.get(request_id)
        if held is not None and held.submit.attempt <= attempt:
            del self._running[request_id]
        self._writing.cancel(request_id, attempt)
        self._receiving.cancel(request_id, attempt)

    def _is_void(self, submit: Submit) -> bool:
        return self._tombstones.get(submit.request_id, 0) >= submit.attempt

    def _admit(self, sequence: FakeSequence) -> None:
        self._running[sequence.submit.request_id] = sequence
        self._next_step = max(self._next_step, time.monotonic())

    # hand-off

    def _handoff_failed(self, sequence: FakeSequence, reason: str) -> None:
        self._fail(sequence.submit, "handoff", reason, retryable=True)

    def _refusal(self, sequence: FakeSequence) -> str:
        """Why an offered sequence is not taken; "" if it is."""
        submit = sequence.submit
        if self._is_void(submit) or self._draining:
            return "cancelled or draining"
        self._running.pop(submit.request_id, None)  # an older attempt
        return "no slot" if len(self._running) + len(self._receiving) >= self.settings.max_num_seqs else ""

    def _take_over(self, sequence: FakeSequence) -> bool:
        submit = sequence.submit
        self._publish(self._cache.store(self._cache.chain(submit)))
        handoff_s = time.monotonic() - sequence.received
        self._send(
            submit.router_id,
            Deltas(
                started=[
                    Started(
                        request_id=submit.request_id,
                        attempt=submit.attempt,
                        handoff_s=handoff_s,
                        exposed_s=0.0,
                        num_bytes=0,
                    )
                ]
            ),
        )
        tokens, finish = sequence.draw(1)  # restates the first token
        self._deltas(submit.router_id, [self._delta(sequence, tokens, finish)])
        if finish is None:
            self._admit(sequence)
        self.settings.swallow_accepts -= 1
        return self.settings.swallow_accepts < 0

    # sending to routers

    def _beat(self, now: float) -> None:
        for router_id, heard in list(self._routers.items()):
            if now - heard > SILENCE_S:
                del self._routers[router_id]
        self._writing.expire(now)
        self._receiving.expire(now)
        load = self._load()
        for router_id in list(self._routers):
            self._send(router_id, load)

    def _load(self) -> Load:
        settings = self.settings
        self._num_loads += 1
        live = sum(-(-(s.submit.num_prompt + s.num_output) // settings.block_tokens) for s in self._running.values())
        return Load(
            seq=self._num_loads,
            num_waiting=len(self._prefilling),
            num_running=len(self._running),
            waiting_tokens=sum(item[2].num_left for item in self._prefilling),
            blocks_free=max(0, settings.num_blocks - live - self._receiving.num_blocks - len(self._cache)),
            blocks_cached=len(self._cache),
            blocks_live=live,
            blocks_leased=self._receiving.num_blocks,
            pending_handoffs=len(self._writing) + len(self._receiving),
            prefill_tokens_per_s=settings.prefill_tokens_per_s,
            step_s=settings.step_s,
            draining=self._draining,
            healthy=settings.healthy,
            bad_peers=list(settings.bad_peers),
            num_routers=len(self._routers),
        )

    def _fail(self, submit: Submit, code: str, reason: str, *, retryable: bool) -> None:
        self._send(
            submit.router_id,
            Failed(request_id=submit.request_id, attempt=submit.attempt, code=code, reason=reason, retryable=retryable),
        )

    def _publish(self, events: Message | None) -> None:
        if events is None:
            return
        if self.settings.swallow_kv_events > 0:
            self.settings.swallow_kv_events -= 1
            return
        for router_id in list(self._routers):
            self._send(router_id, events)

    def _deltas(self, router_id: str, items: list[TokenDelta]) -> None:
        if self.settings.lose_deltas > 0:
            self.settings.lose_deltas -= 1
            return
        self._send(router_id, Deltas(items=items))

    def _send(self, router_id: str, message: WorkerMessage | Message) -> None:
        if not self.settings.muted:
            try:
                self._requests.send_multipart([router_id.encode(), self._codec.encode(message)], zmq.NOBLOCK)
            except zmq.ZMQError:  # the router is gone or does not read: its heartbeats decide
                self._routers.pop(router_id, None)

    def _bind(self, port: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 10_000)
        socket.bind(f"tcp://127.0.0.1:{port or '*'}")
        return socket


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT."""
    try:
        worker = FakeWorker(parse(argv), cluster_key())
    except ConfigError as exc:
        print(f"fake_worker: {exc}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    print("READY " + msgspec.json.encode(worker.info).decode(), flush=True)
    worker.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
