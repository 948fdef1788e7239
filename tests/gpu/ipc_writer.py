"""A prefill worker's hand-off side over the memory of a card, in a process of its own: told what to do on stdin."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from kv_transfer import cuda_ipc
from kv_transfer.cuda_ipc import CudaIpcLink
from kv_transfer.device import Descriptor, DeviceRegion, Mark
from kv_transfer.layout import CopyPlan
from kv_transfer.link import LeaseKey, Link
from kv_transfer.writer import Handoff, HandoffClient
from llm_engine.api.config import TransferConfig
from llm_engine.api.errors import TransferError
from llm_engine.api.messages import Peer
from tests.unit.kv_transfer.peer_process import commands, say, say_failed
from tests.unit.kv_transfer.rig import BLOCK_TOKENS, FIRST, KEY, make_info, make_layout, make_submit


class Relentless:
    """A link that pushes every layer again and again until told to stop: something is always in flight."""

    def __init__(self, inner: CudaIpcLink) -> None:
        self.transport = inner.transport
        self.write = inner.write
        self.finish = inner.finish
        self.close = inner.close
        self._inner = inner

    def push(
        self,
        lease: LeaseKey,
        plan: CopyPlan,
        layers: range,
        blocks: tuple[Sequence[int], Sequence[int]],
        ready: Mark,
        stopped: Callable[[], bool],
    ) -> int:
        num_bytes = self._inner.push(lease, plan, layers, blocks, ready, stopped)
        if not num_bytes:
            return 0
        say("writing")
        while True:
            self._inner.push(lease, plan, layers, blocks, None, stopped)
            self._inner.finish()

    def confirm(self, lease: LeaseKey) -> Future[int | None]:
        return self._inner.confirm(lease)


def relentless(link: Link) -> Link:
    assert isinstance(link, CudaIpcLink)
    return Relentless(link)


def memory(num_bytes: int, seed: int) -> torch.Tensor:
    """What a pool of the writer holds."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)


def no_reach(source: DeviceRegion, descriptor: Descriptor) -> None:
    """What the driver says of cards that are not connected."""
    raise TransferError(f"cuda_ipc: card {source.uuid} has no peer access to {descriptor.device}")


async def main(settings: dict[str, Any]) -> None:
    layout = make_layout(settings["blocks"], scale=settings["scale"])
    if settings["unreachable"]:
        cuda_ipc._check_reach = no_reach
    torch.cuda.set_device(settings["device"])
    region = DeviceRegion(memory(layout.arena_bytes, 1).to(f"cuda:{settings['device']}"))
    client = HandoffClient(
        config=TransferConfig(**settings["config"]),
        key=KEY,
        info=make_info("prefill-0", "p0", layout),
        layout=layout,
        source=region,
        wrap_link=relentless if settings["relentless"] else lambda link: link,
    )
    running = asyncio.create_task(client.run())
    target = Peer(name="decode-0", incarnation="d0", control_addr=settings["control_addr"])
    reader = await commands()
    say("ready")
    handoffs: dict[str, Handoff] = {}
    while line := (await reader.readline()).decode():
        request_id, blocks, layers = json.loads(line)
        if request_id not in handoffs:
            submit = make_submit(request_id, len(blocks) * BLOCK_TOKENS, target)
            handoffs[request_id] = client.offer(submit, len(blocks) * BLOCK_TOKENS, "w1", on_failed=say_failed)
        for layer in layers:
            handoffs[request_id].layers_ready(range(layer, layer + 1), 0, blocks)
        if 3 in layers:
            asyncio.create_task(commit(handoffs[request_id]))  # noqa: RUF006
    await client.close()
    await running


async def commit(handoff: Handoff) -> None:
    try:
        report = await handoff.commit(FIRST, compute_end=time.monotonic())
        say("accepted", request=handoff.request_id, transport=report.transport)
    except TransferError as exc:
        say("rejected", request=handoff.request_id, error=str(exc))


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))
