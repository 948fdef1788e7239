"""The control channel's sockets: ZeroMQ, one ROUTER on the receiver, one DEALER per peer on the writer.

Messages are authenticated by `Codec`; the sockets only bound what may queue up. Nothing here waits: a full queue is an
error for the hand-off concerned, not a reason to block the loop.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import zmq
import zmq.asyncio

from llm_engine.api.errors import ConfigError, TransferError
from llm_engine.api.messages import MAX_FRAME_BYTES

_QUEUE_FRAMES = 4096

Socket = zmq.asyncio.Socket


def bind_router(context: zmq.asyncio.Context, host: str, port: int) -> tuple[Socket, str]:
    """The receiver's socket and its address. Raises ConfigError."""
    socket = context.socket(zmq.ROUTER)
    _bound(socket)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a peer that is gone is an error, not silence
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a writer that reconnects takes its identity over
    try:
        if port == 0:
            port = socket.bind_to_random_port(f"tcp://{host}")
        else:
            socket.bind(f"tcp://{host}:{port}")
    except zmq.ZMQError as exc:
        socket.close()
        raise ConfigError(f"worker.host={host}, control port {port}: {exc.strerror}") from exc
    return socket, f"tcp://{host}:{port}"


def connect_dealer(context: zmq.asyncio.Context, address: str, name: str) -> Socket:
    """A writer's socket with an identity that nobody can guess. Raises TransferError for an impossible address."""
    socket = context.socket(zmq.DEALER)
    _bound(socket)
    socket.setsockopt(zmq.IDENTITY, f"{name[:128]}/{secrets.token_hex(16)}".encode()[-255:])
    try:
        socket.connect(address)
    except zmq.ZMQError as exc:
        socket.close()
        raise TransferError(f"control address {address}: {exc.strerror}") from exc
    return socket


def post(socket: Socket, parts: Sequence[bytes]) -> None:
    """Queue a message now. Raises TransferError when the peer is gone or its queue is full."""
    # With DONTWAIT the returned future is always done: the message was queued, or it failed.
    result: Any = socket.send_multipart(parts, zmq.DONTWAIT)
    error = result.exception()
    if isinstance(error, zmq.ZMQError):
        raise TransferError(f"control channel: {error.strerror}") from error
    if error is not None:
        raise error


def _bound(socket: Socket) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, _QUEUE_FRAMES)
    socket.setsockopt(zmq.RCVHWM, _QUEUE_FRAMES)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
