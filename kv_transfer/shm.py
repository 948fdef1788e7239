"""shm: the writer maps the receiver's memfd and copies straight into its blocks.

The receiver listens on an abstract unix socket (no file to leave behind), checks the peer's user and the cluster key,
and passes the descriptor. After that the socket carries nothing; it is the proof of life. **End of file on it means
that the writer can't write any more:**

- A writer that lives closes it in `ShmLink.close` only, after waiting for the running copy and unmapping the region.
- A writer that dies, of whatever: the kernel tears down a thread's address space (exit_mm) before its descriptor table
  (exit_files), and the socket closes when the last thread drops the table. By then no thread of the process can run a
  store instruction. A stopped process (SIGSTOP) keeps its socket, so its blocks stay in quarantine.
- A forked child inherits the socket and keeps it open as long as it lives; the mapping is not inherited (MADV_DONTFORK)
  and does not survive exec, and the socket is close-on-exec.

The receiver can't see what lands and can't stop the writer, hence the fence protocol and the manifest's checksums.
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

from kv_transfer.auth import HANDSHAKE_TIMEOUT_S, Handshake
from kv_transfer.host import host_id
from kv_transfer.link import Copy, LeaseKey, Sent, all_landed, cuts, no_news
from kv_transfer.listener import Events, UnseenInlet
from kv_transfer.memory import Arena
from llm_engine.api.errors import ConfigError, LeaseRevoked, ProtocolError, TransferError
from llm_engine.api.handoff import LinkOffer

_MADV_POPULATE_WRITE = 23
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred


class ShmLink:
    """Writer's end."""

    transport = "shm"

    def __init__(self, sock: socket.socket, memory: mmap.mmap, on_lost: Callable[[TransferError], None]) -> None:
        self._sock = sock
        self._memory = memory
        self._target: npt.NDArray[np.uint8] | None = np.frombuffer(memory, dtype=np.uint8)
        self._lock = threading.Lock()  # held while a batch is copied
        self._on_lost = on_lost
        self._watcher = threading.Thread(target=self._watch, name="kv-shm-watch", daemon=True)
        self._watcher.start()

    @classmethod
    def connect(
        cls,
        offer: LinkOffer,
        key: bytes,
        *,
        ticket: str,
        region: str,
        region_bytes: int,
        on_lost: Callable[[TransferError], None],
    ) -> ShmLink:
        """Map the receiver's region. Blocks for at most a few seconds. Raises TransferError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(HANDSHAKE_TIMEOUT_S)
            sock.connect("\0" + offer.address)
            check_user(sock)
            Handshake(sock, key).introduce(transport="shm", ticket=ticket, region=region)
            memory = _map_region(_receive_descriptor(sock), region_bytes)
            sock.settimeout(None)
        except BaseException as exc:
            sock.close()
            if isinstance(exc, OSError | ProtocolError):
                raise TransferError(f"shm connection to {offer.address} failed: {exc}") from exc
            raise
        return cls(sock, memory, on_lost)

    def write(
        self,
        lease: LeaseKey,
        source: memoryview,
        copies: Sequence[Copy],
        stopped: Callable[[], bool],
        sent: Sent = no_news,
    ) -> None:
        """See Link.write. Offsets come from layouts and block ids that were checked against both regions."""
        origin = np.frombuffer(source, dtype=np.uint8)
        with self._lock:
            for index, copy in enumerate(copies):
                if stopped():
                    raise LeaseRevoked(f"lease {lease.lease_id}: stopped")
                if self._target is None:
                    raise TransferError("shm link is closed")
                pieces = ((0, copy.num_bytes),) if sent is no_news else cuts(copy.num_bytes)
                for first, last in pieces:
                    np.copyto(
                        self._target[copy.target + first : copy.target + last],
                        origin[copy.source + first : copy.source + last],
                    )
                    sent(index, first, last)

    def confirm(self, lease: LeaseKey) -> Future[int | None]:
        """Copies are done when `write` returns; the system calls that follow order them before the receiver's reads."""
        return all_landed()

    def close(self) -> None:
        """Unmap, then close the socket: in this order, because end of file is the receiver's proof."""
        with self._lock:
            if self._target is None:
                return
            self._target = None
            self._memory.close()  # raises BufferError if a view were left; then the socket must stay open
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._watcher:
            self._watcher.join()
        self._sock.close()

    def _watch(self) -> None:
        try:
            end = self._sock.recv(1)
        except OSError:
            end = b""
        if self._target is not None:
            reason = "closed by the receiver" if not end else "receiver sent unexpected data"
            self._on_lost(TransferError(f"shm link {reason}"))


class ShmInlet(UnseenInlet):
    """Receiver's end."""

    transport = "shm"

    def __init__(self, arena: Arena, key: bytes, events: Events) -> None:
        """Raises ConfigError when the arena is private or the host can't be identified."""
        if not arena.shared:
            raise ConfigError("transfer.transport=shm: the arena must be shared memory")
        if not host_id():
            raise ConfigError(
                "transfer.transport=shm: /proc is not readable, so peers can't tell whether they share a host"
            )
        self._address = f"baton-kv-{secrets.token_hex(8)}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind("\0" + self._address)
        self._arena = arena
        super().__init__(sock, key, arena.region, events)

    def offer(self) -> LinkOffer:
        """Abstract socket name and host identity."""
        return LinkOffer(transport="shm", address=self._address, host_id=host_id())

    def check_peer(self, sock: socket.socket) -> None:
        """The peer must run as the same user."""
        check_user(sock)

    def welcome(self, sock: socket.socket) -> None:
        """Pass the region's descriptor."""
        socket.send_fds(sock, [b"\0"], [self._arena.fileno()])

    def serve(self, sock: socket.socket, connection: int) -> bool:
        """Wait for the writer's end. Never cuts the connection itself: that would destroy the proof."""
        try:
            while sock.recv(64):
                self._events.refused("data")
        except ConnectionResetError:  # the writer is gone and had not read everything: the same proof
            return True
        return True


def check_user(sock: socket.socket) -> None:
    """Raises ProtocolError unless the other end of a unix socket runs as the same user."""
    _, uid, _ = _credentials(sock)
    if uid != os.geteuid():
        raise ProtocolError(f"peer runs as user {uid}, expected {os.geteuid()}")


def peer_pid(sock: socket.socket) -> int:
    """Process at the other end of a unix socket; 0 if it is in another PID namespace."""
    return _credentials(sock)[0]


def _credentials(sock: socket.socket) -> tuple[int, int, int]:
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    return pid, uid, gid


def _receive_descriptor(sock: socket.socket) -> int:
    size = array.array("i").itemsize
    data, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(size))
    descriptors = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(payload[: len(payload) - len(payload) % size])
    if not data or len(descriptors) != 1:
        raise TransferError("shm receiver passed no memory")
    return descriptors[0]


def _map_region(fd: int, region_bytes: int) -> mmap.mmap:
    try:
        size = os.fstat(fd).st_size
        if size < region_bytes:
            raise TransferError(f"shm region holds {size} bytes, the layout needs {region_bytes}")
        memory = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    finally:
        os.close(fd)
    memory.madvise(mmap.MADV_DONTFORK)
    with contextlib.suppress(OSError):  # Linux before 5.14: the first write to every page is slower
        memory.madvise(_MADV_POPULATE_WRITE)
    return memory
