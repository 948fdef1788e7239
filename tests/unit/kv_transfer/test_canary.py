"""The pair's canary: real bytes, a scratch block under a lease of its own, and what a failure leads to."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from kv_transfer.fault import Fault, FaultyLink
from kv_transfer.link import LeaseKey, Link
from tests.unit.kv_transfer.rig import MOONCAKE, Rig, until


@pytest.mark.parametrize("transport", ["local", "shm", "tcp", MOONCAKE])
async def test_a_good_pair_is_probed_and_stays_good(transport: str) -> None:
    async with Rig(transport, canary_period_s=0.02) as rig:
        await rig.hand_off("r1", 20)
        await until(lambda: rig.client.stats().probes.get("ok", 0) >= 3)
        assert rig.client.bad_peers() == []
        assert rig.pool.count("leased") <= 1


@pytest.mark.parametrize("transport", ["local", "shm", "tcp", MOONCAKE])
@pytest.mark.parametrize("fault", [Fault.FLIP, Fault.DROP])
async def test_a_pair_that_loses_bytes_is_reported_until_it_works_again(transport: str, fault: Fault) -> None:
    current = [fault]

    def wrap(link: Link) -> Link:
        return FaultyLink(link, lambda: current[0])

    async with Rig(transport, canary_period_s=0.02) as rig:
        client = await rig.add_client("prefill-1", wrap_link=wrap)
        await rig.offer("r0", 20, client=client).abort()
        await until(lambda: client.bad_peers() == ["d0"])
        assert "canary: the bytes here are not" in client.stats().peers[0].detail
        current[0] = Fault.NONE
        await until(lambda: client.bad_peers() == [])
        await rig.hand_off("r1", 20, client=client)


async def test_a_full_pool_is_not_a_bad_pair() -> None:
    async with Rig("shm", num_blocks=4, canary_period_s=0.02) as rig:
        await rig.hand_off("r1", 16)
        await until(lambda: rig.client.stats().probes.get("skipped", 0) >= 2)
        assert rig.client.bad_peers() == []
        rig.pool.finish("r1")
        await until(lambda: rig.client.stats().probes.get("ok", 0) >= 1)


async def test_a_receiver_that_is_silent_is_reported() -> None:
    async with Rig("shm", canary_period_s=0.02, commit_timeout_s=0.2) as rig:
        await rig.hand_off("r1", 16)
        reserve_probe = rig.pool.reserve_probe

        async def never() -> None:
            await rig.server._done.wait()

        rig.pool.reserve_probe = never  # type: ignore[method-assign]
        await until(lambda: rig.client.bad_peers() == ["d0"])
        assert "no answer within 0.2 s" in rig.client.stats().peers[0].detail
        rig.pool.reserve_probe = reserve_probe  # type: ignore[method-assign]


async def test_a_probe_that_is_never_finished_is_fenced_and_its_block_comes_back() -> None:
    class Unconfirmed(FaultyLink):
        def confirm(self, lease: LeaseKey) -> Future[int | None]:
            return Future()

    async with Rig("shm", canary_period_s=0.02, commit_timeout_s=0.2) as rig:
        client = await rig.add_client("prefill-1", wrap_link=lambda link: Unconfirmed(link, lambda: Fault.NONE))
        await rig.offer("r0", 20, client=client).abort()
        await until(lambda: rig.server.stats().failed.get("probe_timeout", 0) >= 2)
        await until(lambda: rig.pool.count("leased") == rig.pool.count("quarantined") == 0)
        assert client.bad_peers() == ["d0"]
