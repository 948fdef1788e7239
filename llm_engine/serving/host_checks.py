"""What a host must offer before a worker spends time on weights: devices, addresses, ports, limits, clock.

Each check returns a few words about what it found, and raises ConfigError with one line that says what to change. The
ones in `advisory` are worth a line and keep nothing from starting.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import resource
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llm_engine.api.config import MIN_SECRET_CHARS, SECRET_ENV, ClusterConfig
from llm_engine.api.errors import ConfigError

Check = Callable[[ClusterConfig], str]

ACCELERATORS = ("npu", "triton")
HCCN_CONF = Path("/etc/hccn.conf")
SHM = Path("/dev/shm")
DAVINCI = Path("/dev")
_MIN_FILES = 4096
_MIN_SHM_BYTES = 256 << 20
_STA_UNSYNC = 0x40
_DIRECT_PORTS = ((8, 28_000), (16, 36_000))  # devices of a host → first port beside Ascend's direct transport
_ADDRESS = re.compile(r"^address_(\d+)=(\S+)", re.MULTILINE)


def devices(config: ClusterConfig) -> str:
    """The accelerator is there, and its driver can be loaded."""
    backend = config.engine.backend
    if backend not in ACCELERATORS:
        return f"{os.cpu_count()} CPUs"
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreted on the CPU"
    module: Any = importlib.import_module("torch")
    if backend == "npu":
        try:
            importlib.import_module("torch_npu")
        except (ImportError, OSError, RuntimeError) as exc:
            raise ConfigError(
                f"engine.backend=npu: torch_npu can't be loaded ({_line(exc)}); install CANN and the driver, or mount "
                "/usr/local/Ascend/driver and the davinci devices"
            ) from exc
    device = module.npu if backend == "npu" else module.cuda
    if not device.is_available():
        raise ConfigError(f"engine.backend={backend}: no device is visible; check the driver and the pod's resources")
    free, total = device.mem_get_info()
    return f"{device.device_count()} {backend} devices, {free >> 20} of {total >> 20} MiB free"


def address(config: ClusterConfig) -> str:
    """`worker.host` belongs to this host."""
    host = config.worker.host
    try:
        family, kind, proto, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.bind(where)
    except OSError as exc:
        raise ConfigError(
            f"worker.host={host}: not an address of this host ({exc.strerror}); set the one that other hosts reach, or "
            "BATON_HOST"
        ) from exc
    return host


def direct_ports(config: ClusterConfig) -> str:
    """On Ascend, fixed ports stay clear of those that the direct transport of the host's devices takes."""
    if config.engine.backend != "npu":
        return "no restriction"
    count = num_davinci()
    first = next((port for devices, port in _DIRECT_PORTS if count <= devices), _DIRECT_PORTS[-1][1])
    for name in ("request_port", "control_port", "metrics_port"):
        port = getattr(config.worker, name)
        if 0 < port < first:
            raise ConfigError(
                f"worker.{name}={port}: Ascend's direct transport uses ports below {first} on a host with {count} "
                f"devices; choose {first} or more"
            )
    return f"{first} and above"


def device_network(config: ClusterConfig) -> str:
    """On Ascend, /etc/hccn.conf names an address for every device."""
    if config.engine.backend != "npu":
        return "not needed"
    try:
        found = hccn_addresses(HCCN_CONF.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{HCCN_CONF}: {exc.strerror}; mount it from the host: HCCS and RoCE need it") from exc
    missing = sorted(set(range(num_davinci())) - found.keys())
    if missing:
        raise ConfigError(f"{HCCN_CONF}: no address_{missing[0]}; configure the device's network with hccn_tool")
    return f"{len(found)} device addresses"


def hccn_addresses(text: str) -> Mapping[int, str]:
    """Device → address of its network port."""
    return {int(device): address for device, address in _ADDRESS.findall(text)}


def num_davinci() -> int:
    """Ascend devices that this host or container shows."""
    return sum(re.fullmatch(r"davinci\d+", path.name) is not None for path in DAVINCI.glob("davinci*"))


def open_files(config: ClusterConfig) -> str:
    """Enough descriptors for the connections of a busy worker."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit < _MIN_FILES:
        raise ConfigError(f"open files: limited to {limit}; raise it to {_MIN_FILES} or more (ulimit -n)")
    return str(limit)


def shared_memory(config: ClusterConfig) -> str:
    """Room in /dev/shm for Ray and collective libraries. Caches are not in it."""
    try:
        free = shutil.disk_usage(SHM).free
    except OSError as exc:
        raise ConfigError(f"{SHM}: {exc.strerror}; mount a tmpfs there") from exc
    if free < _MIN_SHM_BYTES:
        raise ConfigError(
            f"{SHM}: {free >> 20} MiB free; give it {_MIN_SHM_BYTES >> 20} or more (an emptyDir with medium Memory, "
            "or docker run --shm-size)"
        )
    return f"{free >> 20} MiB free"


def clock(config: ClusterConfig) -> str:
    """The kernel thinks that its clock is right: timelines of several hosts are compared by it."""
    if unsynchronised():
        raise ConfigError("clock: not synchronised; run chrony or another NTP client on the host")
    return "synchronised"


def secret(config: ClusterConfig) -> str:
    """The cluster's key is set, as processes without `baton up` need it."""
    if len(os.environ.get(SECRET_ENV, "")) < MIN_SECRET_CHARS:
        raise ConfigError(f"{SECRET_ENV}: not set, or too short; `baton up` makes one, other ways of starting need it")
    return "set"


def unsynchronised() -> bool:
    """What adjtimex(2) says; False where it can't be asked."""
    buffer = (ctypes.c_long * 32)()  # struct timex with room to spare: modes, offset, freq, maxerror, esterror, status
    if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(buffer)) < 0:
        return False
    status = ctypes.cast(ctypes.byref(buffer, 5 * ctypes.sizeof(ctypes.c_long)), ctypes.POINTER(ctypes.c_int))
    return bool(status[0] & _STA_UNSYNC)


def _line(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:200]


required: Mapping[str, Check] = {
    "devices": devices,
    "address": address,
    "direct ports": direct_ports,
    "device network": device_network,
}
advisory: Mapping[str, Check] = {
    "open files": open_files,
    "shared memory": shared_memory,
    "clock": clock,
    "secret": secret,
}
