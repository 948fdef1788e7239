"""Automatic choice between cards: for every pair what works, with the reason; and nothing that can't."""

from __future__ import annotations

import itertools
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.cuda_ipc import CudaIpcLink
from kv_transfer.negotiate import End, choose
from kv_transfer.transports import ON_HOST, PREFERENCE, SAME_PLACE, usable
from llm_engine.api.config import TransferConfig
from llm_engine.api.errors import ConfigError, LeaseRevoked, TransferError
from llm_engine.api.handoff import LinkOffer
from tests.unit.kv_transfer.card_rig import CardRig, FaultyCards, HostDriver, driver, move_writers_elsewhere
from tests.unit.kv_transfer.rig import FIRST, make_layout, until

__all__ = ["driver"]

NO_ACCESS = "cuIpcOpenMemHandle: error 217, peer access is not supported"


def end(name: str, place: str = "h", **lacking: str) -> End:
    """A worker on a card of host `place`, but for what it lacks."""
    offers = [
        LinkOffer(transport=transport, host_id=place if transport in SAME_PLACE else "", address=name)
        for transport in ("cuda_ipc", "shm", "tcp")
        if transport not in lacking
    ]
    return End(name, offers, lacking)


BEST = "best of both offers"
PLACE = "cuda_ipc needs one host, network and PID namespace, user and driver, but 'h' is not 'x'"


@pytest.mark.parametrize(
    ("writer", "receiver", "reason"),
    [
        (end("p"), end("d"), f"cuda_ipc: {BEST}"),
        (
            end("p"),
            end("d", "x"),
            f"tcp: {BEST} ({PLACE}; shm needs one host, network namespace and user, but 'h' is not 'x')",
        ),
        (end("p", cuda_ipc=NO_ACCESS), end("d"), f"shm: {BEST} (p does not offer cuda_ipc: {NO_ACCESS})"),
        (end("p"), end("d", cuda_ipc=ON_HOST), f"shm: {BEST} (d does not offer cuda_ipc: {ON_HOST})"),
        (end("p", cuda_ipc=ON_HOST), end("d", cuda_ipc=ON_HOST), f"shm: {BEST}"),
        (
            end("p", cuda_ipc="no driver"),
            end("d", cuda_ipc=ON_HOST),
            f"shm: {BEST} (p does not offer cuda_ipc: no driver)",
        ),
        (
            end("p"),
            End("d", [LinkOffer(transport="tcp", address="d")]),
            f"tcp: {BEST} (d does not offer cuda_ipc; d does not offer shm)",
        ),
        (
            end("p", mooncake="not installed"),
            end("d"),
            f"cuda_ipc: {BEST} (p does not offer mooncake: not installed)",
        ),
    ],
)
def test_a_pair_takes_the_best_that_works_and_says_what_keeps_it_from_better(
    writer: End, receiver: End, reason: str
) -> None:
    link, why = choose(writer, receiver)
    assert why == reason
    assert link.address == receiver.name, "the receiver's offer"
    assert why.startswith(f"{link.transport}: ")


_OFFERS = st.lists(st.sampled_from(PREFERENCE), unique=True).flatmap(
    lambda names: st.tuples(*(st.builds(LinkOffer, transport=st.just(n), host_id=st.sampled_from("ab")) for n in names))
)
_REASONS = st.dictionaries(st.sampled_from(PREFERENCE), st.sampled_from([ON_HOST, "broken"]))


@given(_OFFERS, _OFFERS, _REASONS, _REASONS)
def test_what_is_chosen_was_offered_by_both_and_nothing_better_was(
    ours: tuple[LinkOffer, ...], theirs: tuple[LinkOffer, ...], mine: dict[str, str], yours: dict[str, str]
) -> None:
    fit = [
        there
        for name in PREFERENCE
        for here, there in itertools.product(ours, theirs)
        if here.transport == there.transport == name and (name not in SAME_PLACE or here.host_id == there.host_id)
    ]
    ends = End("p", ours, mine), End("d", theirs, yours)
    if not fit:
        with pytest.raises(TransferError, match="no transport connects p and d"):
            choose(*ends)
        return
    assert choose(*ends)[0] is fit[0]


