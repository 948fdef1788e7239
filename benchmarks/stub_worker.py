"""A prefill and a decode worker that cost next to nothing, for measuring the router alone.

Both speak the real request plane at addresses of their own, but live in one thread: the hand-off between them is a
Python call. Whatever has arrived is answered at once and together: the first tokens in one frame from the prefill side,
all others in one frame from the decode side. No cache, no pace, no cancels.

    python -m benchmarks.stub_worker
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
from collections import defaultdict

import msgspec
import zmq

from llm_engine.api.config import cluster_key
from llm_engine.api.errors import ConfigError
from llm_engine.api.messages import (
    PROTOCOL_VERSION,
    Codec,
    Deltas,
    Hello,
    KvSnapshot,
    Load,
    Message,
    Role,
    RouterMessage,
    SnapshotRequest,
    Started,
    Submit,
    Welcome,
    WorkerInfo,
)
from llm_engine.api.request import FinishReason, StageTimes, TokenDelta

HEARTBEAT_S = 0.25
NUM_BLOCKS = 1 << 20
TOKEN = 42  # a printable one in every checkpoint


class StubSide:
    """One worker's address: answers the handshake, collects what is submitted."""

    def __init__(self, role: Role, codec: Codec[RouterMessage], context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._codec = codec
        self._routes: set[bytes] = set()
        self._num_loads = 0
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 100_000)
        self.socket.bind("tcp://127.0.0.1:*")
        address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.info = WorkerInfo(
            name=f"stub-{role.value}",
            role=role,
            incarnation=secrets.token_hex(8),
            pid=os.getpid(),
            request_addr=address,
            control_addr="" if role is Role.PREFILL else "in-process",
            metrics_addr="",
            model="fake",
            format_id="stub-format",
            weight_version="0",
            block_tokens=64,
            num_blocks=NUM_BLOCKS,
            max_model_len=1 << 20,
            max_num_seqs=4096,
        )

    def take(self) -> list[Submit]:
        """Handle everything that has arrived; returns the submits."""
        submits: list[Submit] = []
        recv = self.socket.recv
        while True:
            try:
                route = recv(zmq.NOBLOCK)
            except zmq.Again:
                return submits
            message = self._codec.decode(recv())
            if isinstance(message, Submit):
                submits.append(message)
            elif isinstance(message, Hello) and route not in self._routes:
                self._routes.add(route)
                self.send(route, Welcome(version=PROTOCOL_VERSION, info=self.info))
            elif isinstance(message, SnapshotRequest):
                self.send(route, KvSnapshot(seq=0, digests=[]))

    def beat(self) -> None:
        """Report an idle worker to every router."""
        self._num_loads += 1
        load = Load(seq=self._num_loads, blocks_free=NUM_BLOCKS, prefill_tokens_per_s=1e7, step_s=1e-3)
        for route in self._routes:
            self.send(route, load)

    def send(self, route: bytes, message: Message) -> None:
        """To a router that is gone it goes nowhere."""
        self.socket.send(route, zmq.NOBLOCK | zmq.SNDMORE)
        self.socket.send(self._codec.encode(message), zmq.NOBLOCK)


class StubPair:
    """Both workers; `run()` serves until `stop()`."""

    def __init__(self, key: bytes) -> None:
        codec: Codec[RouterMessage] = Codec(key, RouterMessage)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.prefill = StubSide(Role.PREFILL, codec, context)
        self.decode = StubSide(Role.DECODE, codec, context)
        self._running = True

    def stop(self) -> None:
        """Leave `run` soon."""
        self._running = False

    def run(self) -> None:
        """Serve."""
        poller = zmq.Poller()
        poller.register(self.prefill.socket, zmq.POLLIN)
        poller.register(self.decode.socket, zmq.POLLIN)
        next_beat = time.monotonic()
        while self._running:
            ready = [socket for socket, _ in poller.poll(round(HEARTBEAT_S * 1e3))]
            now = time.monotonic()
            if self.decode.socket in ready:
                self.decode.take()
            if self.prefill.socket in ready:
                by_router: defaultdict[str, list[Submit]] = defaultdict(list)
                for submit in self.prefill.take():
                    by_router[submit.router_id].append(submit)
                for router_id, submits in by_router.items():
                    self._answer(router_id.encode(), submits, now)
            if now >= next_beat:
                next_beat = now + HEARTBEAT_S
                self.prefill.beat()
                self.decode.beat()

    def _answer(self, route: bytes, submits: list[Submit], received: float) -> None:
        """All tokens of these sequences, as both workers tell them."""
        self.prefill.send(route, Deltas(items=[_first(submit, received) for submit in submits]))
        started = [_taken_over(submit) for submit in submits]
        self.decode.send(route, Deltas(items=[_all(submit) for submit in submits], started=started))


def _first(submit: Submit, received: float) -> TokenDelta:
    """What the prefill worker says: the first token, and how long the worker took from receipt to sending."""
    return TokenDelta(
        request_id=submit.request_id,
        attempt=submit.attempt,
        index=0,
        tokens=[TOKEN],
        finish=FinishReason.LENGTH if submit.sampling.max_tokens == 1 else None,
        cached_tokens=0,
        times=StageTimes(compute_s=time.monotonic() - received),
    )


def _taken_over(submit: Submit) -> Started:
    return Started(request_id=submit.request_id, attempt=submit.attempt, handoff_s=0.0, exposed_s=0.0, num_bytes=0)


def _all(submit: Submit) -> TokenDelta:
    """What the decode worker says: the first token again, and the others."""
    return TokenDelta(
        request_id=submit.request_id,
        attempt=submit.attempt,
        index=0,
        tokens=[TOKEN] * submit.sampling.max_tokens,
        finish=FinishReason.LENGTH,
    )


def main() -> int:
    """Serve until SIGTERM or SIGINT."""
    try:
        pair = StubPair(cluster_key())
    except ConfigError as exc:
        print(f"stub_worker: {exc}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: pair.stop())
    addresses = [pair.prefill.info.request_addr, pair.decode.info.request_addr]
    print("READY " + msgspec.json.encode({"addresses": addresses}).decode(), flush=True)
    pair.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
