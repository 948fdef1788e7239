"""What the router itself costs, without HTTP and without a network: relay of tokens, and placing a request.

    python -m benchmarks.router_core [--streams 256] [--tokens 200] [--json]

relay: worker steps as encoded frames → codec → inbox → journal → one reading task a stream; one token a stream a step.
place: a request opened, placed (hashes, policy, ledger), encoded and handed to ZeroMQ.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import uvloop

from llm_engine.api.config import SECRET_ENV, build
from llm_engine.api.messages import Codec, Deltas, WorkerMessage
from llm_engine.api.request import SamplingParams, TokenDelta
from router.dispatch_api import GenerationRequest
from router.dispatcher import ClusterDispatcher

REPEATS = 3
KEY = b"benchmark key, not a secret"


def generation(request_id: str, prompt: list[int], max_tokens: int) -> GenerationRequest:
    """One request."""
    return GenerationRequest(
        request_id=request_id,
        prompt_tokens=prompt,
        sampling=SamplingParams(seed=1, max_tokens=max_tokens),
        deadline_s=600.0,
        arrived=time.monotonic(),
    )


async def relay(dispatcher: ClusterDispatcher, num_streams: int, num_tokens: int, run: int) -> float:
    """Tokens per second of one core, from encoded frames to chunks in the hands of readers."""
    worker = next(iter(dispatcher.membership.workers))
    codec: Codec[WorkerMessage] = Codec(KEY, WorkerMessage)
    frames = [
        codec.encode(
            Deltas(
                items=[
                    TokenDelta(
                        request_id=f"cmpl-{run}-{i:022x}", attempt=1, index=index, tokens=[(i * 7 + index) % 4096]
                    )
                    for i in range(num_streams)
                ]
            )
        )
        for index in range(num_tokens)
    ]
    received = 0

    async def read(index: int) -> None:
        nonlocal received
        request = generation(f"cmpl-{run}-{index:022x}", [index] * 32, num_tokens + 1)
        async with contextlib.aclosing(dispatcher.submit(request)) as chunks:
            async for chunk in chunks:
                received += len(chunk.tokens)

    readers = [asyncio.create_task(read(index)) for index in range(num_streams)]
    async with asyncio.timeout(10):
        while dispatcher.status()["requests"]["inflight"] < num_streams:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    begin = time.thread_time()
    for frame in frames:
        worker.received(codec.decode(frame))
        await asyncio.sleep(0)  # the readers' turn
    await asyncio.sleep(0)
    elapsed = time.thread_time() - begin
    assert received == num_streams * num_tokens, (received, num_streams * num_tokens)
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    return received / elapsed


async def place(dispatcher: ClusterDispatcher, prompt_tokens: int, count: int) -> float:
    """Microseconds of this thread to take a request and send it: median of `count`."""
    took = []
    for index in range(count):
        request = generation(f"place-{prompt_tokens}-{index}", list(range(prompt_tokens)), 16)
        begin = time.thread_time()
        stream = dispatcher.submit(request)
        reading = asyncio.ensure_future(stream.__anext__())
        while not dispatcher.num_open:  # noqa: ASYNC110  long prompts take several turns
            await asyncio.sleep(0)
        took.append(time.thread_time() - begin)
        await stream.aclose()
        await asyncio.gather(reading, return_exceptions=True)
    return statistics.median(took) * 1e6


def start_workers() -> list[subprocess.Popen[bytes]]:
    """A pair of fake workers that never get to answer."""
    return [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fake_worker", *options, "--max-num-seqs", "4096"],
            stdout=subprocess.PIPE,
            env={**os.environ, SECRET_ENV: KEY.decode()},
        )
        for options in (["--role", "prefill", "--prefill-ms", "3600000"], ["--role", "decode"])
    ]


async def measure(addresses: list[str], num_streams: int, num_tokens: int) -> dict[str, float]:
    """Everything."""
    config = build({"model": {"path": "/fake"}, "router": {"workers": addresses, "max_inflight": 4096}})
    dispatcher = ClusterDispatcher(config, KEY)
    ticking = asyncio.create_task(dispatcher.run())
    try:
        async with asyncio.timeout(10):
            while not dispatcher.ready():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return {
            "relay_tokens_per_s": round(
                max([await relay(dispatcher, num_streams, num_tokens, run) for run in range(REPEATS)])
            ),
            "place_32_tokens_us": round(await place(dispatcher, 32, 500), 1),
            "place_2048_tokens_us": round(await place(dispatcher, 2048, 200), 1),
            "place_65536_tokens_us": round(await place(dispatcher, 65536, 10), 1),
        }
    finally:
        ticking.cancel()
        await dispatcher.close()


def _address(worker: subprocess.Popen[bytes]) -> str:
    assert worker.stdout is not None
    info: dict[str, str] = json.loads(worker.stdout.readline().removeprefix(b"READY "))
    return info["request_addr"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.router_core", description="Cost of the router's core.")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    workers = start_workers()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            report = runner.run(measure([_address(worker) for worker in workers], args.streams, args.tokens))
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    if args.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name:>24}  {value:,.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
