"""Links that lose, cut, repeat, change and delay: the result is a rejection or the right bytes, never wrong bytes.

`Rig` compares every admitted block with the writer's, so an accepted wrong byte fails a test wherever it happens.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.fault import Fault, FaultyLink
from kv_transfer.link import Link
from llm_engine.api.errors import TransferError
from tests.unit.kv_transfer.rig import FIRST, MOONCAKE, Rig, block_bytes, until

HARMLESS = {Fault.NONE, Fault.DUPLICATE}


async def run_with_faults(transport: str, checksum: str, faults: list[Fault]) -> bool:
    """One hand-off whose copies suffer `faults` in turn, then a clean one into whatever blocks are free. Accepted?"""
    fates = iter(faults)
    scale = 256 if checksum == "sampled" else 1  # blocks of several pages
    links: list[FaultyLink] = []

    def wrap(link: Link) -> Link:
        links.append(FaultyLink(link, lambda: next(fates, Fault.NONE)))
        return links[-1]

    async with Rig(transport, num_blocks=8, scale=scale, checksum=checksum, commit_timeout_s=2.0) as rig:
        client = await rig.add_client("prefill-1", wrap_link=wrap)
        handoff = rig.offer("r1", 20, client=client)
        rig.compute(handoff, chunk=2)
        try:
            await handoff.commit(FIRST, compute_end=time.monotonic())
        except TransferError:
            accepted = False
        else:
            accepted = True
            rig.pool.finish("r1")
        await until(lambda: len(rig.pool.free_blocks) == 8)
        await rig.hand_off("r2", 32, blocks=range(8, 16))  # every block has a new owner now
        if transport not in ("shm", "mooncake"):
            await asyncio.to_thread(links[0].deliver_late)
        await until(lambda: rig.server.stats().pending == 0)
        reservation = rig.pool.admitted["r2"][0]
        for source, target in zip(range(8, 16), reservation.blocks, strict=True):
            theirs = block_bytes(rig.layout, rig.arena.buffer, target)
            assert theirs == block_bytes(rig.source_layout, rig.source.buffer, source)
    return accepted


networks = st.lists(st.sampled_from(sorted(Fault, key=lambda f: f.value)), max_size=24)
memory = st.lists(st.sampled_from(sorted(set(Fault) - {Fault.LATE}, key=lambda f: f.value)), max_size=24)
# Without checksums only loss and repetition can be noticed, and only where the receiver sees the bytes arrive.
losses = st.lists(st.sampled_from([Fault.NONE, Fault.DROP, Fault.DUPLICATE, Fault.TRUNCATE, Fault.LATE]), max_size=24)


# Samples notice pages that did not arrive or arrived elsewhere, not a changed bit.
pages = st.lists(st.sampled_from([Fault.NONE, Fault.DROP, Fault.DUPLICATE, Fault.TRUNCATE, Fault.SWAP]), max_size=24)


@pytest.mark.parametrize(
    ("transport", "checksum", "faults"),
    [
        ("shm", "full", memory),
        ("shm", "sampled", pages),
        ("tcp", "full", networks),
        ("local", "full", networks),
        pytest.param("mooncake", "full", memory, marks=MOONCAKE.marks),
        ("tcp", "count", losses),
        ("local", "count", losses),
    ],
)
def test_never_accepted_wrong(transport: str, checksum: str, faults: st.SearchStrategy[list[Fault]]) -> None:
    @settings(max_examples=40, deadline=None)
    @given(faults=faults)
    def check(faults: list[Fault]) -> None:
        accepted = asyncio.run(run_with_faults(transport, checksum, faults))
        if HARMLESS.issuperset(faults):
            assert accepted

    check()


@pytest.mark.parametrize(
    ("transport", "fault"),
    [
        pytest.param(transport, fault, marks=MOONCAKE.marks if transport == "mooncake" else ())
        for transport in ("local", "shm", "tcp", "mooncake")
        for fault in Fault
        if fault not in HARMLESS  # memory does not delay, and the engine has delivered when it returns
        and (transport not in ("shm", "mooncake") or fault is not Fault.LATE)
    ],
)
def test_each_fault_alone_is_noticed(transport: str, fault: Fault) -> None:
    assert not asyncio.run(run_with_faults(transport, "full", [Fault.NONE, Fault.NONE, fault]))


@pytest.mark.parametrize("transport", ["local", "tcp"])
async def test_a_late_write_after_revocation_reaches_no_new_owner(transport: str) -> None:
    links: list[FaultyLink] = []

    def wrap(link: Link) -> Link:
        links.append(FaultyLink(link, lambda: Fault.LATE))
        return links[-1]

    async with Rig(transport, num_blocks=8) as rig:
        client = await rig.add_client("prefill-1", wrap_link=wrap)
        handoff = rig.offer("r1", 32, client=client)
        rig.compute(handoff)
        await until(lambda: bool(links) and "landed" in handoff._marks)  # as far as the writer knows
        rig.server.cancel("r1", 0)
        await rig.hand_off("r2", 32, blocks=range(8, 16))
        before = bytes(rig.arena.buffer)
        sent = await asyncio.to_thread(links[0].deliver_late)
        assert sent == 8 * rig.layout.bytes_per_block()
        await until(lambda: rig.server.stats().late_bytes == sent)
        assert rig.arena.buffer == before
        await handoff.abort()


async def test_a_shared_memory_writer_that_is_stuck_in_a_copy_holds_its_blocks() -> None:
    """The copy goes on after the revocation, because nothing can stop it; the blocks have no new owner meanwhile."""
    stuck, go_on = threading.Event(), threading.Event()
    turns = itertools.count()

    def slow() -> Fault:
        if next(turns) == 3:
            stuck.set()
            assert go_on.wait(10)
        return Fault.NONE

    async with Rig("shm", num_blocks=8) as rig:
        client = await rig.add_client("prefill-1", wrap_link=lambda link: FaultyLink(link, slow))
        handoff = rig.offer("r1", 32, client=client)
        rig.compute(handoff)
        await until(stuck.is_set)
        rig.server.cancel("r1", 0)
        waiting = rig.offer("r2", 4)
        rig.compute(waiting)
        await until(lambda: handoff.error is not None)  # the fence has arrived; its answer has to wait for the copy
        await until(lambda: rig.server.stats().deferred == 1)
        assert rig.server.stats().quarantined_blocks == 8
        go_on.set()
        await waiting.commit(FIRST, compute_end=time.monotonic())
        assert rig.server.stats().quarantined_blocks == 0
        await handoff.abort()
