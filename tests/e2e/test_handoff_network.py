"""Hand-offs over TCP between two hosts whose network is slow, loses packets, or is cut and heals."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.e2e import netns
from tests.unit.kv_transfer.rig import make_layout, until

REASON = netns.missing() or ("" if shutil.which("tc") and shutil.which("nft") else "needs tc and nft")
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

BLOCKS, SCALE, LAYERS = 64, 200, 4
HOST_A, HOST_B = "198.51.100.1", "198.51.100.2"
CONFIG = {"transport": "auto", "canary_period_s": 0.5, "grant_timeout_s": 3.0, "commit_timeout_s": 3.0}


class Wire:
    """Two hosts and the cable between them; `writer` is the end that sends."""

    def __init__(self, writer: netns.Host, receiver: netns.Host) -> None:
        self.writer, self.receiver = writer, receiver
        ends = (str(writer._init), str(receiver._init))
        command = ["ip", "link", "add", "cable", "netns", ends[0], "type", "veth", "peer", "name", "cable", "netns"]
        subprocess.run([*command, ends[1]], check=True)
        for host, address in ((writer, HOST_A), (receiver, HOST_B)):
            host.run("ip", "address", "add", f"{address}/24", "dev", "cable").check_returncode()
            host.run("ip", "link", "set", "cable", "up").check_returncode()

    def on_writer(self, *words: str) -> None:
        done = self.writer.run(*words)
        assert done.returncode == 0, done.stderr

    def lose(self, share: float) -> None:
        """Drop this share of the packets that each end sends, at random."""
        commands = (
            "add table inet lossy",
            "add chain inet lossy out { type filter hook output priority 0; }",
            f"add rule inet lossy out oifname cable numgen random mod 1000 < {round(share * 1000)} counter drop",
        )
        for host in (self.writer, self.receiver):
            for command in commands:
                host.run("nft", command).check_returncode()

    def lost(self) -> int:
        """Packets of the writer that were dropped."""
        rules = json.loads(self.writer.run("nft", "-j", "list", "chain", "inet", "lossy", "out").stdout)["nftables"]
        counters = [
            part["counter"] for item in rules if "rule" in item for part in item["rule"]["expr"] if "counter" in part
        ]
        return int(counters[0]["packets"])

    def limit(self, rate: str) -> None:
        """Let no more through than this."""
        bucket = ("burst", "64kb", "latency", "50ms")
        self.on_writer("tc", "qdisc", "add", "dev", "cable", "root", "tbf", "rate", rate, *bucket)


class Process:
    """One end, on its host."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self.child = child
        self.events: list[dict[str, Any]] = []
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.child.stdout is not None
        while line := await self.child.stdout.readline():
            self.events.append(json.loads(line))

    async def seen(self, timeout_s: float = 20.0, **fields: Any) -> dict[str, Any]:
        def matching() -> list[dict[str, Any]]:
            return [event for event in self.events if fields.items() <= event.items()]

        await until(lambda: bool(matching()) or self.child.returncode is not None, timeout_s)
        assert matching(), f"{fields} not in {self.events}"
        return matching()[0]

    def hand_off(self, request_id: str) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps([request_id, BLOCKS, LAYERS]).encode() + b"\n")


@asynccontextmanager
async def process(where: netns.Host, **settings: Any) -> AsyncIterator[Process]:
    settings = {"blocks": BLOCKS, "scale": SCALE, "config": CONFIG, **settings}
    words = [sys.executable, "-m", "tests.unit.kv_transfer.peer_process", json.dumps(settings)]
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(*where.command(*words), stdin=pipe, stdout=pipe)
    running = Process(child)
    try:
        await running.seen(event="ready")
        yield running
    finally:
        assert child.stdin is not None
        child.stdin.close()  # it ends by itself
        async with asyncio.timeout(20):
            await child.wait()
        await running.reading


@pytest.fixture
def wire() -> Iterator[Wire]:
    with netns.Host() as writer, netns.Host() as receiver:
        yield Wire(writer, receiver)


@asynccontextmanager
async def pair(wire: Wire, receiver_blocks: int = BLOCKS, **changes: float) -> AsyncIterator[tuple[Process, Process]]:
    config = {**CONFIG, **changes}
    there: dict[str, Any] = {"blocks": receiver_blocks, "host": HOST_B, "config": config}
    async with process(wire.receiver, role="receiver", incarnation="d0", **there) as receiver:
        address = (await receiver.seen(event="ready"))["control_addr"]
        async with process(
            wire.writer, role="writer", incarnation="p0", control_addr=address, relentless=False, config=config
        ) as writer:
            yield writer, receiver


async def test_a_slow_network_only_takes_time(wire: Wire) -> None:
    wire.limit("40mbit")
    async with pair(wire) as (writer, receiver):
        started = time.monotonic()
        writer.hand_off("r1")
        await writer.seen(event="accepted", request="r1")
        took = time.monotonic() - started
        await receiver.seen(event="admitted", request="r1")
    least = BLOCKS * make_layout(1, scale=SCALE).bytes_per_block() * 8 / 40e6
    assert least * 0.8 < took < least * 3 + 2


@pytest.mark.slow
async def test_a_cut_network_fails_the_hand_off_in_time_and_heals(wire: Wire) -> None:
    wire.limit("20mbit")
    async with pair(wire) as (writer, receiver):
        writer.hand_off("r1")
        await until(lambda: _sent_bytes(wire) > 300_000)
        started = time.monotonic()
        wire.on_writer("ip", "link", "set", "cable", "down")
        await writer.seen(event="rejected", request="r1")
        assert time.monotonic() - started < 8, "within the commit time and a little"
        assert not any(event["event"] == "admitted" for event in receiver.events)
        wire.on_writer("ip", "link", "set", "cable", "up")
        for attempt in range(20):  # the pair is tried again once a canary period
            writer.hand_off(f"again-{attempt}")
            await until(lambda attempt=attempt: _concluded(writer, f"again-{attempt}"))  # type: ignore[misc]
            if _accepted(writer, f"again-{attempt}"):
                break
        assert any(_accepted(writer, f"again-{attempt}") for attempt in range(20)), writer.events


async def test_a_network_that_loses_packets_costs_time_and_no_hand_off(wire: Wire) -> None:
    """Several in a row: each needs blocks of its own, because this receiver keeps what it has admitted."""
    wire.lose(0.03)
    async with pair(wire, receiver_blocks=4 * BLOCKS, grant_timeout_s=20.0, commit_timeout_s=20.0) as (
        writer,
        receiver,
    ):
        for number in range(4):
            writer.hand_off(f"r{number}")
            await writer.seen(30.0, event="accepted", request=f"r{number}")
        assert sum(event["event"] == "admitted" for event in receiver.events) == 4
    assert wire.lost() > 0


def _sent_bytes(wire: Wire) -> int:
    shown = json.loads(wire.writer.run("ip", "-s", "-j", "link", "show", "cable").stdout)
    return int(shown[0]["stats64"]["tx"]["bytes"])


def _concluded(writer: Process, request_id: str) -> bool:
    return any(event.get("request") == request_id for event in writer.events)


def _accepted(writer: Process, request_id: str) -> bool:
    return any(event.get("request") == request_id and event["event"] == "accepted" for event in writer.events)
