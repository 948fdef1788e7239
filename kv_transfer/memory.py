"""Arenas: the flat byte regions that hold a worker's caches and that peers write into.

A shared arena is a sealed memfd. It has no name in any file system, so nothing is left behind however its processes
end. Links pass its descriptor over a unix socket (SCM_RIGHTS).
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
from types import TracebackType
from typing import Self

from llm_engine.api.errors import ConfigError, TransferError

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Arena:
    """`num_bytes` of zeroed memory, page aligned.

    `region` names the arena for this incarnation of the process; peers address memory as (region, offset, length).
    """

    def __init__(self, memory: mmap.mmap, fd: int | None) -> None:
        self.region = secrets.token_hex(8)
        self.num_bytes = len(memory)
        self._memory: mmap.mmap | None = memory
        self._fd = fd

    @classmethod
    def create(cls, num_bytes: int, *, shared: bool, populate: bool = True) -> Self:
        """Allocate. `shared`: other processes of the host can be given the memory (shm links need that).

        `populate`: the pages exist from the start; otherwise each from its first use on. Raises ConfigError when the
        system refuses the memory.
        """
        if num_bytes <= 0:
            raise ConfigError(f"arena of {num_bytes} bytes: expected a positive size")
        fd: int | None = None
        eager = mmap.MAP_POPULATE if populate else 0
        try:
            if shared:
                fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                os.ftruncate(fd, num_bytes)
                # Nobody who holds the descriptor can shrink the file under the mapping (that would be a SIGBUS here).
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
                memory = mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | eager)
            else:
                memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | eager)
        except OSError as exc:
            if fd is not None:
                os.close(fd)
            raise ConfigError(
                f"arena of {num_bytes} bytes: {exc.strerror}; lower kv.memory_mb or kv.num_blocks"
            ) from exc
        return cls(memory, fd)

    @property
    def shared(self) -> bool:
        """Whether `fileno` can be passed to another process."""
        return self._fd is not None

    @property
    def buffer(self) -> memoryview:
        """Writable view of all bytes (`torch.frombuffer(arena.buffer, dtype=torch.uint8)`)."""
        if self._memory is None:
            raise TransferError("arena is closed")
        return memoryview(self._memory)

    def fileno(self) -> int:
        """Descriptor of a shared arena. Raises ConfigError for a private one."""
        if self._fd is None:
            raise ConfigError("arena is private memory: create it with shared=True to use the shm transport")
        return self._fd

    def close(self) -> None:
        """Close the descriptor and drop the mapping; the memory goes back when its last view is gone."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        memory, self._memory = self._memory, None
        if memory is not None:
            with contextlib.suppress(BufferError):  # views exist: the mapping ends with the last of them
                memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
