"""The hand-off between fake workers: the messages of `llm_engine.api.handoff` over ZeroMQ, without any data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import zmq

from benchmarks.fake_model import FakeSequence
from llm_engine.api.handoff import (
    Accepted,
    Commit,
    FirstToken,
    Grant,
    Manifest,
    Offer,
    ReceiverMessage,
    Refused,
    Withdraw,
    WriterMessage,
)
from llm_engine.api.messages import Codec, Message

LEASE_S = 60.0


class WritingSide:
    """The prefill end: offers when a prefill is queued, commits when it is computed and granted."""

    def __init__(
        self,
        key: bytes,
        context: zmq.Context[zmq.Socket[bytes]],
        poller: zmq.Poller,
        *,
        timeout_s: float,
        on_failed: Callable[[FakeSequence, str], None],
    ) -> None:
        self._codec: Codec[ReceiverMessage] = Codec(key, ReceiverMessage)
        self._context = context
        self._poller = poller
        self._timeout_s = timeout_s
        self._on_failed = on_failed
        self._peers: dict[str, zmq.Socket[bytes]] = {}  # by control address
        self._open: dict[str, FakeSequence] = {}

    @property
    def sockets(self) -> Iterable[zmq.Socket[bytes]]:
        return self._peers.values()

    def __len__(self) -> int:
        return len(self._open)

    def offer(self, sequence: FakeSequence) -> None:
        sequence.deadline = float("inf")  # runs from the end of the computation
        self._open[sequence.submit.request_id] = sequence
        self._send(sequence, Offer(submit=sequence.submit, num_tokens=sequence.num_tokens, weight_version="0"))

    def computed(self, sequence: FakeSequence) -> None:
        """The first token is drawn: commit now, or as soon as the grant is there."""
        sequence.deadline = time.monotonic() + self._timeout_s
        sequence.computed = True
        self._commit(sequence)

    def withdraw(self, sequence: FakeSequence) -> None:
        """The sequence ended with its first token."""
        submit = sequence.submit
        if self._open.pop(submit.request_id, None) is not None:
            self._send(sequence, Withdraw(request_id=submit.request_id, attempt=submit.attempt))

    def cancel(self, request_id: str, attempt: int) -> None:
        held = self._open.get(request_id)
        if held is not None and held.submit.attempt <= attempt:
            self.withdraw(held)

    def receive(self, frame: bytes) -> None:
        message = self._codec.decode(frame)
        if not isinstance(message, Grant | Accepted | Refused):
            return
        held = self._open.get(message.request_id)
        if held is None or held.submit.attempt != message.attempt:
            return
        if isinstance(message, Grant):
            held.granted = True
            self._commit(held)
            return
        del self._open[message.request_id]
        if isinstance(message, Refused):
            self._on_failed(held, message.reason)

    def expire(self, now: float) -> None:
        for request_id, sequence in list(self._open.items()):
            if now > sequence.deadline:
                del self._open[request_id]
                self._on_failed(sequence, "decode does not answer")

    def _commit(self, sequence: FakeSequence) -> None:
        if not (sequence.granted and sequence.computed):
            return
        submit, token = sequence.submit, sequence.sampler.token(sequence.first_index)
        self._send(
            sequence,
            Commit(
                request_id=submit.request_id,
                attempt=submit.attempt,
                lease_id=0,
                epoch=0,
                manifest=Manifest(num_tokens=sequence.num_tokens, planes=()),
                first=FirstToken(token=token, logprobs=None, hidden=b"", cached_tokens=0),
                weight_version="0",
                compute_end_age_s=0.0,
            ),
        )

    def _send(self, sequence: FakeSequence, message: Message) -> None:
        decode = sequence.submit.decode
        assert decode is not None
        socket = self._peers.get(decode.control_addr)
        if socket is None:
            socket = self._peers[decode.control_addr] = self._context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(decode.control_addr)
            self._poller.register(socket, zmq.POLLIN)
        try:
            socket.send(self._codec.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self._open.pop(sequence.submit.request_id, None)
            self._on_failed(sequence, f"{decode.name} does not read")


class ReceivingSide:
    """The decode end: grants what `refusal` does not object to, takes over what is committed.

    `on_taken` says whether the writer is told.
    """

    def __init__(
        self,
        key: bytes,
        socket: zmq.Socket[bytes],
        block_tokens: int,
        *,
        refusal: Callable[[FakeSequence], str],
        on_taken: Callable[[FakeSequence], bool],
    ) -> None:
        self._codec: Codec[WriterMessage] = Codec(key, WriterMessage)
        self._socket = socket
        self._block_tokens = block_tokens
        self._refusal = refusal
        self._on_taken = on_taken
        self._leased: dict[str, FakeSequence] = {}

    def __len__(self) -> int:
        return len(self._leased)

    @property
    def num_blocks(self) -> int:
        """Blocks under lease."""
        return sum(sequence.num_blocks for sequence in self._leased.values())

    def cancel(self, request_id: str, attempt: int) -> None:
        held = self._leased.get(request_id)
        if held is not None and held.submit.attempt <= attempt:
            del self._leased[request_id]

    def receive(self, route: bytes, frame: bytes) -> None:
        message = self._codec.decode(frame)
        if isinstance(message, Offer):
            self._offered(route, FakeSequence(message.submit, self._block_tokens))
        elif isinstance(message, Withdraw):
            self.cancel(message.request_id, message.attempt)
        elif isinstance(message, Commit):
            held = self._leased.get(message.request_id)
            if held is not None and held.submit.attempt == message.attempt:
                del self._leased[message.request_id]
                if self._on_taken(held):
                    self._answer(route, Accepted(request_id=message.request_id, attempt=message.attempt, lease_id=0))

    def expire(self, now: float) -> None:
        for request_id, sequence in list(self._leased.items()):
            if now > sequence.deadline:
                del self._leased[request_id]

    def _offered(self, route: bytes, sequence: FakeSequence) -> None:
        submit = sequence.submit
        ids: dict[str, Any] = {"request_id": submit.request_id, "attempt": submit.attempt}
        reason = self._refusal(sequence)
        if reason:
            self._answer(route, Refused(code="stale", reason=reason, **ids))
            return
        sequence.received = time.monotonic()
        sequence.deadline = sequence.received + LEASE_S
        self._leased[submit.request_id] = sequence
        self._answer(route, Grant(lease_id=0, epoch=0, have_tokens=0, blocks=(), **ids))

    def _answer(self, route: bytes, message: Message) -> None:
        try:
            self._socket.send_multipart([route, self._codec.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError:  # the writer is gone: its router will see
            return
