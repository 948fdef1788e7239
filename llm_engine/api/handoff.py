"""Messages and tickets of the hand-off between a prefill worker (writer) and a decode worker (receiver).

writer                                   receiver
  Connect ───────────────────────────────▶  formats and layouts compared once per pair
         ◀─────────────────────────────── Connected | Refused
  Offer ─────────────────────────────────▶  matches its own prefix cache, reserves the rest
         ◀─────────────────────────────── Grant{lease, epoch, blocks} | Defer | Refused
  Tokens{lease} ─────────────────────────▶  kept for admission; they travel beside the first blocks
  data plane: blocks, layer by layer
  Progress{blocks of each layer} ────────▶  hashes what has landed while the rest is computed
  Commit{manifest} ──────────────────────▶  verifies; both parts of Commit travel as soon as they
  Commit{first token, hidden} ───────────▶  are known, in either order, or together; admits
         ◀─────────────────────────────── Accepted | Rejected
  Withdraw (any time before Commit) ─────▶  the writer has stopped: blocks are free at once
         ◀─────────────────────────────── Fence{lease, epoch}  (revocation)
  Fenced{lease, epoch} ──────────────────▶  the writer has stopped: blocks leave quarantine
"""

from __future__ import annotations

from typing import Literal

import msgspec

from llm_engine.api.messages import Message, Submit, WorkerInfo
from llm_engine.api.request import TokenLogprobs

PROTOCOL_VERSION = 6


class Plane(msgspec.Struct, frozen=True, kw_only=True):
    """One paged cache tensor [num_layers, num_blocks, block_bytes], at `offset` bytes of the arena."""

    name: str  # latent | index | mtp_latent | mtp_index
    num_layers: int
    block_bytes: int
    offset: int

    def address(self, layer: int, block: int, num_blocks: int) -> int:
        """Byte offset of one block of one layer inside the arena."""
        return self.offset + (layer * num_blocks + block) * self.block_bytes


class KvLayout(msgspec.Struct, frozen=True, kw_only=True):
    """Where the blocks of a worker's cache lie in its arena. Block counts may differ between peers, planes may not."""

    block_tokens: int
    num_blocks: int
    planes: tuple[Plane, ...]

    @property
    def arena_bytes(self) -> int:
        return max(p.offset + p.num_layers * self.num_blocks * p.block_bytes for p in self.planes)

    def bytes_per_block(self) -> int:
        """Bytes of one block over all planes and layers."""
        return sum(p.num_layers * p.block_bytes for p in self.planes)


class LinkOffer(msgspec.Struct, frozen=True, kw_only=True):
    """A transport that an end can speak, with what a peer needs to reach it (an address, a host identity)."""

    transport: str
    address: str = ""
    host_id: str = ""  # equal ids: the same machine and memory


class Connect(Message, frozen=True, kw_only=True, tag="connect"):
    """First message of a writer. `info.format_id` and the planes must equal the receiver's.

    `lacking`: transports that it would offer if it could, each with what is missing; for the reason that is shown.
    """

    version: int
    info: WorkerInfo
    layout: KvLayout
    links: tuple[LinkOffer, ...]
    lacking: dict[str, str] = {}


class Connected(Message, frozen=True, kw_only=True, tag="connected"):
    """The pair can work: which transport was chosen and why, and the receiver's region."""

    info: WorkerInfo
    layout: KvLayout
    link: LinkOffer
    reason: str
    region: str  # id of the receiver's arena for this incarnation
    ticket: str  # names this pairing in the handshake of its data connection
    checksum: Literal["full", "sampled", "count"] = "full"  # what the receiver will verify


class Refused(Message, frozen=True, kw_only=True, tag="refused"):
    """Connect or Offer was refused for good. `retryable` says whether another pair may serve the request."""

    code: str  # layout | version | transport | draining | too_long | stale
    reason: str
    request_id: str = ""
    attempt: int = 0
    retryable: bool = True


class Offer(Message, frozen=True, kw_only=True, tag="offer"):
    """`num_tokens` tokens of KV are about to be computed for `submit`; after Commit the receiver owns the sequence.

    It holds what blocks are reserved by: `submit` without its tokens, which follow the grant (`Tokens`), and their
    digests (see `hashing`), one after another: of every full block, or none, and then no prefix is found.
    """

    submit: Submit
    num_tokens: int
    weight_version: str
    digests: bytes = b""


