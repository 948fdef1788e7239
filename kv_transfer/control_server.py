"""The receiver's end of the control plane: accepts writers' channels and serves each in a task of its own."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from functools import partial

from kv_transfer.control import Channel
from kv_transfer.pairs import MAX_PAIRS
from llm_engine.api.errors import ConfigError, TransferError

log = logging.getLogger(__name__)

MAX_CHANNELS = 2 * MAX_PAIRS  # those included that have not said who they are
_INTRODUCTION_S = 10.0
_ACCEPT_AGAIN_S = 0.1


class ControlServer:
    """Life: construct (listens), `run` in a task, `close`."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        handle: Callable[[Channel, bytes | memoryview], bool],
        lost: Callable[[Channel], None],
        refused: Callable[[str], None],
    ) -> None:
        """Port 0: any. `handle` takes a frame; False: it was no message that a writer may send now. Raises ConfigError.

        `lost`: a channel is over. `refused`: one was turned away.
        """
        try:
            self._sock = socket.create_server((host, port), backlog=128)
        except OSError as exc:
            raise ConfigError(f"worker.host={host}, control port {port}: {exc.strerror}") from exc
        self._sock.setblocking(False)
        self.address = f"tcp://{host}:{self._sock.getsockname()[1]}"
        self._handle = handle
        self._lost = lost
        self._refused = refused
        self._channels: set[Channel] = set()

    async def run(self) -> None:
        """Serve writers for ever; raises what `handle` raises."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            while True:
                try:
                    sock, _ = await loop.sock_accept(self._sock)
                except OSError as exc:
                    log.warning("control channel: accept failed: %s", exc)
                    await asyncio.sleep(_ACCEPT_AGAIN_S)  # out of descriptors, say: do not spin
                    continue
                if len(self._channels) >= MAX_CHANNELS:
                    sock.close()
                    self._refused("full")
                else:
                    channel = Channel(sock)
                    self._channels.add(channel)
                    tasks.create_task(self._serve(channel))

    def close(self) -> None:
        """Stop listening; end every channel."""
        self._sock.close()
        for channel in self._channels:
            channel.close()

    async def _serve(self, channel: Channel) -> None:
        try:
            async with asyncio.timeout(_INTRODUCTION_S):
                while not self._handle(channel, await channel.recv()):
                    pass
            channel.trust()
            await channel.serve(partial(self._handle, channel))
        except (TimeoutError, TransferError) as exc:
            log.debug("control channel ended: %s", exc or "no writer introduced itself")
        finally:
            channel.close()
            self._channels.discard(channel)
            self._lost(channel)
