"""Which transport a pair uses, decided by the receiver from what both ends offer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from llm_engine.api.errors import TransferError
from llm_engine.api.handoff import LinkOffer

_PREFERENCE = ("local", "shm", "tcp")  # best first
_SAME_HOST = {"local": "the same process", "shm": "the same host, network namespace and user"}


def host_id() -> str:
    """Equal on two processes exactly if a unix socket and a shared mapping can connect them.

    Abstract socket names belong to a network namespace, and links accept their own user only.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}/{os.geteuid()}"
    except OSError:
        return ""  # unknown: never equal to anything


def choose(writer: str, ours: Sequence[LinkOffer], receiver: str, theirs: Sequence[LinkOffer]) -> tuple[LinkOffer, str]:
    """The receiver's offer to use and the reason. Raises TransferError that says what is missing on which end."""
    missing: list[str] = []
    for transport in _PREFERENCE:
        here = next((offer for offer in ours if offer.transport == transport), None)
        there = next((offer for offer in theirs if offer.transport == transport), None)
        if here is None or there is None:
            lacking = [name for name, offer in ((writer, here), (receiver, there)) if offer is None]
            if len(lacking) == 1:
                missing.append(f"{lacking[0]} does not offer {transport}")
            continue
        if transport in _SAME_HOST and not (here.host_id and here.host_id == there.host_id):
            missing.append(f"{transport} needs {_SAME_HOST[transport]} ({here.host_id!r} and {there.host_id!r})")
            continue
        return there, f"{transport}: best of what both ends offer" + (f" ({'; '.join(missing)})" if missing else "")
    raise TransferError(
        f"no transport connects {writer} and {receiver}: {'; '.join(missing) or 'neither offers any'}; "
        "set transfer.transport to auto or tcp on both"
    )
