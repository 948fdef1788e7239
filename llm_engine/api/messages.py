"""The request plane: messages between routers and workers, and the authenticated codec that carries every message.

Frames are `mac ‖ msgpack`: the head of an HMAC-SHA256 over the body, then one tagged struct. Nothing is pickled; an
unknown tag, a wrong type, a bad mac or an oversized frame raises ProtocolError and the frame is dropped.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from llm_engine.api.errors import ProtocolError
from llm_engine.api.keys import accepted
from llm_engine.api.request import SamplingParams, TokenDelta

PROTOCOL_VERSION = 2
MAX_FRAME_BYTES = 64 << 20
_MAC_BYTES = 16
_BLOCK_BYTES = 64  # of SHA-256


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of every wire message; subclasses set a `tag`."""


class Role(enum.StrEnum):
    """What a worker does. An aggregated worker prefills and decodes in one engine."""

    PREFILL = "prefill"
    DECODE = "decode"
    AGGREGATED = "aggregated"


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Identity and addresses of one worker process. A restarted worker has a new `incarnation`."""

    name: str
    role: Role
    incarnation: str
    pid: int
    request_addr: str  # ZeroMQ ROUTER for routers
    control_addr: str  # control channels of prefill peers ("" on prefill workers)
    metrics_addr: str  # http://host:port/metrics
    model: str
    format_id: str
    weight_version: str
    block_tokens: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """The decode worker chosen for a request."""

    name: str
    incarnation: str
    control_addr: str


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """First message of a router to a worker, repeated as its heartbeat."""

    version: int
    router_id: str


class Submit(Message, frozen=True, kw_only=True, tag="submit"):
    """Compute `tokens` (prompt ‖ output already emitted by earlier attempts) and go on from there."""

    request_id: str
    attempt: int
    router_id: str
    tokens: bytes  # pack_tokens
    num_prompt: int  # the client's prompt; the rest of `tokens` is emitted output
    sampling: SamplingParams
    deadline_s: float  # seconds left, counted from receipt
    salt: str = ""
    decode: Peer | None = None  # None: the worker decodes itself (aggregated)


class Cancel(Message, frozen=True, kw_only=True, tag="cancel"):
    """Stop an attempt and every older one of the request, wherever it is."""

    request_id: str
    attempt: int


class Drain(Message, frozen=True, kw_only=True, tag="drain"):
    """Take no new work; with `hand_back`, return running sequences to their routers too."""

    hand_back: bool = False


class SnapshotRequest(Message, frozen=True, kw_only=True, tag="snapshot_request"):
    """The router missed KV events: send the whole prefix index."""


class Welcome(Message, frozen=True, kw_only=True, tag="welcome"):
    """Answer to Hello."""

    version: int
    info: WorkerInfo


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """The decode worker owns the sequence: the loss of its prefill worker no longer matters."""

    request_id: str
    attempt: int
    handoff_s: float
    exposed_s: float
    num_bytes: int


class Deltas(Message, frozen=True, kw_only=True, tag="deltas"):
    """All news of one step for one router: one message a step, however many streams. `started` precedes `items`."""

    items: list[TokenDelta] = []
    started: list[Started] = []


class Failed(Message, frozen=True, kw_only=True, tag="failed"):
    """The attempt is over without a finish. `retryable`: another attempt may succeed (a preempted sequence, say)."""

    request_id: str
    attempt: int
    code: str  # full | handoff | preempted | draining | deadline | too_long | stale | invalid | router | internal
    reason: str
    retryable: bool


class Load(Message, frozen=True, kw_only=True, tag="load"):
    """A worker's state, sent every heartbeat. Blocks by state; tokens still to be prefilled; tokens per second."""

    seq: int
    num_waiting: int = 0
    num_running: int = 0
    waiting_tokens: int = 0
    blocks_free: int = 0
    blocks_cached: int = 0
    blocks_live: int = 0
    blocks_leased: int = 0
    blocks_quarantined: int = 0
    num_live: int = 0  # requests this worker answers for; with no hand-off pending, 0 means that it may stop
    pending_handoffs: int = 0
    prefill_tokens_per_s: float = 0.0
    step_s: float = 0.0
    step_age_s: float = 0.0  # seconds since the step loop last made progress while it had work
    draining: bool = False
    healthy: bool = True
    bad_peers: list[str] = []  # incarnations of decode workers whose canary failed
    num_routers: int = 0  # connected to this worker: how many share the limits of a tenant


class KvEvents(Message, frozen=True, kw_only=True, tag="kv_events"):
    """Changes of the prefix cache since event `seq` - 1. A gap in `seq` means: ask for a snapshot."""

    seq: int
    stored: list[bytes] = []
    removed: list[bytes] = []


class KvSnapshot(Message, frozen=True, kw_only=True, tag="kv_snapshot"):
    """The whole prefix index as of event `seq`."""

    seq: int
    digests: list[bytes]


class Members(Message, frozen=True, kw_only=True, tag="members"):
    """The controller's membership feed: always the complete list, so a lost message costs nothing."""

    version: int
    workers: list[WorkerInfo]


RouterMessage = Hello | Submit | Cancel | Drain | SnapshotRequest
WorkerMessage = Welcome | Deltas | Failed | Load | KvEvents | KvSnapshot

T = TypeVar("T")


class Codec(Generic[T]):
    """Encodes any message; decodes those of one union (`Codec(key, RouterMessage)`)."""

    def __init__(self, key: bytes, kind: Any) -> None:
        self._mac, *self._others = map(signer, accepted(key))
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)

    def encode(self, message: Message) -> bytes:
        body = self._encoder.encode(message)
        return self._mac(body) + body

    def decode(self, frame: bytes | memoryview) -> T:
        """Raises ProtocolError on anything but an authentic, well-formed message of the union."""
        if not _MAC_BYTES < len(frame) <= MAX_FRAME_BYTES:
            raise ProtocolError(f"frame of {len(frame)} bytes: expected {_MAC_BYTES + 1} to {MAX_FRAME_BYTES}")
        body = memoryview(frame)[_MAC_BYTES:]
        mac = bytes(frame[:_MAC_BYTES])
        if not any(hmac.compare_digest(own(body), mac) for own in (self._mac, *self._others)):
            raise ProtocolError("frame is not authentic: peers must share one BATON_SECRET")
        try:
            return self._decoder.decode(body)
        except msgspec.MsgspecError as exc:
            raise ProtocolError(f"malformed message: {exc}") from exc


def signer(key: bytes) -> Callable[[bytes | memoryview], bytes]:
    """Makes the head of an HMAC-SHA256 (RFC 2104). The key's own blocks are hashed once: most frames are no longer."""
    block = (key if len(key) <= _BLOCK_BYTES else hashlib.sha256(key).digest()).ljust(_BLOCK_BYTES, b"\0")
    first, second = (hashlib.sha256(bytes(byte ^ pad for byte in block)) for pad in (0x36, 0x5C))

    def mac(body: bytes | memoryview) -> bytes:
        inner, outer = first.copy(), second.copy()
        inner.update(body)
        outer.update(inner.digest())
        return outer.digest()[:_MAC_BYTES]

    return mac
