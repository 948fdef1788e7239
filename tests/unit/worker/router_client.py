"""The router's end of the request plane, as small as it can be: one DEALER socket, typed messages, deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

import zmq
import zmq.asyncio

from llm_engine.api.messages import PROTOCOL_VERSION, Codec, Hello, Message, Peer, Submit, Welcome, WorkerMessage
from llm_engine.api.request import SamplingParams, pack_tokens

KEY = b"k" * 32
TIMEOUT_S = 30.0


class RouterClient:
    """One connection to one worker. Keeps everything it receives in `seen`."""

    def __init__(
        self,
        address: str,
        router_id: str = "router-0",
        *,
        identity: str = "",
        key: bytes = KEY,
        receive_queue: int = 0,
    ) -> None:
        self.router_id = router_id
        self.codec: Codec[WorkerMessage] = Codec(key, WorkerMessage)
        self.seen: list[WorkerMessage] = []
        self._context = zmq.asyncio.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, (identity or router_id).encode())
        self.socket.setsockopt(zmq.LINGER, 0)
        if receive_queue:
            self.socket.setsockopt(zmq.RCVHWM, receive_queue)
            self.socket.setsockopt(zmq.RCVBUF, 4096)
        self.socket.connect(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()
        self._context.term()

    async def send(self, message: Message) -> None:
        await self.socket.send(self.codec.encode(message))

    async def greet(self, version: int = PROTOCOL_VERSION) -> None:
        await self.send(Hello(version=version, router_id=self.router_id))

    async def hello(self) -> Welcome:
        """Say Hello and wait for the Welcome."""
        await self.greet()
        welcome = await self.wait_for(lambda m: isinstance(m, Welcome))
        assert isinstance(welcome, Welcome)
        return welcome

    async def receive(self, timeout_s: float = TIMEOUT_S) -> WorkerMessage:
        async with asyncio.timeout(timeout_s):
            message = self.codec.decode(await self.socket.recv())
        self.seen.append(message)
        return message

    async def wait_for(self, wanted: Callable[[WorkerMessage], bool], timeout_s: float = TIMEOUT_S) -> WorkerMessage:
        """The next message that is wanted; the others stay in `seen`."""
        async with asyncio.timeout(timeout_s):
            while True:
                message = await self.receive()
                if wanted(message):
                    return message


def submit_of(
    tokens: list[int],
    *,
    request_id: str = "request-0",
    attempt: int = 0,
    router_id: str = "router-0",
    max_tokens: int = 8,
    temperature: float = 0.0,
    seed: int = 0,
    num_prompt: int | None = None,
    decode: Peer | None = None,
    deadline_s: float = 60.0,
) -> Submit:
    return Submit(
        request_id=request_id,
        attempt=attempt,
        router_id=router_id,
        tokens=pack_tokens(tokens),
        num_prompt=len(tokens) if num_prompt is None else num_prompt,
        sampling=SamplingParams(seed=seed, max_tokens=max_tokens, temperature=temperature, ignore_eos=True),
        deadline_s=deadline_s,
        decode=decode,
    )