class Grant(Message, frozen=True, kw_only=True, tag="grant"):
    """Blocks reserved under a lease. `blocks[i]` receives tokens [have_tokens + i·block_tokens, …)."""

    request_id: str
    attempt: int
    lease_id: int
    epoch: int
    have_tokens: int  # a multiple of block_tokens: found in the receiver's own prefix cache
    blocks: tuple[int, ...]


class Tokens(Message, frozen=True, kw_only=True, tag="tokens"):
    """`Submit.tokens` of a granted offer. Sent once, before any part of Commit."""

    request_id: str
    attempt: int
    lease_id: int
    epoch: int
    tokens: bytes


class Defer(Message, frozen=True, kw_only=True, tag="defer"):
    """No blocks now. The offer stays queued; the receiver grants later, or the writer gives up at its deadline."""

    request_id: str
    attempt: int
    reason: str


class Progress(Message, frozen=True, kw_only=True, tag="progress"):
    """The first `num_blocks` blocks of the grant have landed in these layers: (layer, num_blocks) pairs.

    A hint: it lets the receiver hash early. What counts is the manifest of Commit. Empty: it keeps the path warm.
    """

    lease_id: int
    epoch: int
    layers: tuple[tuple[int, int], ...]


class PlaneManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What was written into one plane.

    `checksums[layer]` is xxh3-64 over the blocks' bytes in block order, or over samples of them under the sampled
    policy; empty under the count policy.
    """

    plane: str
    num_blocks: int
    num_bytes: int
    checksums: tuple[int, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Completeness proof of a hand-off: every plane, every layer, every block."""

    num_tokens: int
    planes: tuple[PlaneManifest, ...]


class FirstToken(msgspec.Struct, frozen=True, kw_only=True):
    """The token drawn by prefill and the final hidden state (post final norm) of the last prompt position."""

    token: int
    logprobs: TokenLogprobs | None
    hidden: bytes
    cached_tokens: int


class Commit(Message, frozen=True, kw_only=True, tag="commit"):
    """What concludes a hand-off, in one message or in two: each part is sent as soon as it is known, once.

    `manifest`: all writes under the lease are done, no further write will follow. `first`: the prompt is computed.
    """

    request_id: str
    attempt: int
    lease_id: int
    epoch: int
    weight_version: str
    manifest: Manifest | None = None
    first: FirstToken | None = None
    compute_end_age_s: float = 0.0  # with `first`: seconds from the end of the last prefill kernel to this message


class Accepted(Message, frozen=True, kw_only=True, tag="accepted"):
    """The receiver owns the sequence; the writer drops its pins."""

    request_id: str
    attempt: int
    lease_id: int


class Rejected(Message, frozen=True, kw_only=True, tag="rejected"):
    """The manifest did not match what landed, or the lease is gone. Nothing of it is used."""

    request_id: str
    attempt: int
    lease_id: int
    reason: str


class Withdraw(Message, frozen=True, kw_only=True, tag="withdraw"):
    """The writer gives the hand-off up and promises that no write is in flight. Also withdraws an ungranted offer."""

    request_id: str
    attempt: int


class Fence(Message, frozen=True, kw_only=True, tag="fence"):
    """Stop writing under this lease and say so."""

    request_id: str
    attempt: int
    lease_id: int
    epoch: int


class Fenced(Message, frozen=True, kw_only=True, tag="fenced"):
    """Answer to Fence: no write under the lease is in flight and none will start."""

    lease_id: int
    epoch: int


class Probe(Message, frozen=True, kw_only=True, tag="probe"):
    """Canary, step 1: the writer asks for the pair's scratch block."""

    nonce: int


class ProbeGrant(Message, frozen=True, kw_only=True, tag="probe_grant"):
    """Canary, step 2: the scratch block under a lease of its own."""

    nonce: int
    lease_id: int
    epoch: int
    block: int


class ProbeCommit(Message, frozen=True, kw_only=True, tag="probe_commit"):
    """Canary, step 3: the block was written; `checksum` is xxh3-64 over the block of every plane and layer in order."""

    nonce: int
    lease_id: int
    checksum: int


class ProbeResult(Message, frozen=True, kw_only=True, tag="probe_result"):
    """Canary, step 4."""

    nonce: int
    ok: bool
    detail: str = ""


WriterMessage = Connect | Offer | Tokens | Progress | Commit | Withdraw | Fenced | Probe | ProbeCommit
ReceiverMessage = Connected | Refused | Grant | Defer | Accepted | Rejected | Fence | ProbeGrant | ProbeResult
