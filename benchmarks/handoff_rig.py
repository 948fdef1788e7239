"""Both ends of the hand-off benchmark: geometry, block bookkeeping, and a receiver in a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import atexit
import base64
import gc
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from benchmarks.handoff_limits import SocketSink
from kv_transfer.memory import Arena
from kv_transfer.metrics import HandoffReport
from kv_transfer.receiver import HandoffServer
from kv_transfer.sender import SWITCH_S
from kv_transfer.transports import Memory
from llm_engine.api.config import TransferConfig
from llm_engine.api.handoff import FirstToken, KvLayout, Plane
from llm_engine.api.messages import Role, Submit, WorkerInfo

if TYPE_CHECKING:
    from kv_transfer.device import DeviceRegion

KEY = b"benchmark" * 4
BLOCK_TOKENS = 64
MTP_LAYERS = 1
_ORDERS = 64  # more than the caches of block tables hold
# Bytes a token and layer: latent with rope, and the indexer's key. Tiny: what a hand-off costs beside its bytes.
FORMATS = {"bf16": (1152, 256), "fp8": (656, 132), "tiny": (2, 1)}


class Parcel(NamedTuple):
    """What the receiver must know of a hand-off; travels as its request id."""

    number: int
    cached_tokens: int
    scattered: bool

    @property
    def request_id(self) -> str:
        return json.dumps(self)

    @classmethod
    def parse(cls, request_id: str) -> Parcel:
        return cls(*json.loads(request_id))


def settle() -> None:
    """As workers do once they have started: what is here stays, and no thread holds the interpreter for long."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # libraries look for leaks at the end
    sys.setswitchinterval(SWITCH_S)


def make_layout(num_layers: int, num_blocks: int, kv_format: str) -> KvLayout:
    """V3.2's planes for `num_layers` main layers and the MTP layer."""
    planes: list[Plane] = []
    offset = 0
    for prefix, layers in (("", num_layers), ("mtp_", MTP_LAYERS)):
        for name, size in zip(("latent", "index"), FORMATS[kv_format], strict=True):
            block_bytes = size * BLOCK_TOKENS
            planes.append(Plane(name=prefix + name, num_layers=layers, block_bytes=block_bytes, offset=offset))
            offset += layers * num_blocks * block_bytes
    return KvLayout(block_tokens=BLOCK_TOKENS, num_blocks=num_blocks, planes=tuple(planes))


def make_info(name: str, role: Role, layout: KvLayout, control_addr: str) -> WorkerInfo:
    """A worker as far as the hand-off is concerned."""
    return WorkerInfo(
        name=name,
        role=role,
        incarnation=name,
        pid=os.getpid(),
        request_addr="tcp://127.0.0.1:0",
        control_addr=control_addr,
        metrics_addr="",
        model="benchmark",
        format_id="benchmark",
        weight_version="0",
        block_tokens=BLOCK_TOKENS,
        num_blocks=layout.num_blocks,
        max_model_len=1 << 20,
        max_num_seqs=64,
    )


def pick(free: list[int], count: int, *, scattered: bool, seed: int) -> list[int]:
    """Take `count` blocks: a run, or blocks of which no two are neighbours in order."""
    if scattered:
        random.Random(seed).shuffle(free)
    else:
        free.sort()
    taken, free[:] = free[:count], free[count:]
    return taken


@dataclass(slots=True, eq=False)
class _Reservation:
    number: int
    have_tokens: int
    blocks: Sequence[int]


class _Blocks:
    """A pool whose sequences end at once."""

    def __init__(self, num_blocks: int) -> None:
        self.reports: dict[int, dict[str, Any]] = {}
        self._free = set(range(num_blocks))
        self._ordered = range(num_blocks)
        # Mixed beforehand: a block pool takes what is free, it does not shuffle while somebody waits.
        self._mixed = [random.Random(seed).sample(self._ordered, num_blocks) for seed in range(_ORDERS)]

    async def reserve(self, submit: Submit, num_tokens: int, digests: bytes) -> _Reservation | None:
        parcel = Parcel.parse(submit.request_id)
        count = -(-num_tokens // BLOCK_TOKENS) - parcel.cached_tokens // BLOCK_TOKENS
        if count > len(self._free):
            return None
        order = self._mixed[parcel.number % _ORDERS] if parcel.scattered else self._ordered
        if len(self._free) == len(order):
            blocks = list(order[:count])
        else:
            blocks = list(itertools.islice(filter(self._free.__contains__, order), count))
        self._free.difference_update(blocks)
        return _Reservation(parcel.number, parcel.cached_tokens, blocks)

    async def reserve_probe(self) -> _Reservation | None:
        return None

    def prepare(self, submit: Submit, reservation: _Reservation) -> None:
        pass

    async def admit(self, submit: Submit, reservation: _Reservation, first: FirstToken, report: HandoffReport) -> None:
        # Both ends read one clock, that of the host.
        admitted = {"admitted": time.monotonic()}
        self.reports[reservation.number] = {"verify_s": report.verify_s, "marks": {**report.marks, **admitted}}
        self.release(reservation)

    def release(self, reservation: _Reservation) -> None:
        self._free.update(reservation.blocks)

    quarantine = free = release


async def receive(args: argparse.Namespace, layout: KvLayout, config: TransferConfig) -> None:
    """The child: serves until its stdin closes, then prints what it measured, by number of the hand-off."""
    hello: dict[str, Any] = {"pid": os.getpid()}
    sink: SocketSink | None = None
    arena: Memory
    if args.transport == "cuda_ipc":
        region = arena = device_memory(layout, args.receiver_device, filled=False)
        hello["device"] = base64.b64encode(msgspec.msgpack.encode(region.describe())).decode()
    else:
        arena = Arena.create(layout.arena_bytes, shared=True)
        sink = SocketSink(arena.buffer)
        hello |= {"fd": arena.fileno(), "port": sink.port}
    pool = _Blocks(layout.num_blocks)
    server = HandoffServer(config=config, key=KEY, layout=layout, arena=arena, reserver=pool)
    address = hello["address"] = server.bind("127.0.0.1")
    running = asyncio.create_task(server.run(make_info("d", Role.DECODE, layout, address)))
    settle()
    print(json.dumps(hello), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.close()
    await running
    if sink is not None:
        sink.close()
    print(json.dumps(pool.reports), flush=True)


def device_memory(layout: KvLayout, ordinal: int, *, filled: bool) -> DeviceRegion:
    """A pool on a card; `filled` with noise, or with zeros. A negative ordinal counts from the last card."""
    import torch

    from kv_transfer.device import DeviceRegion

    device = torch.device("cuda", ordinal % torch.cuda.device_count())
    size = -(-layout.arena_bytes // 8) * 8
    if filled:
        return DeviceRegion(torch.randint(0, 256, (size,), dtype=torch.uint8, device=device))
    return DeviceRegion(torch.zeros(size, dtype=torch.uint8, device=device))
