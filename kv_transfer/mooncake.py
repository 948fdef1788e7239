"""mooncake: Mooncake's Transfer Engine moves the bytes, over TCP, RDMA, or Ascend's direct transport (HCCS, RoCE).

An optional extra. Peers pair over a socket of Baton's own, authenticated with the cluster key, which carries nothing
else: it is the proof of life. The engine finds the receiver's memory through its own handshake; offsets are checked
against the region here, because the engine knows whole registrations only.

**What proves that a writer has stopped.** Writes are synchronous: when the engine reports success, everything has
landed. A writer that lives therefore answers fences truthfully, and says goodbye when it closes a link on which no
write failed or was abandoned; goodbye and end of file together are a proof. Nothing else is: bytes of a process that
died may still be on their way into memory, and after a failed call nobody knows what is. Such blocks stay in quarantine
as long as the receiver lives.

**Trust.** The engine takes writes into registered memory from everybody who reaches its port: use it on networks where
only workers can.

Protocol `tcp` is tested. `rdma` and `ascend` are settings of the same calls that have never run on a card.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from kv_transfer.link import Copy, LeaseKey, Sent, all_landed, no_news
from kv_transfer.listener import Events, UnseenInlet
from kv_transfer.memory import Arena
from kv_transfer.sockets import dial, tune
from llm_engine.api.config import TransferConfig
from llm_engine.api.errors import ConfigError, LeaseRevoked, ProtocolError, TransferError
from llm_engine.api.handoff import LinkOffer

_CALL_COPIES = 512  # the engine refuses calls of more than 1,024 at once
_ASCEND_ALIGNMENT = 2 << 20
_GOODBYE = b"q"


def missing() -> str:
    """Why the engine can't be used here, or ""."""
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")  # otherwise a line for every call
    try:
        importlib.import_module("mooncake.engine")
    except (ImportError, OSError) as exc:
        reason = str(exc).partition("\n")[0]
        return f"mooncake.engine can't be loaded ({reason}); install Baton's mooncake extra and Debian's libibverbs1"
    return ""


class Engine:
    """One transfer engine of this process, over a region that is registered for good, and others. Thread-safe."""

    def __init__(self, memory: memoryview | None, host: str, config: TransferConfig) -> None:
        """`memory`: the region; None: what is written comes from elsewhere (`add`). `host`: the address at which peers
        reach this process. Raises ConfigError."""
        if reason := missing():
            raise ConfigError(f"transfer.transport=mooncake: {reason}")
        self._protocol = protocol = config.mooncake_protocol
        if memory is not None and protocol == "ascend" and not _fills_pages(memory):
            raise ConfigError("transfer.mooncake_protocol=ascend: the cache must lie on whole 2 MiB pages")
        self._added: dict[int, int] = {}  # address → bytes
        os.environ.setdefault("MC_TRANSFER_TIMEOUT", str(max(1, round(config.commit_timeout_s))))
        self._engine: Any = importlib.import_module("mooncake.engine").TransferEngine()
        if self._engine.initialize(host, "P2PHANDSHAKE", protocol, config.mooncake_device) != 0:
            device = config.mooncake_device or "any device"
            raise ConfigError(f"transfer.mooncake_protocol={protocol}: the engine does not start on {host}, {device}")
        self.base = 0 if memory is None else self._add_region(memory)
        self.address = f"{host}:{self._engine.get_rpc_port()}"

    def add(self, memory: memoryview) -> None:
        """Register memory that will be written from, until `remove`. Raises TransferError."""
        start = _address(memory)
        if self._engine.register_memory(start, len(memory)) != 0:
            raise TransferError(f"mooncake engine refuses {len(memory)} bytes of other memory")
        self._added[start] = len(memory)

    def remove(self, memory: memoryview) -> None:
        """Nothing is written from it any more. Idempotent."""
        if self._added.pop(_address(memory), None) is not None:
            self._engine.unregister_memory(_address(memory))

    def find(self, peer: str) -> int:
        """Where a peer's region begins, for `write`. Raises TransferError."""
        base = int(self._engine.get_first_buffer_address(peer))
        if base == 0:
            raise TransferError(f"mooncake engine at {peer} has no memory registered")
        return base

    def write(self, peer: str, base: int, copies: Sequence[Copy], source: int) -> bool:
        """Copy from address `source` into the peer's region. False: failed, and nobody knows what has arrived."""
        sources = [source + copy.source for copy in copies]
        targets = [base + copy.target for copy in copies]
        lengths = [copy.num_bytes for copy in copies]
        return int(self._engine.batch_transfer_sync_write(peer, sources, targets, lengths)) == 0

    @contextlib.contextmanager
    def registered(self, memory: memoryview) -> Iterator[int]:
        """Address of `memory`, which the engine may read meanwhile."""
        start = _address(memory)
        if any(first <= start < first + size for first, size in tuple(self._added.items())):
            yield start
            return
        self.add(memory)
        try:
            yield start
        finally:
            self.remove(memory)

    def close(self) -> None:
        """Nothing more is read or written by peers that ask from now on."""
        while self._added:
            self._engine.unregister_memory(self._added.popitem()[0])

    def _add_region(self, memory: memoryview) -> int:
        try:
            self.add(memory)
        except TransferError:
            raise ConfigError(
                f"transfer.mooncake_protocol={self._protocol}: the engine refuses {len(memory)} bytes of cache"
            ) from None
        return _address(memory)


