import sys

import pytest

from kv_transfer.host import host_id
from kv_transfer.memory import Arena
from kv_transfer.metrics import links_of
from kv_transfer.negotiate import End, choose
from kv_transfer.receiver import HandoffServer
from kv_transfer.transports import ON_HOST, offer, usable
from kv_transfer.writer import HandoffClient
from llm_engine.api.config import TransferConfig
from llm_engine.api.errors import ConfigError, LayoutMismatch, TransferError
from llm_engine.api.handoff import LinkOffer
from tests.unit.kv_transfer.rig import KEY, Pool, Rig, make_info, make_layout

HERE, THERE = LinkOffer(transport="shm", host_id="a"), LinkOffer(transport="shm", host_id="b", address="x")
TCP = LinkOffer(transport="tcp", address="h:1")


def test_best_common_transport_wins_and_says_why() -> None:
    same = LinkOffer(transport="shm", host_id="a", address="y")
    assert choose(End("p", [HERE, TCP]), End("d", [TCP, same]))[0] is same
    link, reason = choose(End("p", [HERE, TCP]), End("d", [THERE, TCP]))
    assert link is TCP
    assert "'a' is not 'b'" in reason
    link, reason = choose(End("p", [TCP]), End("d", [same, TCP]))
    assert link is TCP
    assert "p does not offer shm" in reason


@pytest.mark.parametrize(
    ("ours", "theirs", "missing"),
    [
        ([HERE], [TCP], "d does not offer shm; p does not offer tcp"),
        ([HERE], [THERE], "shm needs one host, network namespace and user"),
        ([LinkOffer(transport="shm")], [LinkOffer(transport="shm")], "'' is not ''"),
        ([], [], "neither offers any"),
    ],
)
def test_no_transport_names_what_is_missing(ours: list[LinkOffer], theirs: list[LinkOffer], missing: str) -> None:
    with pytest.raises(TransferError, match=missing) as caught:
        choose(End("p", ours), End("d", theirs))
    assert "set transfer.transport to auto or tcp" in str(caught.value)


def test_auto_offers_shm_and_tcp_with_this_host() -> None:
    names, lacking = usable(TransferConfig(), None, make_layout(4))
    assert (names, lacking) == (["shm", "tcp"], {"cuda_ipc": ON_HOST})
    offers = [offer(name, None) for name in names]
    assert [(o.transport, bool(o.host_id)) for o in offers] == [("shm", True), ("tcp", False)]
    assert offers[0].host_id == host_id()


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)  # as if it were not installed


@pytest.mark.usefixtures("no_engine")
async def test_a_transport_asked_for_by_name_that_can_not_work_is_one_line_at_start() -> None:
    layout = make_layout(4)
    config = TransferConfig(transport="mooncake")
    says = "^transfer.transport=mooncake: mooncake.engine can't be loaded [^\n]*libibverbs1$"
    with Arena.create(layout.arena_bytes, shared=True) as arena:
        info = make_info("p", "p1", layout)
        with pytest.raises(ConfigError, match=says):
            HandoffClient(config=config, key=KEY, info=info, layout=layout, source=arena.buffer)
        server = HandoffServer(config=config, key=KEY, layout=layout, arena=arena, reserver=Pool(4))
        with pytest.raises(ConfigError, match=says):
            server.bind("127.0.0.1")
        await server.close()


@pytest.mark.usefixtures("no_engine")
async def test_automatic_choice_falls_back_and_says_so() -> None:
    async with Rig("auto", mooncake_protocol="rdma") as rig:
        assert (await rig.hand_off("r1", 20)).transport == "shm"
        reason = rig.client.stats().peers[0].reason
    assert reason.startswith("shm: ")
    assert "decode-0 does not offer mooncake: mooncake.engine can't be loaded" in reason
    assert "cuda_ipc" not in reason, "nobody asked for cards"


@pytest.mark.parametrize(
    ("writer", "receiver", "chosen"), [("auto", "auto", "shm"), ("tcp", "auto", "tcp"), ("auto", "tcp", "tcp")]
)
async def test_pairs_settle_on_a_transport(writer: str, receiver: str, chosen: str) -> None:
    async with Rig(writer, receiver_transport=receiver) as rig:
        assert (await rig.hand_off("r1", 20)).transport == chosen
        peer = rig.client.stats().peers[0]
        assert (peer.transport, peer.healthy) == (chosen, True)
        assert peer.reason.startswith(f"{chosen}: ")
        (writer_link,) = links_of(rig.server.stats().peers)
        assert (writer_link.peer, writer_link.transport) == ("prefill-0/prefill-0-1", chosen)
        (link,) = links_of(rig.client.stats().peers)
        assert link.reason == writer_link.reason == peer.reason


async def test_a_pair_without_a_common_transport_is_refused() -> None:
    async with Rig("shm", receiver_transport="tcp") as rig:
        with pytest.raises(TransferError, match="decode-0 does not offer shm; prefill-0 does not offer tcp"):
            await rig.hand_off("r1", 20)
        assert rig.client.bad_peers() == ["d0"]


async def test_other_formats_are_refused_with_both_sides_named() -> None:
    async with Rig("tcp") as rig:
        other = await rig.add_client("prefill-1", format_id="other")
        with pytest.raises(LayoutMismatch, match="prefill-1 has cache format other, decode-0 has fmt"):
            await rig.hand_off("r1", 20, client=other)
        await rig.hand_off("r2", 20)


async def test_other_planes_are_refused_with_both_sides_named() -> None:
    async with Rig("tcp") as rig:
        layout = make_layout(8, scale=2)
        arena = Arena.create(layout.arena_bytes, shared=False)
        rig.source_layout, rig.source = layout, arena
        other = await rig.add_client("prefill-1")
        with pytest.raises(LayoutMismatch, match=r"prefill-1 has .*192 B.*decode-0 has .*96 B"):
            await rig.hand_off("r1", 20, client=other)


async def test_a_transport_that_can_not_work_here_is_a_config_error() -> None:
    layout = make_layout(8)
    with Arena.create(layout.arena_bytes, shared=False) as arena:
        for transport, missing in (("shm", "shared memory"), ("local", "one process")):
            config = TransferConfig(transport=transport)
            server = HandoffServer(config=config, key=KEY, layout=layout, arena=arena, reserver=Pool(8))
            with pytest.raises(ConfigError, match=missing):
                server.bind("127.0.0.1")
            await server.close()
        auto = HandoffServer(config=TransferConfig(), key=KEY, layout=layout, arena=arena, reserver=Pool(8))
        with pytest.raises(ConfigError, match="address at which"):
            auto.bind("0.0.0.0")
        with pytest.raises(ConfigError, match="can't listen"):
            auto.bind("192.0.2.1")
        await auto.close()
        with pytest.raises(ConfigError, match="one process"):
            HandoffClient(
                config=TransferConfig(transport="local"),
                key=KEY,
                info=make_info("p", "p", layout),
                layout=layout,
                source=arena.buffer,
            )
