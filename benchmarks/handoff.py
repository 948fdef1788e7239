"""Speed of the hand-off between two processes of this host.

Pools have DeepSeek V3.2's geometry: 64-token blocks of latent cache and indexer keys for every layer and the MTP layer.
A layer is reported `--compute-ms-per-layer` after the one before it, as if a device had computed it; with 0 all are
reported at once, as a prefix found in the cache is. Prints for every
mode: exposed latency (last layer computed → admitted by the receiver; `accepted` adds the way back of its answer),
total time, bytes, GB/s from offer to acceptance, what a plain copy of as many bytes reached between the same two
processes right before, CPU time, and where the time went.

    baton bench handoff --transport shm --tokens 65536 --compute-ms-per-layer 30 --json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.handoff_compute import Compute, DeviceCompute, HostCompute
from benchmarks.handoff_limits import DeviceLimit, Limit, MemoryLimit, SocketLimit
from benchmarks.handoff_options import cannot, parse
from benchmarks.handoff_report import Mode, Run, Sample, modes, summarise
from benchmarks.handoff_rig import (
    BLOCK_TOKENS,
    KEY,
    Parcel,
    device_memory,
    make_info,
    make_layout,
    pick,
    receive,
    settle,
)
from benchmarks.handoff_trace import Trace, wrap
from benchmarks.machine import cpu_s, machine
from kv_transfer.memory import Arena
from kv_transfer.writer import Handoff, HandoffClient
from llm_engine.api.config import TransferConfig
from llm_engine.api.handoff import FirstToken, KvLayout
from llm_engine.api.hashing import DIGEST_BYTES
from llm_engine.api.messages import Peer, Role, Submit
from llm_engine.api.request import SamplingParams, pack_tokens

if TYPE_CHECKING:
    from kv_transfer.device import DeviceRegion

_FIRST = FirstToken(token=0, logprobs=None, hidden=bytes(14336), cached_tokens=0)


class Writer:
    """The sending process: a pool, a client, and a step thread for every hand-off at once."""

    def __init__(
        self,
        args: argparse.Namespace,
        layout: KvLayout,
        client: HandoffClient,
        peer: Peer,
        compute: Compute,
        trace: Trace,
    ) -> None:
        self._layout = layout
        self._client = client
        self._peer = peer
        self._compute_layer = compute
        self._trace = trace
        self._layer_s = args.compute_ms_per_layer / 1e3
        self._ready_at = args.ready_at
        self._chunk_blocks = max(1, (args.chunk_tokens or args.tokens) // BLOCK_TOKENS)
        self._numbers = itertools.count()
        self._steps = ThreadPoolExecutor(64, "step")

    async def round(self, mode: Mode) -> list[Sample]:
        """`mode.concurrent` hand-offs at once."""
        free = list(range(self._layout.num_blocks))
        count = -(-mode.tokens // BLOCK_TOKENS)
        jobs = []
        for _ in range(mode.concurrent):
            parcel = Parcel(next(self._numbers), mode.cached_tokens, mode.scattered)
            blocks = pick(free, count, scattered=mode.scattered, seed=parcel.number)
            jobs.append(self._hand_off(mode, parcel, self._submit(mode, parcel), blocks))
        return list(await asyncio.gather(*jobs))

    def close(self) -> None:
        self._steps.shutdown()

    def _submit(self, mode: Mode, parcel: Parcel) -> Submit:
        return Submit(
            request_id=parcel.request_id,
            attempt=0,
            router_id="",
            tokens=pack_tokens([0] * mode.tokens),
            num_prompt=mode.tokens,
            sampling=SamplingParams(seed=0, max_tokens=1),
            deadline_s=600.0,
            decode=self._peer,
        )

    async def _hand_off(self, mode: Mode, parcel: Parcel, submit: Submit, blocks: list[int]) -> Sample:
        started = time.monotonic()
        digests = bytes(DIGEST_BYTES * (mode.tokens // BLOCK_TOKENS))
        handoff = self._client.offer(submit, mode.tokens, "0", digests=digests)
        loop = asyncio.get_running_loop()
        compute_end = await loop.run_in_executor(self._steps, self._compute, handoff, blocks, mode.cached_tokens)
        report = await handoff.commit(_FIRST, compute_end=compute_end)
        ended = time.monotonic()
        self._trace.add("hand-off", "drain", compute_end, compute_end + report.drain_s)
        self._trace.add("hand-off", "commit, verify, accept", compute_end + report.drain_s, ended)
        return Sample(parcel, report, started, compute_end, ended)

    def _compute(self, handoff: Handoff, blocks: list[int], cached_tokens: int) -> float:
        """The step thread: the prefix found in the cache is ready at once, all else chunk by chunk and layer by layer.

        With nothing to compute everything is such a prefix.
        """
        layers = range(sum(plane.num_layers for plane in self._layout.planes) // 2)
        cached = cached_tokens // BLOCK_TOKENS if self._layer_s else len(blocks)
        if cached:
            handoff.layers_ready(layers, 0, blocks[:cached])
        compute = self._compute_layer.begin()
        for first in range(cached, len(blocks), self._chunk_blocks):
            chunk = tuple(blocks[first : first + self._chunk_blocks])
            for layer in layers:
                started = time.monotonic()
                seconds = self._layer_s * len(chunk) / min(self._chunk_blocks, len(blocks))
                compute.layer(seconds * self._ready_at)
                handoff.layers_ready(range(layer, layer + 1), first, chunk)
                compute.layer(seconds * (1 - self._ready_at))
                self._trace.add("compute", f"layer {layer}", started, time.monotonic())
        ended = compute.end()
        handoff.complete(_FIRST, compute_end=ended)
        return ended


async def measure(args: argparse.Namespace, layout: KvLayout, config: TransferConfig) -> dict[str, Any]:
    """Run every wanted mode against a receiver in a child process."""
    wanted = modes(args.tokens, args.repeat)
    runs = [Run(mode) for name, mode in wanted.items() if args.mode in (name, "all")]
    source, compute = _source(args, layout)
    trace = Trace()
    async with _receiver(args.words) as (child, hello):
        client = HandoffClient(
            config=config,
            key=KEY,
            info=make_info("p", Role.PREFILL, layout, ""),
            layout=layout,
            source=source,
            wrap_link=wrap(trace, layout) if args.trace else lambda link: link,
        )
        serving = asyncio.create_task(client.run())
        run_bytes = max(plane.block_bytes for plane in layout.planes) * layout.num_blocks
        limits: Sequence[Limit]
        if not isinstance(source, memoryview):
            limits = [DeviceLimit(source, hello)]
        elif args.transport == "shm":
            limits = [MemoryLimit(source, hello, run_bytes)]
        else:
            limits = SocketLimit.each(source, hello)
        peer = Peer(name="d", incarnation="d", control_addr=hello["address"])
        writer = Writer(args, layout, client, peer, compute, trace)
        await writer.round(Mode("warm-up", args.tokens, 1))
        await writer.round(Mode("warm-up", args.tokens, 1, scattered=True))
        settle()
        if args.trace:
            trace.on = True
            await writer.round(Mode("trace", args.tokens, 1))
            trace.on = False
            title = f"{args.tokens} tokens, {args.layers} + 1 layers, {args.transport}, hand-off under compute"
            trace.write(args.trace, title)
        for run in runs:
            await _run(run, writer, limits, layout.bytes_per_block(), hello["pid"])
        link = client.stats().peers[0]
        await client.close()
        await serving
        writer.close()
        received = json.loads((await child.communicate(b""))[0])
    return {
        "transport": link.transport,
        "reason": link.reason,
        "checksum": args.checksum,
        "kv_format": args.kv_format,
        "layers": args.layers,
        "compute_ms_per_layer": args.compute_ms_per_layer,
        "ready_at": args.ready_at,
        "machine": machine() + (f", {_cards()}" if args.transport == "cuda_ipc" else ""),
        "modes": [summarise(run, received) for run in runs],
    }


def versus(args: argparse.Namespace, layout: KvLayout, config: TransferConfig) -> dict[str, Any]:
    """Both transports in turns, `--repeat` times one round each; the same modes, sizes and processes' work."""
    names = (args.transport, args.versus)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(args.repeat):
        for name in names:
            words = [*args.words, "--transport", name, "--repeat", "1"]
            turn = argparse.Namespace(**{**vars(args), "transport": name, "repeat": 1, "words": words})
            results[name].append(asyncio.run(measure(turn, layout, config.model_copy(update={"transport": name}))))
    modes_seen = [mode["mode"] for mode in results[names[0]][0]["modes"]]
    rows = []
    for index, mode in enumerate(modes_seen):
        rates = {name: [one["modes"][index]["gb_per_s_median"] for one in results[name]] for name in names}
        ratios = sorted(ours / theirs for ours, theirs in zip(*rates.values(), strict=True) if theirs > 0)
        rows.append(
            {
                "mode": mode,
                "bytes": results[names[0]][0]["modes"][index]["bytes"],
                **{f"{name}_gb_per_s": values for name, values in rates.items()},
                "ratio_median": round(statistics.median(ratios), 3) if ratios else None,
                "ratio_least": round(ratios[0], 3) if ratios else None,
                "ratio_most": round(ratios[-1], 3) if ratios else None,
            }
        )
    first = results[names[0]][0]
    return {"transport": args.transport, "versus": args.versus, "machine": first["machine"], "modes": rows}


