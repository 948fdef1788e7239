"""The transports there are: which of them work here, how each end opens them. Best first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

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
from llm_engine.api.errors import ConfigError, TransferError
from llm_engine.api.handoff import Connected, KvLayout, LinkOffer

if TYPE_CHECKING:  # needs torch
    from kv_transfer.device import DeviceRegion

Memory: TypeAlias = "Arena | DeviceRegion"

PREFERENCE = ("local", "cuda_ipc", "shm", "mooncake", "tcp")
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
    """What links are made of."""

    config: TransferConfig
    key: bytes
    network: LocalNetwork | None
    engine: Engine | None  # with transport mooncake
    device: DeviceRegion | None  # where the caches are, if on a card


def usable(config: TransferConfig, network: LocalNetwork | None, arena: Memory | None = None) -> tuple[list[str], str]:
    """Transports to offer under `config`, best first, and what keeps the others out ("" if nothing does).

    `arena`: the receiver's, or the writer's memory on a card. Raises ConfigError when a transport that is asked for by
    name can't work here.
    """
    if arena is not None and not isinstance(arena, Arena):
        return _usable_on_card(config, arena)
    if config.transport == "cuda_ipc":
        raise ConfigError("transfer.transport=cuda_ipc: the caches are in host memory, they must be on a card")
    if config.transport != "auto":
        if reason := _missing(config.transport, network, arena):
            raise ConfigError(f"transfer.transport={config.transport}: {reason}")
        return [config.transport], ""
    # Mooncake's TCP is slower than Baton's own: automatic choice wants it only for what nothing else can drive.
    wanted = ["shm", *(["mooncake"] if config.mooncake_protocol != "tcp" else []), "tcp"]
    reasons = {name: _missing(name, network, arena) for name in wanted}
    notes = [f"{name} does not work here: {reason}" for name, reason in reasons.items() if reason]
    return [name for name in wanted if not reasons[name]], "; ".join(notes)


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


def _usable_on_card(config: TransferConfig, region: DeviceRegion) -> tuple[list[str], str]:
    from kv_transfer.device import missing

    if config.transport not in ("auto", "cuda_ipc"):
        raise ConfigError(f"transfer.transport={config.transport}: copies from host memory, the caches are on a card")
    if reason := missing(region):
        raise ConfigError(f"transfer.transport={config.transport}: cuda_ipc does not work here: {reason}")
    return ["cuda_ipc"], ""


def _missing(name: str, network: LocalNetwork | None, arena: Arena | None) -> str:
    if name == "local" and network is None:
        return "works inside one process only; use auto, shm or tcp"
    if name == "shm" and arena is not None and not arena.shared:
        return "the arena must be shared memory"
    if name == "shm" and not host_id():
        return "/proc is not readable, so peers can't tell whether they share a host; use auto or tcp"
    return mooncake_missing() if name == "mooncake" else ""
