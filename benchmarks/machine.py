"""The machine that numbers come from."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine() -> str:
    """A name for this machine's processor."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores"


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has used, in steps of the kernel's clock tick (10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
