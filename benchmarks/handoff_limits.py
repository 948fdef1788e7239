"""What the link between the two processes of the hand-off benchmark can do at best: plain copies, nothing else."""

from __future__ import annotations

import base64
import mmap
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec
import numpy as np

if TYPE_CHECKING:
    from kv_transfer.device import DeviceRegion

_CHUNK = 1 << 20  # sent at once by a plain socket copy: larger ones leave the cache between the two system calls
_RECEIVED = {"socket": 1 << 20, "socket_short": 128 << 10}  # at once, at most: shorter ones may be faster
_ORDER = struct.Struct("<QI")  # bytes to come, and how many to receive at once


class Rate(NamedTuple):
    """One plain copy: GB/s, and seconds of this process' CPU."""

    gb_per_s: float
    cpu_s: float


class Limit(Protocol):
    """A plain copy between the same two processes."""

    name: str

    def rate(self, num_bytes: int) -> Rate:
        """Copy so many bytes from the source into the receiver's pool, once."""
        ...


class MemoryLimit:
    """memcpy into the receiver's memory, in pieces as long as a hand-off's longest contiguous run."""

    name = "memcpy"

    def __init__(self, source: memoryview, hello: dict[str, Any], run_bytes: int) -> None:
        self._source = np.frombuffer(source, np.uint8)
        self._run_bytes = run_bytes
        with open(f"/proc/{hello['pid']}/fd/{hello['fd']}", "r+b") as file:
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            self._target = np.frombuffer(mmap.mmap(file.fileno(), len(source), flags=flags), np.uint8)
        self.rate(len(source))  # the first write to every page is slower

    def rate(self, num_bytes: int) -> Rate:
        """See Limit."""
        started, cpu = time.monotonic(), time.process_time()
        for first in range(0, num_bytes, self._run_bytes):
            last = min(first + self._run_bytes, num_bytes)
            np.copyto(self._target[first:last], self._source[first:last])
        return Rate(num_bytes / (time.monotonic() - started) / 1e9, time.process_time() - cpu)


class SocketLimit:
    """One plain TCP connection over the same loopback: sendall here, recv_into the pool there, one byte back."""

    def __init__(self, name: str, source: memoryview, sock: socket.socket) -> None:
        self.name = name
        self._source = source
        self._sock = sock

    @classmethod
    def each(cls, source: memoryview, hello: dict[str, Any]) -> list[Limit]:
        """One for every way to receive."""
        sock = socket.create_connection(("127.0.0.1", hello["port"]))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return [cls(name, source, sock) for name in _RECEIVED]

    def rate(self, num_bytes: int) -> Rate:
        """See Limit."""
        started, cpu = time.monotonic(), time.process_time()
        self._sock.sendall(_ORDER.pack(num_bytes, _RECEIVED[self.name]))
        for first in range(0, num_bytes, _CHUNK):
            self._sock.sendall(self._source[first : min(first + _CHUNK, num_bytes)])
        if not self._sock.recv(1):
            raise ConnectionError("the receiver of the plain copy is gone")
        return Rate(num_bytes / (time.monotonic() - started) / 1e9, time.process_time() - cpu)


class SocketSink:
    """Receiver's end of SocketLimit, in a thread."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._listener.close()

    def _serve(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # closed
            return
        with sock:
            while head := sock.recv(_ORDER.size, socket.MSG_WAITALL):
                done, (num_bytes, most) = 0, _ORDER.unpack(head)
                while done < num_bytes:
                    done += sock.recv_into(self._memory[done : min(done + most, num_bytes)])
                sock.sendall(b"k")


class DeviceLimit:
    """One copy by the card's copy engine into the receiver's memory, mapped here."""

    name = "copy_engine"

    def __init__(self, source: DeviceRegion, hello: dict[str, Any]) -> None:
        from kv_transfer.cuda import driver
        from kv_transfer.device import Descriptor

        descriptor = msgspec.msgpack.decode(base64.b64decode(hello["device"]), type=Descriptor)
        driver().bind(source.ordinal)
        self._source = source
        self._target = driver().open(descriptor.handle) + descriptor.offset
        self.rate(source.num_bytes)

    def rate(self, num_bytes: int) -> Rate:
        """See Limit."""
        from kv_transfer.cuda import driver

        stream = self._source.stream
        assert stream is not None
        driver().bind(self._source.ordinal)
        self._source.synchronize()
        started, cpu = time.monotonic(), time.process_time()
        driver().copy([(self._target, self._source.memory.data_ptr(), num_bytes)], stream.cuda_stream)
        self._source.synchronize()
        return Rate(num_bytes / (time.monotonic() - started) / 1e9, time.process_time() - cpu)
