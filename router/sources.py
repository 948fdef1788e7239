"""The chunks of all sequences of one HTTP request, in the order in which they come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Protocol, Self

from llm_engine.api.errors import ServingError
from router.dispatch_api import Dispatcher, GenerationRequest, OutputChunk

Chunks = AsyncGenerator[OutputChunk, None]


class ChunkSource(Protocol):
    """Use as an async context manager: leaving it aborts every sequence that is still running."""

    async def next(self) -> tuple[int, OutputChunk]:
        """(index of the sequence, chunk). Raises what the dispatcher raised for any of them."""
        ...

    async def drop(self, index: int) -> None:
        """No more chunks of this sequence are wanted: it has finished, or is aborted."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_source(dispatcher: Dispatcher, requests: Sequence[GenerationRequest]) -> ChunkSource:
    """Submit the requests."""
    if len(requests) == 1:
        return SingleSource(dispatcher.submit(requests[0]))
    return MergedSource([dispatcher.submit(request) for request in requests])


class SingleSource:
    """One sequence: no task, no queue."""

    __slots__ = ("_chunks",)

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks

    async def next(self) -> tuple[int, OutputChunk]:
        try:
            return 0, await self._chunks.__anext__()
        except StopAsyncIteration:
            raise _ended() from None

    async def drop(self, index: int) -> None:
        await self._chunks.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._chunks.aclose()


class MergedSource:
    """Several sequences: a task each, which waits while the client does not read (its sequence's chunks coalesce)."""

    def __init__(self, streams: Sequence[Chunks]) -> None:
        self._streams = streams
        self._queue: asyncio.Queue[tuple[int, OutputChunk | Exception]] = asyncio.Queue(maxsize=len(streams))
        self._tasks: list[asyncio.Task[None]] = []
        self._dropped: set[int] = set()

    async def next(self) -> tuple[int, OutputChunk]:
        while True:
            index, item = await self._queue.get()
            if index in self._dropped:
                continue
            if isinstance(item, Exception):
                raise item
            return index, item

    async def drop(self, index: int) -> None:
        self._dropped.add(index)
        await _cancel([self._tasks[index]])

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._pump(i, stream)) for i, stream in enumerate(self._streams)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await _cancel(self._tasks)

    async def _pump(self, index: int, stream: Chunks) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for chunk in stream:
                    await self._queue.put((index, chunk))
                    if chunk.finish is not None:
                        return
            raise _ended()
        except Exception as exc:
            await self._queue.put((index, exc))


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def _ended() -> ServingError:
    return ServingError("the output ended without a finish")
