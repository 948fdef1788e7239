"""The transports there are: which of them work here, how each end opens them. Best first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from kv_transfer.host import host_id
from kv_transfer.link import Inlet, Link
from kv_transfer.listener import Events
from kv_transfer.local import LocalInlet, LocalLink, LocalNetwork
from kv_transfer.memory import Arena
from kv_transfer.mooncake import Engine, MooncakeInlet, MooncakeLink
from kv_transfer.mooncake import missing as mooncake_missing
from kv_transfer.shm import ShmInlet, ShmLink
from kv_transfer.tcp import TcpLink
from kv_transfer.tcp_inlet import TcpInlet
from llm_engine.api.config import TransferConfig
from llm_engine.api.errors import ConfigError, LayoutMismatch, TransferError
from llm_engine.api.handoff import Connected, KvLayout, LinkOffer

if TYPE_CHECKING:  # needs torch
    from kv_transfer.device import DeviceRegion

Memory: TypeAlias = "Arena | DeviceRegion"

PREFERENCE = ("local", "cuda_ipc", "shm", "mooncake", "tcp")
ON_HOST = "the caches are in host memory, not on a card"
SAME_PLACE = {
    "local": "one process",
    "cuda_ipc": "one host, network and PID namespace, user and driver",
    "shm": "one host, network namespace and user",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiverEnd:
    """What inlets are made of. `host`: the address at which writers reach this process."""

    config: TransferConfig
    key: bytes
    arena: Memory
    layout: KvLayout
    events: Events
    network: LocalNetwork | None
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterEnd:
    """What links are made of. `device`: the caches, where the link copies from a card."""

    config: TransferConfig
    key: bytes
    network: LocalNetwork | None
    engine: Engine | None  # with transport mooncake
    device: DeviceRegion | None


class Usable(NamedTuple):
    """`names`: transports to offer, best first. `lacking`: why automatic choice does not offer the others."""

    names: list[str]
    lacking: dict[str, str]


def usable(
    config: TransferConfig,
    network: LocalNetwork | None,
    layout: KvLayout,
    *,
    card: DeviceRegion | None = None,
    by_host: bool = True,
    arena: Arena | None = None,
) -> Usable:
    """What to offer under `config`.

    `card`: the caches of `layout`, if they are on one. `by_host`: hand-offs can go through host memory, which for a
    receiver is `arena`. Raises ConfigError when what is asked for by name, or every transport, can't work here.
    """

    def missing(name: str) -> str:
        if name == "cuda_ipc":
            return ON_HOST if card is None else _missing_on_card(card, layout)
        if not by_host:
            return "copies from host memory, the caches are on a card"
        return _missing(name, network, arena)

    if config.transport != "auto":
        if reason := missing(config.transport):
            raise ConfigError(f"transfer.transport={config.transport}: {reason}")
        return Usable([config.transport], {})
    # Mooncake's TCP is slower than Baton's own: automatic choice wants it only for what nothing else can drive.
    wanted = ["cuda_ipc", "shm", *(["mooncake"] if config.mooncake_protocol != "tcp" else []), "tcp"]
    reasons = {name: missing(name) for name in wanted}
    names, lacking = [name for name in wanted if not reasons[name]], {n: why for n, why in reasons.items() if why}
    if not names:
        raise ConfigError(f"transfer.transport=auto: {'; '.join(f'{name}: {why}' for name, why in lacking.items())}")
    return Usable(names, lacking)


def offer(name: str, network: LocalNetwork | None) -> LinkOffer:
    """What a writer says about a transport."""
    if name == "local" and network is not None:
        return LinkOffer(transport=name, host_id=network.host_id())
    if name == "cuda_ipc":
        from kv_transfer.device import place_id

        return LinkOffer(transport=name, host_id=place_id())
    return LinkOffer(transport=name, host_id=host_id() if name == "shm" else "")


def open_inlet(name: str, end: ReceiverEnd) -> Inlet:
    """Listen for writers. Raises ConfigError, or LayoutMismatch for cells that a card can't copy."""
    if not isinstance(end.arena, Arena):
        from kv_transfer.cuda_ipc import CudaIpcInlet
        from kv_transfer.device import check_words

        check_words(end.layout)
        return CudaIpcInlet(end.arena, end.key, end.events)
    if name == "local" and end.network is not None:
        return LocalInlet(end.arena, end.layout, end.events, end.network)
    if name == "shm":
        return ShmInlet(end.arena, end.key, end.events)
    if name == "mooncake":
        return MooncakeInlet(end.arena, end.key, end.events, end.host, end.config)
    return TcpInlet(end.arena, end.layout, end.key, end.events, end.host)


def connect(connected: Connected, end: WriterEnd, on_lost: Callable[[TransferError], None]) -> Link:
    """Open the link that the receiver chose. Blocks for at most a few seconds. Raises TransferError."""
    link, ticket, region = connected.link, connected.ticket, connected.region
    region_bytes = connected.layout.arena_bytes
    if link.transport == "local" and end.network is not None:
        return LocalLink.connect(end.network, ticket=ticket, region=region, on_lost=on_lost)
    if link.transport == "cuda_ipc" and end.device is not None:
        from kv_transfer.cuda_ipc import CudaIpcLink

        return CudaIpcLink.connect(
            link, end.key, end.device, ticket=ticket, region=region, region_bytes=region_bytes, on_lost=on_lost
        )
    if link.transport == "shm":
        return ShmLink.connect(link, end.key, ticket=ticket, region=region, region_bytes=region_bytes, on_lost=on_lost)
    if link.transport == "mooncake" and end.engine is not None:
        return MooncakeLink.connect(
            link, end.key, end.engine, ticket=ticket, region=region, region_bytes=region_bytes, on_lost=on_lost
        )
    if link.transport == "tcp":
        stall_s = end.config.commit_timeout_s
        return TcpLink.connect(link, end.key, ticket=ticket, region=region, stall_timeout_s=stall_s, on_lost=on_lost)
    raise TransferError(f"receiver chose transport {link.transport!r}, which was not offered")


def _missing_on_card(card: DeviceRegion, layout: KvLayout) -> str:
    from kv_transfer.device import check_words, missing

    try:
        check_words(layout)
    except LayoutMismatch as exc:
        return str(exc)
    return missing(card)


def _missing(name: str, network: LocalNetwork | None, arena: Arena | None) -> str:
    if name == "local" and network is None:
        return "works inside one process only; use auto, shm or tcp"
    if name == "shm" and arena is not None and not arena.shared:
        return "the arena must be shared memory"
    if name == "shm" and not host_id():
        return "/proc is not readable, so peers can't tell whether they share a host; use auto or tcp"
    return mooncake_missing() if name == "mooncake" else ""
