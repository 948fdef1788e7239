"""A writer and a receiver in one process, over real sockets and memory, with a block pool that notices every misuse."""

from __future__ import annotations

import asyncio
import gc
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import pytest

from kv_transfer import mooncake
from kv_transfer.intake import Intakes
from kv_transfer.link import Link
from kv_transfer.local import LocalNetwork
from kv_transfer.memory import Arena
from kv_transfer.metrics import HandoffReport
from kv_transfer.receiver import HandoffServer
from kv_transfer.writer import Handoff, HandoffClient
from llm_engine.api.config import TransferConfig
from llm_engine.api.errors import TransferError
from llm_engine.api.handoff import FirstToken, KvLayout, Plane
from llm_engine.api.messages import Peer, Role, Submit, WorkerInfo
from llm_engine.api.request import SamplingParams, pack_tokens

if TYPE_CHECKING:
    from kv_transfer.device import DeviceRegion

KEY = b"k" * 32
NO_ENGINE = mooncake.missing()
needs_engine = pytest.mark.skipif(bool(NO_ENGINE), reason=NO_ENGINE)
MOONCAKE = pytest.param("mooncake", marks=[needs_engine, pytest.mark.slow])  # every engine takes a second to end
BLOCK_TOKENS = 4
NUM_LAYERS = 3  # main layers; one MTP layer on top


def make_layout(num_blocks: int, *, scale: int = 1) -> KvLayout:
    """Two main planes of three layers and two MTP planes of one, of odd sizes."""
    planes: list[Plane] = []
    offset = 0
    for name, layers, size in (("latent", 3, 96), ("index", 3, 40), ("mtp_latent", 1, 96), ("mtp_index", 1, 40)):
        planes.append(Plane(name=name, num_layers=layers, block_bytes=size * scale, offset=offset))
        offset += layers * num_blocks * size * scale
    return KvLayout(block_tokens=BLOCK_TOKENS, num_blocks=num_blocks, planes=tuple(planes))


def cells(layout: KvLayout, block: int) -> Iterator[slice]:
    """Where one block lies, in every plane and layer."""
    for plane in layout.planes:
        for layer in range(plane.num_layers):
            start = plane.address(layer, block, layout.num_blocks)
            yield slice(start, start + plane.block_bytes)


def block_bytes(layout: KvLayout, memory: memoryview, block: int) -> bytes:
    """All bytes of one block."""
    return b"".join(memory[cell] for cell in cells(layout, block))


def make_info(name: str, incarnation: str, layout: KvLayout, control_addr: str = "", **changes: str) -> WorkerInfo:
    fields = {"format_id": "fmt", "weight_version": "w1", **changes}
    return WorkerInfo(
        name=name,
        role=Role.DECODE if control_addr else Role.PREFILL,
        incarnation=incarnation,
        pid=1,
        request_addr="",
        control_addr=control_addr,
        metrics_addr="",
        model="m",
        block_tokens=layout.block_tokens,
        num_blocks=layout.num_blocks,
        max_model_len=1 << 20,
        max_num_seqs=8,
        **fields,
    )


def make_submit(
    request_id: str, num_tokens: int, decode: Peer, *, attempt: int = 0, deadline_s: float = 30.0
) -> Submit:
    return Submit(
        request_id=request_id,
        attempt=attempt,
        router_id="router",
        tokens=pack_tokens(range(num_tokens)),
        num_prompt=num_tokens,
        sampling=SamplingParams(seed=1, max_tokens=8),
        deadline_s=deadline_s,
        decode=decode,
    )


FIRST = FirstToken(token=7, logprobs=None, hidden=b"\x01\x02", cached_tokens=0)


@dataclass(eq=False)
class Reservation:
    have_tokens: int
    blocks: list[int]
    state: str = "leased"  # leased | live | quarantined | free


