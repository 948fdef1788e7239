"""What every part of one HandoffClient shares."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kv_transfer.link import Link
from kv_transfer.local import LocalNetwork
from kv_transfer.metrics import Tally
from kv_transfer.mooncake import Engine
from kv_transfer.outbox import Outbox
from llm_engine.api.config import TransferConfig
from llm_engine.api.errors import ProtocolError
from llm_engine.api.handoff import KvLayout, ReceiverMessage
from llm_engine.api.messages import Codec, WorkerInfo

if TYPE_CHECKING:  # device: needs torch, which workers without a card in the data plane do without
    from kv_transfer.device import DeviceRegion
    from kv_transfer.handoff import Handoff


@dataclass(slots=True, kw_only=True)
class ClientContext:
    """What every part of one HandoffClient shares."""

    config: TransferConfig
    key: bytes
    info: WorkerInfo
    layout: KvLayout
    source: memoryview | DeviceRegion
    network: LocalNetwork | None
    transports: Sequence[str]
    lacking: Mapping[str, str]  # what automatic choice can't offer here, and why
    engine: Engine | None
    wrap_link: Callable[[Link], Link]
    codec: Codec[ReceiverMessage]
    spawn: Callable[[Coroutine[Any, Any, None]], None]
    post: Callable[..., None]  # call on the loop, from any thread
    crash: Callable[[Exception], None]  # a bug: the worker must notice
    tally: Tally = field(default_factory=Tally)
    handoffs: set[Handoff] = field(default_factory=set)

    def new_outbox(self, num_tokens: int) -> Outbox:
        """For one hand-off out of `source`."""
        if isinstance(self.source, memoryview):
            return Outbox(self.layout, self.source, num_tokens)
        from kv_transfer.staged import CardOutbox

        return CardOutbox(self.layout, self.source, num_tokens)

    def decode(self, frame: bytes | memoryview) -> ReceiverMessage | None:
        """A message of a receiver; None, and counted, if it is none."""
        try:
            return self.codec.decode(frame)
        except ProtocolError:
            self.tally.dropped_frames += 1
            return None
