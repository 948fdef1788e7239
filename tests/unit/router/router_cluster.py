"""A dispatcher and fake workers for tests: real sockets, real threads or processes, no model."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.fake_model import expected_tokens
from benchmarks.fake_settings import FakeSettings
from benchmarks.fake_worker import FakeWorker
from llm_engine.api.config import SECRET_ENV, build
from llm_engine.api.messages import Role
from llm_engine.api.request import FinishReason, SamplingParams, TokenLogprobs
from router.dispatch_api import GenerationRequest, OutputChunk
from router.dispatcher import ClusterDispatcher

KEY = b"k" * 32
_ids = itertools.count()


def request(prompt: list[int], max_tokens: int = 8, *, deadline_s: float = 60.0, **sampling: Any) -> GenerationRequest:
    sampling.setdefault("seed", 7)
    return GenerationRequest(
        request_id=f"r{next(_ids)}",
        prompt_tokens=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
        deadline_s=deadline_s,
        arrived=time.monotonic(),
    )


@dataclass
class Output:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    cached_tokens: int | None = None
    chunks: int = 0

    def add(self, chunk: OutputChunk) -> None:
        self.chunks += 1
        self.tokens += chunk.tokens
        self.logprobs += chunk.logprobs or []
        self.finish = chunk.finish
        if chunk.cached_tokens is not None:
            assert self.cached_tokens is None
            self.cached_tokens = chunk.cached_tokens


async def collect(dispatcher: ClusterDispatcher, req: GenerationRequest) -> Output:
    output = Output()
    async with contextlib.aclosing(dispatcher.submit(req)) as chunks:
        async for chunk in chunks:
            assert output.finish is None, "a chunk after the finish"
            output.add(chunk)
    return output


async def check(dispatcher: ClusterDispatcher, req: GenerationRequest) -> Output:
    """Run a request and compare it with what its prompt and seed determine."""
    output = await collect(dispatcher, req)
    assert output.tokens == expected_tokens(req.prompt_tokens, req.sampling.seed, req.sampling.max_tokens)
    assert output.finish is FinishReason.LENGTH
    return output


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait for a condition that other threads or processes bring about."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  what happens elsewhere sets no event here
            await asyncio.sleep(0.005)


@contextlib.contextmanager
def fakes(*roles: str, **settings: Any):  # type: ignore[no-untyped-def]
    """Fake workers on threads, named role-index."""
    settings.setdefault("heartbeat_s", 0.05)
    workers: list[FakeWorker] = []
    try:
        for index, role in enumerate(roles):
            worker = FakeWorker(FakeSettings(name=f"{role}-{index}", role=Role(role), **settings), KEY)
            worker.start()
            workers.append(worker)
        yield workers
    finally:
        for worker in workers:
            worker.stop()


@contextlib.asynccontextmanager
async def dispatching(
    addresses: list[str], *, workers: int | None = None, worker: dict[str, Any] | None = None, **router: Any
) -> AsyncIterator[ClusterDispatcher]:
    """A running dispatcher that has heard from `workers` of its addresses (all of them by default)."""
    router.setdefault("heartbeat_timeout_s", 1.0)
    config = build(
        {
            "model": {"path": "/nowhere/fake"},
            "worker": {"heartbeat_s": 0.05, **(worker or {})},
            "router": {"workers": addresses, **router},
        }
    )
    dispatcher = ClusterDispatcher(config, KEY)
    running = asyncio.create_task(dispatcher.run())
    expected = len(addresses) if workers is None else workers
    try:
        workers_known = dispatcher.membership.workers
        await until(lambda: sum(w.usable and w.load.seq > 0 and w.prefix.in_step for w in workers_known) >= expected)
        yield dispatcher
        assert not running.done(), running.exception()
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await dispatcher.close()


class FakeProcess:
    """A fake worker in a process of its own: to be killed or stopped."""

    def __init__(self, role: str, port: int, *options: str) -> None:
        command = [sys.executable, "-m", "benchmarks.fake_worker", "--role", role, "--port", str(port)]
        self._process = subprocess.Popen(
            [*command, "--name", f"{role}-{port}", "--heartbeat-ms", "50", *options],
            stdout=subprocess.PIPE,
            env={**os.environ, SECRET_ENV: KEY.decode()},
        )
        self.address = f"tcp://127.0.0.1:{port}"

    def wait_ready(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode()
        info: dict[str, Any] = json.loads(line.removeprefix("READY "))
        return info

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self.kill()