async def _run(run: Run, writer: Writer, limits: Sequence[Limit], bytes_per_block: int, receiver: int) -> None:
    mode = run.mode
    num_blocks = -(-mode.tokens // BLOCK_TOKENS) - mode.cached_tokens // BLOCK_TOKENS
    for _ in range(mode.rounds):
        for limit in limits:
            rate = await asyncio.to_thread(limit.rate, num_blocks * bytes_per_block * mode.concurrent)
            run.limits.setdefault(limit.name, []).append(rate)
        cpu, far_cpu = time.process_time(), cpu_s(receiver)
        samples = await writer.round(mode)
        run.samples += samples
        run.round_s.append(max(s.ended for s in samples) - min(s.started for s in samples))
        run.cpu_s.append(time.process_time() - cpu)
        run.receiver_cpu_s.append(cpu_s(receiver) - far_cpu)


def _source(args: argparse.Namespace, layout: KvLayout) -> tuple[memoryview | DeviceRegion, Compute]:
    """The writer's pool and what computes into it."""
    if args.transport == "cuda_ipc":
        region = device_memory(layout, args.device, filled=True)
        return region, DeviceCompute(region.device)
    memory = Arena.create(layout.arena_bytes, shared=False).buffer
    np.frombuffer(memory, dtype=np.uint8)[:] = 7
    return memory, HostCompute()


@contextlib.asynccontextmanager
async def _receiver(words: Sequence[str]) -> AsyncIterator[tuple[asyncio.subprocess.Process, dict[str, Any]]]:
    command = [sys.executable, "-m", "benchmarks.handoff", *words, "--receiver"]
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    try:
        assert child.stdout is not None
        yield child, json.loads(await child.stdout.readline())
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, print; returns the exit code."""
    args = parse(argv, __doc__)
    layout = make_layout(args.layers, max(32, -(-args.tokens // BLOCK_TOKENS)), args.kv_format)
    if reason := cannot(args, layout.arena_bytes):
        print(f"baton bench: {reason}", file=sys.stderr)
        return 2
    config = TransferConfig(
        transport=args.transport,
        checksum=args.checksum,
        canary_period_s=3600,
        grant_timeout_s=600,
        commit_timeout_s=120,
    )
    if args.receiver:
        asyncio.run(receive(args, layout, config))
        return 0
    result = versus(args, layout, config) if args.versus else asyncio.run(measure(args, layout, config))
    print(json.dumps(result) if args.json else _lines(result))
    return 0


def _cards() -> str:
    import torch

    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _lines(result: dict[str, Any]) -> str:
    head = [f"{key}: {value}" for key, value in result.items() if key != "modes"]
    for mode in result["modes"]:
        head += ["", *(f"{key:>28}  {value}" for key, value in mode.items())]
    return "\n".join(head)


if __name__ == "__main__":
    raise SystemExit(main())
