"""Speed of the hand-off between two processes of this host.

    python -m benchmarks.handoff_cpu --transport shm --tokens 16384 --json

Prints, for a cache of DeepSeek V3.2's page shape (latent 576 and index 128 values of 2 bytes a token): the rate of
whole hand-offs (offer to Accepted, nothing overlapped with compute), its ratio to a memcpy of as many bytes in the same
run (in one go, and in pieces as the links copy), and the latency of a hand-off of a single block.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kv_transfer.layout import PIECE_BYTES
from kv_transfer.memory import Arena
from kv_transfer.metrics import HandoffReport
from kv_transfer.receiver import HandoffServer
from kv_transfer.writer import HandoffClient
from llm_engine.api.config import TransferConfig
from llm_engine.api.handoff import FirstToken, KvLayout, Plane
from llm_engine.api.messages import Peer, Role, Submit, WorkerInfo
from llm_engine.api.request import SamplingParams, pack_tokens

_KEY = b"benchmark" * 4
_BLOCK_TOKENS = 64
_FIRST = FirstToken(token=0, logprobs=None, hidden=bytes(14336), cached_tokens=0)


@dataclass(slots=True, eq=False)
class _Blocks:
    have_tokens: int
    blocks: Sequence[int]


class _AllBlocks:
    """A reserver that gives the same blocks to one request after the other."""

    def __init__(self, blocks: Sequence[int]) -> None:
        self._blocks = blocks

    async def reserve(self, submit: Submit, num_tokens: int) -> _Blocks | None:
        return _Blocks(0, self._blocks[: -(-num_tokens // _BLOCK_TOKENS)])

    async def reserve_probe(self) -> _Blocks | None:
        return None

    async def admit(self, submit: Submit, reservation: _Blocks, first: FirstToken, report: HandoffReport) -> None:
        pass

    def release(self, reservation: _Blocks) -> None:
        pass

    quarantine = free = release


def _layout(num_blocks: int, num_layers: int) -> KvLayout:
    latent, index = 576 * 2 * _BLOCK_TOKENS, 128 * 2 * _BLOCK_TOKENS
    planes = (
        Plane(name="latent", num_layers=num_layers, block_bytes=latent, offset=0),
        Plane(name="index", num_layers=num_layers, block_bytes=index, offset=num_layers * num_blocks * latent),
    )
    return KvLayout(block_tokens=_BLOCK_TOKENS, num_blocks=num_blocks, planes=planes)


def _info(name: str, role: Role, layout: KvLayout, control_addr: str) -> WorkerInfo:
    return WorkerInfo(
        name=name,
        role=role,
        incarnation=name,
        pid=0,
        request_addr="",
        control_addr=control_addr,
        metrics_addr="",
        model="benchmark",
        format_id="benchmark",
        weight_version="0",
        block_tokens=_BLOCK_TOKENS,
        num_blocks=layout.num_blocks,
        max_model_len=1 << 20,
        max_num_seqs=1,
    )


def _order(args: argparse.Namespace, num_blocks: int, seed: int) -> list[int]:
    order = list(range(num_blocks))
    if args.scattered:
        random.Random(seed).shuffle(order)
    return order


async def _receive(args: argparse.Namespace, layout: KvLayout, config: TransferConfig) -> None:
    """The child: serves until its stdin closes."""
    arena = Arena.create(layout.arena_bytes, shared=True)
    reserver = _AllBlocks(_order(args, layout.num_blocks, 1))
    server = HandoffServer(config=config, key=_KEY, layout=layout, arena=arena, reserver=reserver)
    address = server.bind("127.0.0.1")
    running = asyncio.create_task(server.run(_info("d", Role.DECODE, layout, address)))
    print(address, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.close()
    await running


async def _send(args: argparse.Namespace, layout: KvLayout, config: TransferConfig) -> dict[str, Any]:
    """The parent: measures."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.handoff_cpu",
        *sys.argv[1:],
        "--receiver",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    address = (await child.stdout.readline()).decode().strip()
    source = Arena.create(layout.arena_bytes, shared=False)
    np.frombuffer(source.buffer, dtype=np.uint8)[:] = 7
    memcpy = _memcpy_rate(source.buffer, len(source.buffer))
    memcpy_pieces = _memcpy_rate(source.buffer, PIECE_BYTES)
    client = HandoffClient(
        config=config, key=_KEY, info=_info("p", Role.PREFILL, layout, ""), layout=layout, source=source.buffer
    )
    running = asyncio.create_task(client.run())
    peer = Peer(name="d", incarnation="d", control_addr=address)
    blocks = _order(args, layout.num_blocks, 2)
    await _hand_off(client, peer, layout, blocks[:1])
    bulk = [await _hand_off(client, peer, layout, blocks) for _ in range(args.repeat)]
    small = [await _hand_off(client, peer, layout, blocks[:1]) for _ in range(args.small_repeat)]
    await client.close()
    await running
    child.stdin.close()
    await child.wait()
    rates = [report.num_bytes / seconds / 1e9 for report, seconds in bulk]
    latencies = sorted(seconds * 1e3 for _, seconds in small)
    return {
        "transport": bulk[0][0].transport,
        "checksum": args.checksum,
        "scattered": args.scattered,
        "bytes": bulk[0][0].num_bytes,
        "gb_per_s_best": round(max(rates), 2),
        "gb_per_s_median": round(statistics.median(rates), 2),
        "memcpy_gb_per_s": round(memcpy, 2),
        "memcpy_pieces_gb_per_s": round(memcpy_pieces, 2),
        "ratio_to_memcpy": round(max(rates) / memcpy, 3),
        "ratio_to_memcpy_pieces": round(max(rates) / memcpy_pieces, 3),
        "small_bytes": small[0][0].num_bytes,
        "small_ms_p50": round(statistics.median(latencies), 3),
        "small_ms_p99": round(latencies[int(len(latencies) * 0.99)], 3),
    }


