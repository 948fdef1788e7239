"""The few calls of NVIDIA's driver that torch does not offer: memory of another process, and copies into it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

from llm_engine.api.errors import TransferError

HANDLE_BYTES = 64  # of a CUipcMemHandle
_LAZY_PEER_ACCESS = 1
_NOT_SHARED = "memory that can't be shared: allocate it without expandable segments"
_HINTS = {("cuIpcGetMemHandle", 1): _NOT_SHARED}
_PEER_HINTS = {
    101: "the device is not visible here",
    201: "no context on the device",
    217: "the cards can't reach each other's memory",
    400: _NOT_SHARED,
    801: "not supported here: integrated device, or a container without IPC",
}


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


class Driver:
    """libcuda of this process. Every method but `version` works on the device bound last on the calling thread."""

    def __init__(self) -> None:
        """Raises TransferError that says what is missing."""
        try:
            self._lib = ctypes.CDLL("libcuda.so.1")
        except OSError as exc:
            raise TransferError(f"NVIDIA's driver is not installed ({exc})") from exc
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self._copy = self._lib.cuMemcpyAsync
        self._copy.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)
        self._call("cuInit", 0)
        version = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        self.version = version.value

    def bind(self, ordinal: int) -> None:
        """Make the primary context of a device current on this thread, as torch does."""
        context = self._contexts.get(ordinal)
        if context is None:
            device, context = ctypes.c_int(), ctypes.c_void_p()
            self._call("cuDeviceGet", ctypes.byref(device), ordinal)
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self._contexts[ordinal] = context
        self._call("cuCtxSetCurrent", context)

    def export(self, address: int) -> tuple[bytes, int, int]:
        """Handle of the allocation that holds an address, the address' offset in it, and its size."""
        base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
        self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), base)
        return bytes(handle.reserved), address - base.value, size.value

    def open(self, handle: bytes) -> int:
        """Map an allocation of another process; its address here."""
        address = ctypes.c_uint64()
        raw = _Handle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), raw, ctypes.c_uint(_LAZY_PEER_ACCESS))
        return address.value

    def close(self, address: int) -> None:
        """Unmap what `open` returned."""
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def copy(self, runs: Sequence[tuple[int, int, int]], stream: int) -> None:
        """Enqueue copies, each (to address, from address, bytes), ends on devices or in pinned memory of the host."""
        for target, source, num_bytes in runs:
            self._check("cuMemcpyAsync", self._copy(target, source, num_bytes, stream))

    def _call(self, name: str, *args: object) -> None:
        self._check(name, getattr(self._lib, name)(*args))

    def _check(self, name: str, code: int) -> None:
        if code != 0:
            text = ctypes.c_char_p()
            self._lib.cuGetErrorString(code, ctypes.byref(text))
            said = text.value.decode() if text.value else "unknown error"
            hint = _HINTS.get((name, code)) or _PEER_HINTS.get(code)
            raise TransferError(f"{name}: error {code}, {said}" + (f" ({hint})" if hint else ""))


@functools.cache
def driver() -> Driver:
    """The one of this process. Raises TransferError."""
    return Driver()
