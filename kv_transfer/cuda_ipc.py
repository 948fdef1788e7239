"""cuda_ipc: the writer maps the receiver's device memory and enqueues copies straight into its blocks.

Both ends are on one host, on one card or on cards that reach each other's memory. The receiver listens on an abstract
unix socket, checks the peer's user and the cluster key, and passes the driver's handle of its memory.

**What proves that a writer has stopped.** Copies run on the card after the call that enqueued them has returned, so the
end of the socket alone proves nothing. A writer that lives waits for its stream, unmaps the memory and says goodbye:
goodbye and end of file together are a proof. For a writer that died it is the end of its process (a pidfd): by then
the kernel has run the release of all its files, and with that of the driver's files its work on the card has ended. A
stopped process keeps both, so its blocks stay in quarantine. A child forked from a writer after it opened its card
would keep the driver's files open; workers start no such children.

The receiver can't see what lands, hence the fence protocol and the manifest's checksums, computed on the card.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import msgspec
import torch

from kv_transfer.auth import HANDSHAKE_TIMEOUT_S, Handshake
from kv_transfer.cuda import driver
from kv_transfer.device import Descriptor, DeviceRegion, Mark, missing, place_id
from kv_transfer.device_copies import PeerMemory, push_blocks
from kv_transfer.layout import CopyPlan
from kv_transfer.link import Copy, LeaseKey, Sent, all_landed, no_news
from kv_transfer.listener import Events, UnseenInlet
from kv_transfer.shm import check_user, peer_pid
from llm_engine.api.errors import ConfigError, LeaseRevoked, ProtocolError, TransferError
from llm_engine.api.handoff import LinkOffer

_LENGTH = struct.Struct("<H")
_MAX_DESCRIPTOR = 4096
_GOODBYE = b"q"
_LOOK_MS = 500


class CudaIpcLink:
    """Writer's end."""

    transport = "cuda_ipc"

    def __init__(
        self,
        sock: socket.socket,
        region: DeviceRegion,
        mapping: int,
        descriptor: Descriptor,
        on_lost: Callable[[TransferError], None],
    ) -> None:
        """`mapping`: address here of the receiver's allocation."""
        self._sock = sock
        self._region = region
        self._mapping = mapping
        self._num_bytes = descriptor.num_bytes
        self._target = PeerMemory(mapping + descriptor.offset)
        self._on_lost = on_lost
        self._lock = threading.Lock()  # held while copies are enqueued
        self._closed = False
        self._watcher = threading.Thread(target=self._watch, name="kv-cuda-watch", daemon=True)
        self._watcher.start()

    @classmethod
    def connect(
        cls,
        offer: LinkOffer,
        key: bytes,
        source: DeviceRegion,
        *,
        ticket: str,
        region: str,
        region_bytes: int,
        on_lost: Callable[[TransferError], None],
    ) -> CudaIpcLink:
        """Map the receiver's region on the card of `source`. Blocks for at most a few seconds. Raises TransferError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(HANDSHAKE_TIMEOUT_S)
            sock.connect("\0" + offer.address)
            check_user(sock)
            Handshake(sock, key).introduce(transport="cuda_ipc", ticket=ticket, region=region)
            descriptor = _receive_descriptor(sock)
            descriptor.check(region_bytes)
            _check_reach(source, descriptor)
            sock.settimeout(None)
            driver().bind(source.ordinal)
            mapping = driver().open(descriptor.handle)
        except BaseException as exc:
            with contextlib.suppress(OSError):
                sock.sendall(_GOODBYE)  # nothing is mapped
            sock.close()
            if isinstance(exc, OSError | ProtocolError):
                raise TransferError(f"cuda_ipc connection to {offer.address} failed: {exc}") from exc
            raise
        return cls(sock, source, mapping, descriptor, on_lost)

    def push(
        self,
        lease: LeaseKey,
        plan: CopyPlan,
        layers: range,
        blocks: tuple[Sequence[int], Sequence[int]],
        ready: Mark,
        stopped: Callable[[], bool],
    ) -> int:
        """Enqueue copies of `blocks` (here, there) of some layers, once the card has reached `ready`; their bytes.

        `finish` waits for them, or for those before a `mark`. Raises LeaseRevoked once `stopped()` is true,
        TransferError when the link is broken.
        """
        with self._lock:
            self._check_open(lease, stopped)
            return push_blocks(self._region, self._target, plan, layers, *blocks, ready)

    def mark(self) -> Mark:
        """The end of everything that was enqueued so far."""
        return self._region.copied()

    def finish(self, mark: Mark = None) -> None:
        """Wait until everything enqueued (before `mark`) has landed. Raises TransferError if the card failed."""
        try:
            if mark is None:
                self._region.synchronize()
            else:
                self._region.wait(mark)
        except RuntimeError as exc:
            raise TransferError(f"cuda_ipc link broken: {exc}") from exc

    def write(
        self,
        lease: LeaseKey,
        source: memoryview,
        copies: Sequence[Copy],
        stopped: Callable[[], bool],
        sent: Sent = no_news,
    ) -> None:
        """See Link.write: bytes of host memory, by way of the card (probes)."""
        if any(copy.target < 0 or copy.target + copy.num_bytes > self._num_bytes for copy in copies):
            raise ProtocolError("a copy ends outside the receiver's region")
        with self._lock:
            self._check_open(lease, stopped)
            with self._region.copying():
                staged = torch.frombuffer(bytearray(source), dtype=torch.uint8).to(self._region.device)
            stream, base, to = self._region.stream, staged.data_ptr(), self._target.address
            assert stream is not None
            driver().bind(self._region.ordinal)
            driver().copy([(to + c.target, base + c.source, c.num_bytes) for c in copies], stream.cuda_stream)
            self.finish()
        for index, copy in enumerate(copies):
            sent(index, 0, copy.num_bytes)

    def confirm(self, lease: LeaseKey) -> Future[int | None]:
        """`write` and `finish` return when everything has landed."""
        return all_landed()

    def close(self) -> None:
        """Wait for the card, unmap, say goodbye: in this order, because goodbye is the receiver's proof."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with contextlib.suppress(TransferError, OSError):  # without goodbye the proof is the end of this process
                self.finish()
                driver().bind(self._region.ordinal)
                driver().close(self._mapping)
                self._sock.sendall(_GOODBYE)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._watcher:
            self._watcher.join()
        self._sock.close()

    def _check_open(self, lease: LeaseKey, stopped: Callable[[], bool]) -> None:
        if stopped():
            raise LeaseRevoked(f"lease {lease.lease_id}: stopped")
        if self._closed:
            raise TransferError("cuda_ipc link is closed")

    def _watch(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.recv(1)
        if not self._closed:
            self._on_lost(TransferError("cuda_ipc link closed by the receiver"))


class CudaIpcInlet(UnseenInlet):
    """Receiver's end."""

    transport = "cuda_ipc"

    def __init__(self, region: DeviceRegion, key: bytes, events: Events) -> None:
        """Raises ConfigError when peers can't map the region."""
        if reason := missing(region):
            raise ConfigError(f"transfer.transport=cuda_ipc: {reason}")
        self._descriptor = msgspec.msgpack.encode(region.describe())
        self._address = f"baton-kv-{secrets.token_hex(8)}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind("\0" + self._address)
        super().__init__(sock, key, region.region, events)

    def offer(self) -> LinkOffer:
        """Abstract socket name and the place that both ends must share."""
        return LinkOffer(transport="cuda_ipc", address=self._address, host_id=place_id())

    def check_peer(self, sock: socket.socket) -> None:
        """The peer must run as the same user, where its end can be seen."""
        check_user(sock)
        if peer_pid(sock) <= 0:
            raise ProtocolError("peer is in another PID namespace, so its end can't be seen")

    def welcome(self, sock: socket.socket) -> None:
        """Pass the region's handle."""
        sock.sendall(_LENGTH.pack(len(self._descriptor)) + self._descriptor)

    def serve(self, sock: socket.socket, connection: int) -> bool:
        """Wait for goodbye, or for the end of the writer's process."""
        process = os.pidfd_open(peer_pid(sock))  # alive, or unheard of: then the connection has ended as well
        try:
            last = b""
            while data := sock.recv(64):
                last = data
            return last == _GOODBYE or self._wait_for_end(process)
        finally:
            os.close(process)

    def _wait_for_end(self, process: int) -> bool:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        while not self._closing.is_set():
            if poll.poll(_LOOK_MS):
                return True
        return False


def _check_reach(source: DeviceRegion, descriptor: Descriptor) -> None:
    """Raises TransferError if the writer's card is known not to reach the receiver's."""
    if descriptor.driver != driver().version:
        raise TransferError(f"cuda_ipc: driver {driver().version} here, {descriptor.driver} at the receiver")
    for ordinal in range(torch.cuda.device_count()):
        is_target = str(torch.cuda.get_device_properties(ordinal).uuid) == descriptor.device
        if is_target and ordinal != source.ordinal and not torch.cuda.can_device_access_peer(source.ordinal, ordinal):
            raise TransferError(f"cuda_ipc: card {source.uuid} has no peer access to {descriptor.device}")


def _receive_descriptor(sock: socket.socket) -> Descriptor:
    (length,) = _LENGTH.unpack(_receive_exactly(sock, _LENGTH.size))
    if not 0 < length <= _MAX_DESCRIPTOR:
        raise ProtocolError(f"device descriptor of {length} bytes, at most {_MAX_DESCRIPTOR} expected")
    try:
        return msgspec.msgpack.decode(_receive_exactly(sock, length), type=Descriptor)
    except msgspec.MsgspecError as exc:
        raise ProtocolError(f"malformed device descriptor: {exc}") from exc


def _receive_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise ConnectionResetError("receiver passed no memory")
        data += part
    return data
