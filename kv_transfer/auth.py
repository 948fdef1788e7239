"""Handshake of a data connection: both ends prove that they hold the cluster key before anything else is read.

    writer   → Greeting{which pairing, which region, nonce}
    receiver → Challenge{nonce, proof over both nonces and the greeting}
    writer   → Answer{proof}
    receiver → Verdict

The proofs are keyed blake2b with purpose strings of their own, so that no frame of another protocol can stand in for
them. They authenticate the connection, not each later byte: what arrives is compared with the manifest's checksums.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import struct
import time
from typing import TypeVar

import msgspec

from llm_engine.api.errors import ProtocolError, TransferError
from llm_engine.api.keys import accepted

DATA_VERSION = 1
HANDSHAKE_TIMEOUT_S = 5.0
_LENGTH = struct.Struct("<H")
_NONCE_BYTES = 32
_MAX_FRAME = 4096

S = TypeVar("S", bound=msgspec.Struct)


class Greeting(msgspec.Struct, frozen=True, kw_only=True):
    """Which pairing (`Connected.ticket`) connects, to which memory."""

    version: int
    transport: str
    ticket: str
    region: str
    nonce: bytes


class Challenge(msgspec.Struct, frozen=True, kw_only=True):
    """The receiver's proof and its own nonce."""

    nonce: bytes
    proof: bytes


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The writer's proof."""

    proof: bytes


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The end of the handshake; `reason` when refused."""

    ok: bool
    reason: str = ""


class Handshake:
    """One end's handshake on one socket, bounded in time as a whole."""

    def __init__(self, sock: socket.socket, key: bytes, timeout_s: float = HANDSHAKE_TIMEOUT_S) -> None:
        self._sock = sock
        self._key = key
        self._deadline = time.monotonic() + timeout_s

    def introduce(self, *, transport: str, ticket: str, region: str) -> None:
        """Writer's part. Raises TransferError when refused, ProtocolError when the other end does not hold the key."""
        greeting = Greeting(
            version=DATA_VERSION,
            transport=transport,
            ticket=ticket,
            region=region,
            nonce=secrets.token_bytes(_NONCE_BYTES),
        )
        hello = self._send(greeting)
        challenge = self._receive(Challenge)
        if not _is_proof(challenge.proof, self._key, b"kv-receiver", hello, challenge.nonce):
            raise ProtocolError(f"the {transport} receiver is not authentic: peers must share one BATON_SECRET")
        self._send(Answer(proof=_proof(self._key, b"kv-writer", hello, challenge.nonce)))
        verdict = self._receive(Verdict)
        if not verdict.ok:
            raise TransferError(f"{transport} connection refused: {verdict.reason}")

    def challenge(self, *, transport: str, region: str) -> Greeting:
        """Receiver's part, up to the verdict. Raises ProtocolError for all but an authentic writer of this region."""
        greeting = self._receive(Greeting)
        if greeting.version != DATA_VERSION or greeting.transport != transport or len(greeting.nonce) != _NONCE_BYTES:
            raise ProtocolError(
                f"greeting of version {greeting.version} for {greeting.transport!r}, expected {transport}"
            )
        hello = msgspec.msgpack.encode(greeting)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        self._send(Challenge(nonce=nonce, proof=_proof(self._key, b"kv-receiver", hello, nonce)))
        answer = self._receive(Answer)
        if not _is_proof(answer.proof, self._key, b"kv-writer", hello, nonce):
            raise ProtocolError("writer is not authentic: peers must share one BATON_SECRET")
        if greeting.region != region:
            raise ProtocolError(f"writer asks for region {greeting.region}, this is {region}")
        return greeting

    def conclude(self, verdict: Verdict) -> None:
        """Receiver's last word."""
        self._send(verdict)

    def _send(self, message: msgspec.Struct) -> bytes:
        body = msgspec.msgpack.encode(message)
        self._wait_at_most_the_rest()
        self._sock.sendall(_LENGTH.pack(len(body)) + body)
        return body

    def _receive(self, kind: type[S]) -> S:
        (length,) = _LENGTH.unpack(self._receive_exactly(_LENGTH.size))
        if not 0 < length <= _MAX_FRAME:
            raise ProtocolError(f"handshake frame of {length} bytes, at most {_MAX_FRAME} expected")
        try:
            return msgspec.msgpack.decode(self._receive_exactly(length), type=kind)
        except msgspec.MsgspecError as exc:
            raise ProtocolError(f"malformed handshake: {exc}") from exc

    def _receive_exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            self._wait_at_most_the_rest()
            part = self._sock.recv(count - len(data))
            if not part:
                raise ConnectionResetError("connection closed during the handshake")
            data += part
        return data

    def _wait_at_most_the_rest(self) -> None:
        self._sock.settimeout(max(0.001, self._deadline - time.monotonic()))


def _is_proof(proof: bytes, key: bytes, purpose: bytes, *parts: bytes) -> bool:
    """Whether the other end holds a key that is accepted here."""
    return any(hmac.compare_digest(proof, _proof(k, purpose, *parts)) for k in accepted(key))


def _proof(key: bytes, purpose: bytes, *parts: bytes) -> bytes:
    digest = hashlib.blake2b(key=key, person=purpose, digest_size=32)
    for part in parts:
        digest.update(len(part).to_bytes(4, "little") + part)
    return digest.digest()
