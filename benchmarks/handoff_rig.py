"""Both ends of the hand-off benchmark: a receiver in a process of its own, and what the link between them can do."""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from kv_transfer.memory import Arena
from kv_transfer.metrics import HandoffReport
from kv_transfer.receiver import HandoffServer
from llm_engine.api.config import TransferConfig
from llm_engine.api.handoff import FirstToken, KvLayout, Plane
from llm_engine.api.messages import Role, Submit, WorkerInfo

KEY = b"benchmark" * 4
BLOCK_TOKENS = 64
MTP_LAYERS = 1
# Bytes a token and layer: latent with rope, and the indexer's key.
FORMATS = {"bf16": (1152, 256), "fp8": (656, 132)}
_CHUNK = 4 << 20  # of a plain socket copy


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
    have_tokens: int
    blocks: Sequence[int]


class _Blocks:
    """A pool whose sequences end at once."""

    def __init__(self, num_blocks: int) -> None:
        self.reports: dict[int, dict[str, float]] = {}
        self._free = list(range(num_blocks))

    async def reserve(self, submit: Submit, num_tokens: int) -> _Reservation | None:
        parcel = Parcel.parse(submit.request_id)
        count = -(-num_tokens // BLOCK_TOKENS) - parcel.cached_tokens // BLOCK_TOKENS
        if count > len(self._free):
            return None
        blocks = pick(self._free, count, scattered=parcel.scattered, seed=parcel.number + 1)
        return _Reservation(parcel.cached_tokens, blocks)

    async def reserve_probe(self) -> _Reservation | None:
        return None

    async def admit(self, submit: Submit, reservation: _Reservation, first: FirstToken, report: HandoffReport) -> None:
        number = Parcel.parse(submit.request_id).number
        self.reports[number] = {"verify_s": report.verify_s, "exposed_s": report.exposed_s}
        self.release(reservation)

    def release(self, reservation: _Reservation) -> None:
        self._free.extend(reservation.blocks)

    quarantine = free = release


async def receive(args: argparse.Namespace, layout: KvLayout, config: TransferConfig) -> None:
    """The child: serves until its stdin closes, then prints what it measured, by number of the hand-off."""
    arena = Arena.create(layout.arena_bytes, shared=True)
    pool = _Blocks(layout.num_blocks)
    server = HandoffServer(config=config, key=KEY, layout=layout, arena=arena, reserver=pool)
    address = server.bind("127.0.0.1")
    running = asyncio.create_task(server.run(make_info("d", Role.DECODE, layout, address)))
    sink = _SocketSink(arena.buffer)
    hello = {"address": address, "pid": os.getpid(), "fd": arena.fileno(), "port": sink.port}
    print(json.dumps(hello), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.close()
    await running
    sink.close()
    print(json.dumps(pool.reports), flush=True)


class Limit(Protocol):
    """What the link could do at best, between the same two processes."""

    name: str

    def rate(self, num_bytes: int) -> float:
        """GB/s of one plain copy of so many bytes from the source into the receiver's pool."""
        ...


class MemoryLimit:
    """memcpy into the receiver's memory, in pieces as long as a hand-off's longest contiguous run."""

    name = "memcpy"

    def __init__(self, source: memoryview, hello: dict[str, Any], run_bytes: int) -> None:
        self._source = np.frombuffer(source, np.uint8)
        self._run_bytes = run_bytes
        with open(f"/proc/{hello['pid']}/fd/{hello['fd']}", "r+b") as file:
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            self._target = np.frombuffer(mmap.mmap(file.fileno(), len(source), flags=flags), np.uint8)

    def rate(self, num_bytes: int) -> float:
        """See Limit."""
        started = time.monotonic()
        for first in range(0, num_bytes, self._run_bytes):
            last = min(first + self._run_bytes, num_bytes)
            np.copyto(self._target[first:last], self._source[first:last])
        return num_bytes / (time.monotonic() - started) / 1e9


class SocketLimit:
    """One plain TCP connection over the same loopback: sendall here, recv_into the pool there, one byte back."""

    name = "socket"

    def __init__(self, source: memoryview, hello: dict[str, Any]) -> None:
        self._source = source
        self._sock = socket.create_connection(("127.0.0.1", hello["port"]))
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def rate(self, num_bytes: int) -> float:
        """See Limit."""
        started = time.monotonic()
        self._sock.sendall(num_bytes.to_bytes(8, "little"))
        for first in range(0, num_bytes, _CHUNK):
            self._sock.sendall(self._source[first : min(first + _CHUNK, num_bytes)])
        if not self._sock.recv(1):
            raise ConnectionError("the receiver of the plain copy is gone")
        return num_bytes / (time.monotonic() - started) / 1e9


class _SocketSink:
    """Receiver's end of SocketLimit, in a thread."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._listener.close()

    def _serve(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # closed
            return
        with sock:
            while head := sock.recv(8, socket.MSG_WAITALL):
                done, num_bytes = 0, int.from_bytes(head, "little")
                while done < num_bytes:
                    done += sock.recv_into(self._memory[done : min(done + _CHUNK, num_bytes)])
                sock.sendall(b"k")