@dataclass
class Pool:
    """Real block bookkeeping: a reservation that is given back twice, or too early, fails the test."""

    num_blocks: int
    have_blocks: dict[tuple[str, int], int] = field(default_factory=dict)  # (request, attempt) → cached prefix blocks
    refuse: Callable[[Submit], Exception | None] = lambda _: None
    on_admit: Callable[[Submit, Reservation], None] = lambda *_: None

    def __post_init__(self) -> None:
        self.free_blocks = list(range(self.num_blocks))
        self.all: list[Reservation] = []
        self.prepared: dict[str, Submit] = {}  # whose tokens are here
        self.admitted: dict[str, tuple[Reservation, FirstToken, HandoffReport]] = {}
        self.changed = asyncio.Event()

    async def reserve(self, submit: Submit, num_tokens: int, digests: bytes) -> Reservation | None:
        assert submit.tokens == b"", "they come when blocks are reserved"
        if (error := self.refuse(submit)) is not None:
            raise error
        have = self.have_blocks.get((submit.request_id, submit.attempt), 0)
        return self.take(-(-num_tokens // BLOCK_TOKENS) - have, have * BLOCK_TOKENS)

    async def reserve_probe(self) -> Reservation | None:
        return self.take(1)

    def prepare(self, submit: Submit, reservation: Reservation) -> None:
        assert reservation.state == "leased"
        self.prepared[submit.request_id] = submit

    async def admit(self, submit: Submit, reservation: Reservation, first: FirstToken, report: HandoffReport) -> None:
        assert self.prepared.pop(submit.request_id) == submit
        assert len(submit.tokens) == 4 * report.num_tokens
        if (error := self.refuse(submit)) is not None:
            raise error
        self.on_admit(submit, reservation)
        self._move(reservation, "live", "leased")
        self.admitted[submit.request_id] = (reservation, first, report)

    def release(self, reservation: Reservation) -> None:
        self._move(reservation, "free", "leased")

    def quarantine(self, reservation: Reservation) -> None:
        self._move(reservation, "quarantined", "leased")

    def free(self, reservation: Reservation) -> None:
        self._move(reservation, "free", "quarantined")

    def finish(self, request_id: str) -> None:
        """The engine is done with an admitted sequence."""
        self._move(self.admitted.pop(request_id)[0], "free", "live")

    def take(self, count: int, have_tokens: int = 0) -> Reservation | None:
        if count > len(self.free_blocks):
            return None
        reservation = Reservation(have_tokens, [self.free_blocks.pop(0) for _ in range(count)])
        self.all.append(reservation)
        return reservation

    def count(self, state: str) -> int:
        return sum(len(r.blocks) for r in self.all if r.state == state)

    def _move(self, reservation: Reservation, to: str, expected: str) -> None:
        assert reservation.state == expected, f"{reservation.state} → {to}"
        reservation.state = to
        if to == "free":
            assert not set(reservation.blocks) & set(self.free_blocks)
            self.free_blocks.extend(reservation.blocks)
        self.changed.set()
        self.changed = asyncio.Event()


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Poll for a state that no event announces; fails loudly."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


class Rig:
    """One receiver, any number of writers; everything is checked and closed on the way out."""

    def __init__(
        self,
        transport: str = "shm",
        *,
        num_blocks: int = 32,
        source_blocks: int = 40,
        scale: int = 1,
        receiver_transport: str | None = None,
        key: bytes = KEY,
        served_weights: str = "w1",
        **config: float | str | int,
    ) -> None:
        self.network = LocalNetwork()
        self.layout = make_layout(num_blocks, scale=scale)
        self.source_layout = make_layout(source_blocks, scale=scale)
        self.arena = Arena.create(self.layout.arena_bytes, shared=True)
        self.source = Arena.create(self.source_layout.arena_bytes, shared=False)
        self.card: DeviceRegion | None = None  # stands for a card that `source` is on
        rng = np.random.default_rng(0)
        self.source.buffer[:] = rng.integers(0, 256, self.source.num_bytes, np.uint8).tobytes()
        settings = {"canary_period_s": 60.0, **config}
        self.config = TransferConfig(transport=transport, **settings)
        self.receiver_config = TransferConfig(transport=receiver_transport or transport, **settings)
        self.key = key
        self.served_weights = served_weights
        self.pool = Pool(num_blocks, on_admit=self._check_bytes)
        self.stays_quarantined = 0  # blocks whose writer is never proven stopped
        self.sent: dict[tuple[str, int], list[int]] = {}  # (request, attempt) → source blocks
        self.clients: list[HandoffClient] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.server: HandoffServer[Reservation]
        self.target: Peer

    async def __aenter__(self) -> Self:
        self.server = self.make_server()
        address = self.server.bind("127.0.0.1")
        self.info = make_info("decode-0", "d0", self.layout, address, weight_version=self.served_weights)
        self._tasks.append(asyncio.create_task(self.server.run(self.info)))
        self.target = Peer(name="decode-0", incarnation="d0", control_addr=address)
        self.client = await self.add_client("prefill-0")
        return self

    def make_server(self) -> HandoffServer[Reservation]:
        """The receiver."""
        return HandoffServer(
            config=self.receiver_config,
            key=KEY,
            layout=self.layout,
            arena=self.arena,
            reserver=self.pool,
            network=self.network,
        )

    @property
    def intakes(self) -> Intakes[Reservation]:
        """Of the receiver's arena."""
        return self.server._intakes[self.arena.region]

    async def add_client(
        self,
        name: str,
        *,
        wrap_link: Callable[[Link], Link] = lambda link: link,
        config: TransferConfig | None = None,
        **changes: str,
    ) -> HandoffClient:
        client = HandoffClient(
            config=config or self.config,
            key=self.key,
            info=make_info(name, f"{name}-1", self.source_layout, **changes),
            layout=self.source_layout,
            source=self.card if self.card is not None else self.source.buffer,
            network=self.network,
            wrap_link=wrap_link,
        )
        self.clients.append(client)
        self._tasks.append(asyncio.create_task(client.run()))
        return client

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for client in self.clients:
            await client.close()
        if error is None:
            await until(lambda: self.server.stats().pending == 0)
            await until(lambda: self.pool.count("leased") == 0)
            await until(lambda: self.pool.count("quarantined") == self.stays_quarantined)
            self.intakes.custody.leases.check()
            assert (len(self.intakes.custody.leases) > 0) == (self.stays_quarantined > 0)
        await self.server.close()
        await asyncio.gather(*self._tasks)
        self.arena.close()
        self.source.close()

    def offer(
        self,
        request_id: str,
        num_tokens: int,
        *,
        client: HandoffClient | None = None,
        attempt: int = 0,
        deadline_s: float = 30.0,
        blocks: Sequence[int] | None = None,
        on_failed: Callable[[Handoff, TransferError], None] | None = None,
    ) -> Handoff:
        submit = make_submit(request_id, num_tokens, self.target, attempt=attempt, deadline_s=deadline_s)
        self.sent[request_id, attempt] = list(blocks if blocks is not None else range(-(-num_tokens // BLOCK_TOKENS)))
        return (client or self.client).offer(submit, num_tokens, "w1", on_failed=on_failed)

    def compute(self, handoff: Handoff, *, chunk: int = 1 << 20, layers: Sequence[int] = range(NUM_LAYERS + 1)) -> None:
        """Report every layer of every chunk, as a step loop would."""
        blocks = self.sent[handoff.request_id, handoff.attempt]
        for first in range(0, len(blocks), chunk):
            for layer in layers:
                handoff.layers_ready(range(layer, layer + 1), first, blocks[first : first + chunk])

    async def hand_off(self, request_id: str, num_tokens: int, **kwargs: object) -> HandoffReport:
        handoff = self.offer(request_id, num_tokens, **kwargs)  # type: ignore[arg-type]
        self.compute(handoff)
        return await handoff.commit(FIRST, compute_end=time.monotonic())

    def _check_bytes(self, submit: Submit, reservation: Reservation) -> None:
        """What is admitted must be, byte for byte, what the writer holds."""
        sources = self.sent[submit.request_id, submit.attempt][reservation.have_tokens // BLOCK_TOKENS :]
        for source, target in zip(sources, reservation.blocks, strict=True):
            ours = block_bytes(self.source_layout, self.source.buffer, source)
            assert block_bytes(self.layout, self.arena.buffer, target) == ours, (
                f"{submit.request_id}: accepted wrong bytes"
            )


def arena_mappings() -> list[str]:
    """`VmFlags` of every shared arena this process maps, whichever test made it."""
    gc.collect()
    text = Path("/proc/self/smaps").read_text(encoding="ascii")
    return re.findall(r"memfd:baton-kv.*?VmFlags: ([^\n]*)", text, re.DOTALL)
