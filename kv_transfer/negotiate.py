"""Which transport a pair uses, decided by the receiver from what both ends offer."""

from __future__ import annotations

from collections.abc import Sequence

from kv_transfer.transports import PREFERENCE, SAME_PLACE
from llm_engine.api.errors import TransferError
from llm_engine.api.handoff import LinkOffer


def choose(writer: str, ours: Sequence[LinkOffer], receiver: str, theirs: Sequence[LinkOffer]) -> tuple[LinkOffer, str]:
    """The receiver's offer to use, and why. Raises TransferError that says what is missing on which end."""
    missing: list[str] = []
    for transport in PREFERENCE:
        here = next((offer for offer in ours if offer.transport == transport), None)
        there = next((offer for offer in theirs if offer.transport == transport), None)
        if here is None or there is None:
            missing.extend(
                f"{name} does not offer {transport}"
                for name, offer, other in ((writer, here, there), (receiver, there, here))
                if offer is None and other is not None
            )
        elif transport in SAME_PLACE and not (here.host_id and here.host_id == there.host_id):
            missing.append(f"{transport} needs {SAME_PLACE[transport]}, but {here.host_id!r} is not {there.host_id!r}")
        else:
            return there, f"{transport}: best of both offers" + (f" ({'; '.join(missing)})" if missing else "")
    raise TransferError(
        f"no transport connects {writer} and {receiver}: {'; '.join(missing) or 'neither offers any'}; "
        "set transfer.transport to auto or tcp on both"
    )
