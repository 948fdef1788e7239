"""A router reduced to the request plane: submits, keeps every output index once, watches loads. For worker tests."""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import msgspec
import zmq
import zmq.asyncio

from llm_engine.api.messages import (
    PROTOCOL_VERSION,
    Cancel,
    Codec,
    Deltas,
    Failed,
    Hello,
    KvEvents,
    KvSnapshot,
    Load,
    Message,
    Peer,
    Started,
    Submit,
    Welcome,
    WorkerInfo,
    WorkerMessage,
)
from llm_engine.api.request import FinishReason, SamplingParams, TokenDelta, TokenLogprobs, pack_tokens

_BEAT_S = 0.1


@dataclass
class Stream:
    """One request as its router sees it. `tokens` are the client's: every index once, in order."""

    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    attempt: int = -1
    finish: FinishReason | None = None
    to: str = ""  # the worker of the current attempt that got the Submit
    failures: list[Failed] = field(default_factory=list)
    started: list[Started] = field(default_factory=list)
    cached_tokens: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)  # the worker that sent each token first
    sent: list[float] = field(default_factory=list)  # when each token arrived

    @property
    def failed(self) -> bool:
        """Whether the current attempt has failed."""
        return any(failure.attempt == self.attempt for failure in self.failures)

    def take(self, worker: str, delta: TokenDelta) -> None:
        """The rules of a journal: a decode worker says Started first, restated tokens are equal, there is no gap."""
        assert not self.failed, f"{self.request_id}: {worker} sends tokens of an attempt that it declared failed"
        if worker != self.to:
            assert self.started, f"{self.request_id}: {worker} sends tokens of a sequence it did not announce"
            assert self.started[-1].attempt == self.attempt
        assert delta.index <= len(self.tokens), f"{self.request_id}: gap before index {delta.index}"
        for offset, token in enumerate(delta.tokens):
            index = delta.index + offset
            if index < len(self.tokens):
                assert self.tokens[index] == token, f"{self.request_id}: index {index} changed"
                continue
            self.tokens.append(token)
            self.sources.append(worker)
            self.sent.append(time.monotonic())
            if delta.logprobs is not None:
                self.logprobs.append(delta.logprobs[offset])
        if delta.cached_tokens is not None:
            self.cached_tokens.append(delta.cached_tokens)
        self.finish = delta.finish or self.finish