def test_cells_that_a_card_can_not_copy_go_over_the_host(driver: HostDriver) -> None:
    layout = make_layout(4)
    odd = msgspec.structs.replace(
        layout, planes=(msgspec.structs.replace(layout.planes[0], block_bytes=97), *layout.planes[1:])
    )
    rig = CardRig()
    names, lacking = usable(TransferConfig(), None, odd, card=rig.caches, arena=rig.arena)
    assert names == ["shm", "tcp"]
    assert "not words of 8 bytes" in lacking["cuda_ipc"]
    with pytest.raises(ConfigError, match=r"^transfer.transport=cuda_ipc: .*not words of 8 bytes"):
        usable(TransferConfig(transport="cuda_ipc"), None, odd, card=rig.caches, arena=rig.arena)


async def test_mixed_pools_use_each_what_reaches_them(driver: HostDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """One writer on the receiver's host, one elsewhere; both send into one worker at the same time."""
    async with CardRig() as rig:
        assert (await rig.hand_off("near", 20)).transport == "cuda_ipc"
        assert driver.mapped
        move_writers_elsewhere(monkeypatch)
        far = await rig.add_client("prefill-1")
        assert (await rig.hand_off("far", 20, client=far)).transport == "tcp"
        assert [len(pool.admitted) for pool in (rig.cached, rig.pool)] == [1, 1]
        begun = [
            (client, rig.offer(f"{index}", 24, client=client)) for index, client in enumerate([rig.client, far] * 2)
        ]
        for _, handoff in begun:
            rig.compute(handoff)
        reports = [await handoff.commit(FIRST, compute_end=time.monotonic()) for _, handoff in begun]
        assert [report.transport for report in reports] == ["cuda_ipc", "tcp"] * 2
        stats = rig.server.stats()
        assert {peer.name: peer.transport for peer in stats.peers} == {"prefill-0": "cuda_ipc", "prefill-1": "tcp"}
        assert stats.accepted == 6
        reasons = {peer.name: peer.reason for peer in stats.peers}
        assert reasons["prefill-0"] == f"cuda_ipc: {BEST}"
        assert reasons["prefill-1"].startswith(f"tcp: {BEST} (cuda_ipc needs one host, ")
        assert far.stats().peers[0].reason == reasons["prefill-1"]
    assert not driver.mapped, "unmapped when the writer left"


async def test_a_link_that_can_not_be_opened_is_left_out(driver: HostDriver) -> None:
    driver.reason = NO_ACCESS
    async with CardRig() as rig:
        assert (await rig.hand_off("r1", 20)).transport == "shm"
        await until(lambda: len(rig.server.stats().peers) == 1)  # nothing is left of the first try
        [peer], [link] = rig.server.stats().peers, rig.client.stats().peers
        assert peer.reason == link.reason == f"shm: {BEST} (prefill-0 does not offer cuda_ipc: {NO_ACCESS})"
        assert rig.client.bad_peers() == []
        assert rig.server.stats().failed == {}


async def test_the_next_writer_tries_again(driver: HostDriver) -> None:
    driver.reason = NO_ACCESS
    async with CardRig() as rig:
        assert (await rig.hand_off("r1", 20)).transport == "shm"
        driver.reason = ""
        later = await rig.add_client("prefill-1")
        assert (await rig.hand_off("r2", 20, client=later)).transport == "cuda_ipc"


@pytest.mark.parametrize("transport", ["auto", "cuda_ipc"])
async def test_bytes_that_arrive_wrong_between_cards_go_another_way(driver: HostDriver, transport: str) -> None:
    """Under `auto`; a transport that was asked for by name stays, and the pair is not used."""
    async with CardRig(transport, canary_period_s=0.02) as rig:
        client = await rig.add_client(
            "prefill-1", wrap_link=lambda link: FaultyCards(link) if isinstance(link, CudaIpcLink) else link
        )
        await rig.offer("r0", 20, client=client).abort()
        await until(lambda: client.stats().probes.get("failed", 0) >= (1 if transport == "auto" else 3))
        if transport == "cuda_ipc":
            assert client.bad_peers() == ["d0"]
            return
        await until(lambda: client.stats().probes.get("ok", 0) > 0)
        assert (await rig.hand_off("r1", 20, client=client)).transport == "shm"
        assert client.bad_peers() == []
        wrong = "canary: the bytes here are not the bytes that were sent"
        assert client.stats().peers[0].reason == f"shm: {BEST} (prefill-1 does not offer cuda_ipc: {wrong})"
        assert (await rig.hand_off("r2", 20)).transport == "cuda_ipc", "other pairs have their own links"


async def test_the_next_session_with_the_same_peer_tries_again(driver: HostDriver) -> None:
    driver.reason = NO_ACCESS
    async with CardRig() as rig:
        handoff = rig.offer("r1", 20)
        rig.compute(handoff)
        assert (await handoff.commit(FIRST, compute_end=time.monotonic())).transport == "shm"
        driver.reason = ""
        assert handoff._session is not None
        handoff._session.cut(TransferError("the network was down"))
        assert (await rig.hand_off("r2", 20)).transport == "cuda_ipc"
        await until(lambda: [peer.transport for peer in rig.server.stats().peers] == ["cuda_ipc"])


async def test_what_is_asked_for_by_name_does_not_fall_back(driver: HostDriver) -> None:
    driver.reason = NO_ACCESS
    async with CardRig() as rig:
        named = await rig.add_client("prefill-1", config=TransferConfig(transport="cuda_ipc"))
        with pytest.raises(TransferError, match="peer access is not supported"):
            await rig.hand_off("r1", 20, client=named)
        assert named.bad_peers() == ["d0"]
        [peer] = named.stats().peers
        assert (peer.healthy, "peer access" in peer.detail) == (False, True)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_a_receiver_that_names_another_transport_gets_it(driver: HostDriver, transport: str) -> None:
    async with CardRig(receiver_transport=transport) as rig:
        assert (await rig.hand_off("r1", 20)).transport == transport
        assert "decode-0 does not offer cuda_ipc" in rig.client.stats().peers[0].reason


async def test_a_newer_attempt_ends_an_older_one_on_other_ground(
    driver: HostDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with CardRig() as rig:
        await rig.hand_off("near", 20)
        move_writers_elsewhere(monkeypatch)
        far = await rig.add_client("prefill-1")
        old = rig.offer("r1", 20)
        await until(lambda: rig.cached.count("leased") == 5)
        assert (await rig.hand_off("r1", 20, client=far, attempt=1)).transport == "tcp"
        with pytest.raises(LeaseRevoked):
            await old.commit(FIRST, compute_end=time.monotonic())
        again = rig.offer("r1", 20, attempt=1)
        with pytest.raises(TransferError, match="this attempt is over or was overtaken"):
            await again.commit(FIRST, compute_end=time.monotonic())
        await until(lambda: rig.cached.count("leased") == rig.cached.count("quarantined") == 0)
        assert "r1" in rig.pool.admitted, "the repetition ended nothing"


async def test_a_limit_holds_for_all_grounds(driver: HostDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    async with CardRig(max_pending=2) as rig:
        await rig.hand_off("near", 20)
        move_writers_elsewhere(monkeypatch)
        far = await rig.add_client("prefill-1")
        held = [rig.offer("r1", 20), rig.offer("r2", 20, client=far)]
        await until(lambda: rig.server.stats().leases == 2)
        with pytest.raises(TransferError, match="2 hand-offs are pending"):
            await rig.hand_off("r3", 20)
        assert rig.server.stats().pending == 2
        for handoff in held:
            await handoff.abort()


async def test_cancel_and_drain_reach_all_grounds(driver: HostDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    async with CardRig() as rig:
        await rig.hand_off("near", 20)
        move_writers_elsewhere(monkeypatch)
        far = await rig.add_client("prefill-1")
        held = [rig.offer("r1", 20), rig.offer("r2", 20, client=far)]
        await until(lambda: rig.server.stats().leases == 2)
        assert [rig.server.cancel(name, 0) for name in ("r1", "r2", "r3")] == [True, True, False]
        await until(lambda: all(handoff.error is not None for handoff in held))
        rig.server.drain()
        for client in (rig.client, far):
            with pytest.raises(TransferError, match="draining"):
                await rig.hand_off(f"late-{client}", 20, client=client)
