"""Run a command that dies with its parent: `python -m deploy.fate PARENT_PID COMMAND…`.

The kernel kills it when the parent's thread that started it ends. The mark survives exec, so the command needs to know
nothing of this, and no code runs between fork and exec of a process that has threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def bound_command(command: Sequence[str]) -> list[str]:
    """The argument vector that runs `command` bound to this process."""
    return [sys.executable, "-m", "deploy.fate", str(os.getpid()), *command]


def main(argv: Sequence[str]) -> None:
    """Bind to the parent and become the command; never returns."""
    parent, *command = argv
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != int(parent):  # it ended before the mark was set
        raise SystemExit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