class MiniRouter:
    """Connections to any number of workers. An async context manager; a protocol violation fails its exit."""

    def __init__(self, key: bytes) -> None:
        self.router_id = f"router-{secrets.token_hex(4)}"
        self.streams: dict[str, Stream] = {}
        self.infos: dict[str, WorkerInfo] = {}
        self.loads: dict[str, Load] = {}
        self.events: dict[str, list[KvEvents | KvSnapshot]] = {}
        self.ignored: list[tuple[str, Any]] = []  # of older attempts or unknown requests
        self._codec: Codec[WorkerMessage] = Codec(key, WorkerMessage)
        self._context = zmq.asyncio.Context()
        self._sockets: dict[str, zmq.asyncio.Socket] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._news = asyncio.Condition()
        self._ids = itertools.count()
        self._violation: Exception | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._sockets):
            await self.disconnect(name)
        self._context.term()
        if self._violation is not None and error is None:
            raise self._violation

    async def connect(self, name: str, address: str) -> WorkerInfo:
        """Say Hello until the worker answers, and every heartbeat from then on."""
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, self.router_id.encode())
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(address)
        self._sockets[name] = socket
        self.infos.pop(name, None)
        self._tasks[name] = asyncio.create_task(self._serve(name, socket))
        await self.until(lambda: name in self.infos and name in self.loads)
        return self.infos[name]

    async def disconnect(self, name: str) -> None:
        """Forget a worker."""
        task = self._tasks.pop(name)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self._sockets.pop(name).close()
        self.loads.pop(name, None)

    async def send(self, name: str, message: Message) -> None:
        await self._sockets[name].send(self._codec.encode(message))

    def stream(self, prompt: Sequence[int], *, max_tokens: int, **sampling: Any) -> Stream:
        """A new request, not submitted yet."""
        params = {"seed": 0, "temperature": 0.0, "ignore_eos": True} | sampling
        request_id = f"{self.router_id}-{next(self._ids)}"
        stream = Stream(request_id, list(prompt), SamplingParams(max_tokens=max_tokens, **params))
        self.streams[request_id] = stream
        return stream

    async def submit(self, stream: Stream, to: str, decode: str | None = None, *, deadline_s: float = 60.0) -> None:
        """Open the next attempt of a stream: on `to` alone, or handed over to `decode`."""
        stream.attempt += 1
        stream.to = to
        peer = None
        if decode is not None:
            info = self.infos[decode]
            peer = Peer(name=info.name, incarnation=info.incarnation, control_addr=info.control_addr)
        message = Submit(
            request_id=stream.request_id,
            attempt=stream.attempt,
            router_id=self.router_id,
            tokens=pack_tokens([*stream.prompt, *stream.tokens]),
            num_prompt=len(stream.prompt),
            sampling=stream.sampling,
            deadline_s=deadline_s,
            decode=peer,
        )
        await self.send(to, message)

    async def cancel(self, stream: Stream, *workers: str, attempt: int | None = None) -> None:
        """Cancel the current attempt, or an older one that a worker may still be at."""
        for name in workers:
            attempt = stream.attempt if attempt is None else attempt
            await self.send(name, Cancel(request_id=stream.request_id, attempt=attempt))

    async def until(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Return once `condition()` holds; looked at after every message. Raises what a message violated."""
        async with asyncio.timeout(timeout_s), self._news:
            while not condition():
                if self._violation is not None:
                    raise self._violation
                await self._news.wait()

    async def finished(self, *streams: Stream, timeout_s: float = 30.0) -> None:
        """Wait until every stream has its finish; a failure of a current attempt is an error."""
        await self.until(lambda: all(s.finish or s.failed for s in streams), timeout_s)
        assert not [s.failures[-1] for s in streams if s.failed]

    async def failed(self, stream: Stream, timeout_s: float = 30.0) -> Failed:
        """Wait for the current attempt's failure."""
        await self.until(lambda: stream.failed, timeout_s)
        return stream.failures[-1]

    async def persist(self, stream: Stream, to: str, decode: str | None = None, *, attempts: int = 50) -> None:
        """Submit, and open another attempt for every retryable failure until the stream has its finish."""
        while stream.attempt < attempts:
            await self.submit(stream, to, decode)
            await self.until(lambda: bool(stream.finish) or stream.failed)
            if stream.finish:
                return
            assert stream.failures[-1].retryable, stream.failures[-1]
        raise AssertionError(f"{stream.request_id} failed {attempts} times, at last with {stream.failures[-1]}")

    async def clean(self, *workers: str, timeout_s: float = 30.0) -> None:
        """Wait until nothing is left on these workers: no sequence, live or leased block, quarantine, hand-off."""
        newer = {name: self.loads[name].seq + 2 for name in workers}  # reported after this call
        try:
            await self.until(
                lambda: all(self.loads[n].seq >= newer[n] and not leftovers(self.loads[n]) for n in workers), timeout_s
            )
        except TimeoutError:
            raise AssertionError({name: leftovers(self.loads[name]) for name in workers}) from None

    async def _serve(self, name: str, socket: zmq.asyncio.Socket) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._greet(socket))
            tasks.create_task(self._read(name, socket))

    async def _greet(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            await socket.send(self._codec.encode(Hello(version=PROTOCOL_VERSION, router_id=self.router_id)))
            await asyncio.sleep(_BEAT_S)

    async def _read(self, name: str, socket: zmq.asyncio.Socket) -> None:
        try:
            while True:
                self._take(name, self._codec.decode(await socket.recv()))
                async with self._news:
                    self._news.notify_all()
        except Exception as exc:
            self._violation = exc
            async with self._news:
                self._news.notify_all()

    def _take(self, name: str, message: WorkerMessage) -> None:
        match message:
            case Welcome():
                self.infos[name] = message.info
            case Load():
                self.loads[name] = message
            case Deltas():
                for started in message.started:
                    stream = self._current(name, started)
                    if stream is not None:
                        stream.started.append(started)
                for delta in message.items:
                    stream = self._current(name, delta)
                    if stream is not None:
                        stream.take(name, delta)
            case Failed():
                stream = self._current(name, message)
                if stream is not None:
                    stream.failures.append(message)
            case KvEvents() | KvSnapshot():
                self.events.setdefault(name, []).append(message)

    def _current(self, name: str, message: Any) -> Stream | None:
        stream = self.streams.get(message.request_id)
        if stream is None or stream.attempt != message.attempt:
            self.ignored.append((name, message))
            return None
        return stream


def leftovers(load: Load) -> dict[str, int]:
    """What a worker without requests must not have."""
    names = ("num_waiting", "num_running", "blocks_live", "blocks_leased", "blocks_quarantined", "pending_handoffs")
    fields = msgspec.structs.asdict(load)
    return {name: fields[name] for name in names if fields[name]}


def prompts(count: int, *, seed: int = 5, longest: int = 150) -> list[list[int]]:
    """Byte tokens, several blocks long, a third of them with one shared head."""
    rng = random.Random(seed)
    head = rng.choices(range(3, 259), k=longest // 2)
    made = []
    for index in range(count):
        shared = head if index % 3 == 0 else []
        made.append(shared + rng.choices(range(3, 259), k=rng.randint(1, longest - len(shared))))
    return made


def asks(router: MiniRouter, count: int = 18) -> list[Stream]:
    """Twelve tokens for every prompt; every other one sampled, every fourth with logprobs."""
    return [
        router.stream(
            prompt, max_tokens=12, seed=index, temperature=0.8 * (index % 2), logprobs=None if index % 4 else 2
        )
        for index, prompt in enumerate(prompts(count))
    ]


async def answers(router: MiniRouter, to: str, decode: str | None = None, *, at_once: bool) -> list[Stream]:
    """Serve every ask, together or one after the other."""
    streams = asks(router)
    for stream in streams:
        await router.submit(stream, to, decode)
        if not at_once:
            await router.finished(stream)
    await router.finished(*streams, timeout_s=60.0)
    return streams


def outcomes(streams: list[Stream]) -> list[Any]:
    return [(s.tokens, s.finish, [entry.logprob for entry in s.logprobs]) for s in streams]