async def _hand_off(
    client: HandoffClient, peer: Peer, layout: KvLayout, blocks: list[int]
) -> tuple[HandoffReport, float]:
    num_tokens = len(blocks) * _BLOCK_TOKENS
    submit = Submit(
        request_id=f"{time.monotonic_ns()}",
        attempt=0,
        router_id="",
        tokens=pack_tokens([0] * num_tokens),
        num_prompt=num_tokens,
        sampling=SamplingParams(seed=0, max_tokens=1),
        deadline_s=60.0,
        decode=peer,
    )
    started = time.monotonic()
    handoff = client.offer(submit, num_tokens, "0")
    for layer in range(layout.planes[0].num_layers):
        handoff.layer_ready(layer, 0, blocks)
    report = await handoff.commit(_FIRST, compute_end=started)
    return report, time.monotonic() - started


def _memcpy_rate(source: memoryview, piece: int) -> float:
    """Best of five, in GB/s; large single copies bypass the caches and are faster than the same bytes in pieces."""
    origin = np.frombuffer(source, dtype=np.uint8)
    target = np.zeros_like(origin)
    best = 0.0
    for _ in range(5):
        started = time.monotonic()
        for first in range(0, len(origin), piece):
            np.copyto(target[first : first + piece], origin[first : first + piece])
        best = max(best, len(origin) / (time.monotonic() - started) / 1e9)
    return best


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.handoff_cpu", description=__doc__)
    parser.add_argument("--transport", choices=("shm", "tcp"), default="shm")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--checksum", choices=("full", "count"), default="full")
    parser.add_argument("--scattered", action="store_true", help="no two blocks are neighbours on both ends")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--small-repeat", type=int, default=200)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument("--receiver", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    layout = _layout(max(1, args.tokens // _BLOCK_TOKENS), args.layers)
    config = TransferConfig(transport=args.transport, checksum=args.checksum, canary_period_s=3600, commit_timeout_s=60)
    if args.receiver:
        asyncio.run(_receive(args, layout, config))
        return
    result = asyncio.run(_send(args, layout, config))
    print(json.dumps(result) if args.json else "\n".join(f"{key:>18}  {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
