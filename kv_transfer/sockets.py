"""TCP connections of the data plane: how a writer opens one, and how both ends set it up."""

from __future__ import annotations

import socket
import struct

from kv_transfer.auth import HANDSHAKE_TIMEOUT_S, Handshake
from llm_engine.api.errors import ProtocolError, TransferError

_KEEPALIVE_S = 5


def dial(
    transport: str, address: str, key: bytes, *, ticket: str, region: str, stall_timeout_s: float | None
) -> socket.socket:
    """Connect to a receiver at host:port and introduce the writer. Raises TransferError.

    Blocks for at most a few seconds. `stall_timeout_s`: see `tune`.
    """
    host, _, port = address.rpartition(":")
    try:
        sock = socket.create_connection((host, int(port)), timeout=HANDSHAKE_TIMEOUT_S)
    except (OSError, ValueError) as exc:
        raise TransferError(f"{transport} connection to {address} failed: {exc}") from exc
    try:
        tune(sock, stall_timeout_s)
        Handshake(sock, key).introduce(transport=transport, ticket=ticket, region=region)
        sock.settimeout(None)
    except BaseException as exc:
        sock.close()
        if isinstance(exc, OSError | ProtocolError):
            raise TransferError(f"{transport} connection to {address} failed: {exc}") from exc
        raise
    return sock


def tune(sock: socket.socket, stall_timeout_s: float | None) -> None:
    """No Nagle delay; dead hosts are noticed; a send without progress fails after `stall_timeout_s`."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", _KEEPALIVE_S), ("TCP_KEEPINTVL", _KEEPALIVE_S), ("TCP_KEEPCNT", 3)):
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    if stall_timeout_s is not None:
        seconds = int(stall_timeout_s)
        timeval = struct.pack("@ll", seconds, int((stall_timeout_s - seconds) * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
