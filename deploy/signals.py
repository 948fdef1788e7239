"""The signals that end `baton up`. They end a pause, and cut nothing in the middle.

An exception thrown wherever the main thread happens to be can leave a socket open that a later clean-up waits for, or
be swallowed by a finalizer: so the handler only leaves a byte, and `pause` is where it counts.
"""

from __future__ import annotations

import os
import select
import signal
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """A context manager of the main thread. SIGINT, SIGTERM and SIGHUP interrupt its pauses."""

    def __enter__(self) -> Signals:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._previous = {signum: signal.getsignal(signum) for signum in _SIGNALS}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        os.close(self._reader)
        os.close(self._writer)

    def install(self) -> None:
        """Take the signals (again, after a library has put its own handlers in place)."""
        for signum in _SIGNALS:
            signal.signal(signum, self._handle)

    def pause(self, seconds: float) -> None:
        """Wait. Raises KeyboardInterrupt at once when a signal comes, or has come at any time before."""
        if select.select([self._reader], [], [], seconds)[0]:
            raise KeyboardInterrupt

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        try:
            os.write(self._writer, b"!")
        except BlockingIOError:  # thousands have come already
            return
