"""`baton preflight`: what a worker checks before it loads weights, one readable line each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deploy.cli import EXIT_OK, EXIT_USAGE
from llm_engine.api.config import ClusterConfig, on_this_host
from llm_engine.api.errors import ConfigError
from llm_engine.serving import host_checks
from llm_engine.serving.host_checks import Check
from llm_engine.serving.preflight import (
    available_memory,
    check_checkpoint,
    check_memory,
    checkpoint_bytes,
    hold_ports,
)

_WIDTH = 14


def run(config: ClusterConfig, role: str, say: Callable[[str], None]) -> int:
    """Run every check, also after a failure: all that is wrong should show at once. Returns the exit code."""
    config = on_this_host(config)
    checks = {**_checks(role), **host_checks.required} if role != "router" else {"checkpoint": _files}
    failed = sum([_shown("FAIL", name, check, config, say) for name, check in checks.items()])
    for name, check in host_checks.advisory.items():
        _shown("warn", name, check, config, say)
    return EXIT_USAGE if failed else EXIT_OK


def _shown(verdict: str, name: str, check: Check, config: ClusterConfig, say: Callable[[str], None]) -> bool:
    """Print one line; True when the check did not pass."""
    try:
        found = check(config)
    except ConfigError as exc:
        say(f"{verdict}  {name.ljust(_WIDTH)}  {exc}")
        return True
    say(f"ok    {name.ljust(_WIDTH)}  {found}")
    return False


def _checks(role: str) -> Mapping[str, Check]:
    def ports(config: ClusterConfig) -> str:
        hold_ports(config.worker, uses_control_port=role != "prefill").close()
        fixed = [port for port in (config.worker.request_port, config.worker.metrics_port) if port]
        return ", ".join(map(str, fixed)) or "any free ones"

    return {"checkpoint": _weights, "memory": _memory, "ports": ports}


def _weights(config: ClusterConfig) -> str:
    check_checkpoint(config.model.path)
    return f"{config.model.path}: {checkpoint_bytes(config.model.path) >> 20} MiB of weights"


def _files(config: ClusterConfig) -> str:
    for name in ("config.json", "tokenizer.json"):
        if not (config.model.path / name).is_file():
            raise ConfigError(f"model.path={config.model.path}: {name} is missing or not readable")
    return f"{config.model.path}: what a router needs is there"


def _memory(config: ClusterConfig) -> str:
    """Of the host: on accelerators weights and caches are on the device, which `devices` looks at."""
    if config.engine.backend == "cpu":
        check_memory((config.kv.host_mb << 20) + checkpoint_bytes(config.model.path))
    return f"{available_memory() >> 20} MiB free"
