"""Which transport a pair uses, decided by the receiver from what both ends offer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from kv_transfer.transports import ON_HOST, PREFERENCE, SAME_PLACE
from llm_engine.api.errors import TransferError
from llm_engine.api.handoff import LinkOffer


class End(NamedTuple):
    """One worker of a pair. `lacking`: why it does not offer what automatic choice would have it offer."""

    name: str
    offers: Sequence[LinkOffer]
    lacking: Mapping[str, str] = {}

    def find(self, transport: str) -> LinkOffer | None:
        """Its offer of a transport."""
        return next((offer for offer in self.offers if offer.transport == transport), None)


def choose(writer: End, receiver: End) -> tuple[LinkOffer, str]:
    """The receiver's offer to use, and why. Raises TransferError that says what is missing on which end."""
    chosen: LinkOffer | None = None
    missing: list[str] = []
    for transport in PREFERENCE:
        here, there = writer.find(transport), receiver.find(transport)
        if here is None or there is None:
            wanted = chosen is None and not (here is None and there is None)
            missing.extend(_absent(transport, writer, receiver, wanted=wanted))
        elif chosen is None and transport in SAME_PLACE and not (here.host_id and here.host_id == there.host_id):
            missing.append(f"{transport} needs {SAME_PLACE[transport]}, but {here.host_id!r} is not {there.host_id!r}")
        elif chosen is None:
            chosen = there
    if chosen is None:
        raise TransferError(
            f"no transport connects {writer.name} and {receiver.name}: {'; '.join(missing) or 'neither offers any'}; "
            "set transfer.transport to auto or tcp on both"
        )
    return chosen, f"{chosen.transport}: best of both offers" + (f" ({'; '.join(missing)})" if missing else "")


def _absent(transport: str, *ends: End, wanted: bool) -> Iterator[str]:
    """Who does not offer it, if that is `wanted`; in any case what is broken. No cards on either end goes unsaid."""
    for end in ends:
        reason = end.lacking.get(transport, "")
        if end.find(transport) is None and (wanted or reason not in ("", ON_HOST)):
            yield f"{end.name} does not offer {transport}" + (f": {reason}" if reason else "")