def _address(memory: memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def _fills_pages(memory: memoryview) -> bool:
    return _address(memory) % _ASCEND_ALIGNMENT == 0 == len(memory) % _ASCEND_ALIGNMENT


class MooncakeLink:
    """Writer's end."""

    transport = "mooncake"

    def __init__(
        self,
        engine: Engine,
        sock: socket.socket,
        peer: str,
        region_bytes: int,
        on_lost: Callable[[TransferError], None],
    ) -> None:
        self._engine = engine
        self._sock = sock
        self._peer = peer
        self._region_bytes = region_bytes
        self._on_lost = on_lost
        self._lock = threading.Lock()  # held while the engine writes
        self._closed = False
        self._doubtful = False  # something may still be on its way
        try:
            self._base = engine.find(peer)
        except TransferError:
            sock.close()
            raise
        self._watcher = threading.Thread(target=self._watch, name="kv-mooncake-watch", daemon=True)
        self._watcher.start()

    @classmethod
    def connect(
        cls,
        offer: LinkOffer,
        key: bytes,
        engine: Engine,
        *,
        ticket: str,
        region: str,
        region_bytes: int,
        on_lost: Callable[[TransferError], None],
    ) -> MooncakeLink:
        """Pair with the receiver. Blocks for at most a few seconds. Raises TransferError."""
        pairing, _, engine_port = offer.address.partition("/")
        sock = dial("mooncake", pairing, key, ticket=ticket, region=region, stall_timeout_s=None)
        host = pairing.rpartition(":")[0]
        return cls(engine, sock, f"{host}:{engine_port}", region_bytes, on_lost)

    def write(
        self,
        lease: LeaseKey,
        source: memoryview,
        copies: Sequence[Copy],
        stopped: Callable[[], bool],
        sent: Sent = no_news,
    ) -> None:
        """See Link.write. A source outside the engine's region is registered for the time of the call."""
        with self._engine.registered(source) as start:
            self._write(lease, start, copies, stopped, sent)

    def _write(
        self, lease: LeaseKey, start: int, copies: Sequence[Copy], stopped: Callable[[], bool], sent: Sent
    ) -> None:
        for first in range(0, len(copies), _CALL_COPIES):
            call = copies[first : first + _CALL_COPIES]
            if any(copy.target < 0 or copy.target + copy.num_bytes > self._region_bytes for copy in call):
                raise ProtocolError("a copy ends outside the receiver's region")
            with self._lock:
                if stopped():
                    raise LeaseRevoked(f"lease {lease.lease_id}: stopped")
                if self._closed or self._doubtful:
                    raise TransferError("mooncake link is closed")
                self._doubtful = True
                done = self._engine.write(self._peer, self._base, call, start)
                self._doubtful = not done
            if not done:
                raise TransferError(f"mooncake engine failed to write to {self._peer}")
            for index in range(first, first + len(call)):
                sent(index, 0, copies[index].num_bytes)

    def confirm(self, lease: LeaseKey) -> Future[int | None]:
        """Copies have landed when `write` returns."""
        return all_landed()

    def close(self) -> None:
        """Say goodbye if nothing is on its way. Never waits for the engine: a write that runs fails later."""
        with contextlib.suppress(OSError):
            if self._lock.acquire(blocking=False):
                try:
                    if not self._closed and not self._doubtful:
                        self._closed = True  # before goodbye: nothing may be written after it
                        self._sock.sendall(_GOODBYE)
                finally:
                    self._lock.release()
            self._closed = True
            self._sock.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._watcher:
            self._watcher.join()
        self._sock.close()

    def _watch(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.recv(1)
        if not self._closed:
            self._on_lost(TransferError("mooncake link closed by the receiver"))


class MooncakeInlet(UnseenInlet):
    """Receiver's end."""

    transport = "mooncake"

    def __init__(self, arena: Arena, key: bytes, events: Events, host: str, config: TransferConfig) -> None:
        """Raises ConfigError when the engine can't work here."""
        self._engine = Engine(arena.buffer, host, config)
        try:
            sock = socket.create_server((host, 0))
        except OSError as exc:
            raise ConfigError(f"worker.host={host}: mooncake transport can't listen there: {exc.strerror}") from exc
        engine_port = self._engine.address.rpartition(":")[2]
        self._address = f"{host}:{sock.getsockname()[1]}/{engine_port}"
        super().__init__(sock, key, arena.region, events)

    def offer(self) -> LinkOffer:
        """host:port/engine port."""
        return LinkOffer(transport="mooncake", address=self._address)

    def close(self) -> None:
        """See Listener.close."""
        super().close()
        self._engine.close()

    def welcome(self, sock: socket.socket) -> None:
        """Nothing to send; tunes the socket."""
        tune(sock, None)

    def serve(self, sock: socket.socket, connection: int) -> bool:
        """Wait for the writer's end: proven if it said goodbye first."""
        last = b""
        while data := sock.recv(64):
            last = data
        return last == _GOODBYE
