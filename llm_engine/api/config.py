"""One frozen configuration tree, loaded in one place.

Values come from defaults, then a TOML file, then `key=value` overrides; secrets come from the environment only.
Every error is one line that names the key. `Resolved.sources` says where each value came from.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llm_engine.api.errors import ConfigError
from llm_engine.api.keys import ClusterKey

SECRET_ENV = "BATON_SECRET"
SECRET_ALSO_ENV = "BATON_SECRET_ALSO"
HOST_ENV = "BATON_HOST"
MIN_SECRET_CHARS = 16
HOST_KV_MB = 256


class Section(BaseModel):
    """Base of every section: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelConfig(Section):
    """Which checkpoint is served, and under which name."""

    path: Path
    name: str = ""  # "": the directory's name
    max_len: int | None = Field(None, ge=16)  # None: max_position_embeddings

    @property
    def served_name(self) -> str:
        return self.name or self.path.name


class EngineConfig(Section):
    """How the model is computed."""

    backend: Literal["cpu", "triton", "npu"] = "cpu"
    device: int = Field(0, ge=0)  # which of the accelerators that this process sees; no meaning with backend cpu
    # auto: fp32 on the CPU, bf16 on accelerators; fp8: bf16, with linear weights in fp8 blocks where they allow it
    dtype: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    numerics: Literal["exact", "fast"] = "exact"
    graphs: bool = True  # record decode passes at start, where the backend can
    threads: int = Field(1, ge=1)
    num_drafts: int = Field(1, ge=0, le=3)  # MTP drafts verified per step; 0: no speculation

    @model_validator(mode="after")
    def _can_compute(self) -> Self:
        if self.dtype == "fp8" and self.backend == "cpu":
            raise ValueError("dtype=fp8 needs an accelerator: set engine.dtype to fp32 or bf16 with engine.backend=cpu")
        return self

    @property
    def computed(self) -> Literal["fp32", "bf16", "fp8"]:
        """`dtype`, chosen."""
        if self.dtype != "auto":
            return self.dtype
        return "fp32" if self.backend == "cpu" else "bf16"


class KvConfig(Section):
    """The paged caches."""

    block_tokens: int = Field(16, ge=4, le=1024)
    num_blocks: int | None = Field(None, ge=8)  # None: sized from memory
    memory_mb: int | None = Field(None, ge=1)  # None: HOST_KV_MB in host memory, memory_fraction on a card
    memory_fraction: float = Field(0.85, gt=0, lt=1)  # of what a card has free beside weights and the largest pass
    staging_mb: int | None = Field(None, ge=1)  # decode: host memory on the way to a card; None: chosen
    format: Literal["auto", "fp8"] = "auto"  # of pages: auto: values as they are computed; fp8: on accelerators
    prefix_cache: bool = True

    @property
    def host_mb(self) -> int:
        """MiB of caches in host memory."""
        return HOST_KV_MB if self.memory_mb is None else self.memory_mb


class SchedulerConfig(Section):
    """Budgets of one engine step and bounds of its queues."""

    max_step_tokens: int = Field(256, ge=16)  # prefill rows a step
    max_num_seqs: int = Field(64, ge=1)
    max_waiting: int = Field(512, ge=1)


class TransferConfig(Section):
    """The hand-off between prefill and decode."""

    transport: Literal["auto", "local", "cuda_ipc", "shm", "tcp", "mooncake"] = "auto"
    mooncake_protocol: Literal["tcp", "rdma", "ascend"] = "tcp"  # rdma and ascend are also chosen by `auto`
    mooncake_device: str = ""  # a NIC's name; empty: the engine chooses
    # The receiver's counts. full: every byte; sampled: a line of every page; count: no bytes; auto: sampled on one host
    checksum: Literal["auto", "full", "sampled", "count"] = "auto"
    grant_timeout_s: float = Field(10.0, gt=0)  # Offer → Grant; afterwards the attempt fails with a retry elsewhere
    commit_timeout_s: float = Field(10.0, gt=0)  # last layer computed → Accepted
    max_pending: int = Field(256, ge=1)  # offers a receiver holds
    canary_period_s: float = Field(5.0, gt=0)


class WorkerConfig(Section):
    """Addresses and clocks of one worker process. Port 0: any free port."""

    host: str = "127.0.0.1"
    request_port: int = Field(0, ge=0, le=65535)
    control_port: int = Field(0, ge=0, le=65535)
    metrics_port: int = Field(0, ge=0, le=65535)
    heartbeat_s: float = Field(0.25, gt=0)
    peer_timeout_s: float = Field(3.0, gt=0)  # a silent router or peer is forgotten
    stall_timeout_s: float = Field(60.0, gt=0)  # a step that takes longer makes the worker unhealthy
    drain_timeout_s: float = Field(30.0, ge=0)  # after SIGTERM; what still runs then goes back to the routers


class RouterConfig(Section):
    """The HTTP edge and its policies. `workers`: static request-plane addresses, for use without a controller."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    processes: int = Field(1, ge=1)
    workers: tuple[str, ...] = ()
    membership: str = ""  # address of the controller's feed
    controller: str = ""  # its control channel, for /admin/pools; the controller tells its own router
    tenants_file: Path | None = None  # API keys and limits; None: everybody may use the API
    heartbeat_timeout_s: float = Field(2.0, gt=0)
    max_inflight: int = Field(1024, ge=1)
    max_queued: int = Field(1024, ge=0)
    queue_timeout_s: float = Field(30.0, gt=0)
    drain_timeout_s: float = Field(2.0, ge=0)  # SIGTERM: open requests get this long to finish
    request_timeout_s: float = Field(600.0, gt=0)
    max_attempts: int = Field(64, ge=1)
    max_body_bytes: int = Field(16 << 20, ge=1024)
    client_stall_s: float = Field(30.0, gt=0)  # a client that neither reads nor sends for so long is disconnected
    max_n: int = Field(16, ge=1)
    max_logprobs: int = Field(20, ge=0)


class ControllerConfig(Section):
    """Addresses and clocks of the controller. Port 0: any free port, kept over restarts."""

    host: str = "127.0.0.1"
    feed_port: int = Field(0, ge=0, le=65535)  # membership feed for routers
    control_port: int = Field(0, ge=0, le=65535)  # status, scale and drain
    metrics_port: int | None = Field(None, ge=0, le=65535)  # pool sizes for Prometheus; None: not served
    period_s: float = Field(0.5, gt=0)  # how often workers are asked and the complete membership is sent
    start_timeout_s: float = Field(120.0, gt=0)  # a worker that is not ready by then is started again


class PoolConfig(Section):
    """Desired size of one pool, and the bounds that every later change of it must keep."""

    replicas: int = Field(0, ge=0, le=1024)
    min_replicas: int = Field(0, ge=0, le=1024)
    max_replicas: int = Field(1024, ge=0, le=1024)
    cards: int = Field(1, ge=0)  # per replica, counted against autoscaler.max_cards
    cpus: float = Field(0.0, ge=0)  # Ray resources per replica
    resources: dict[str, float] = {}

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.min_replicas <= self.replicas <= self.max_replicas:
            raise ValueError(
                f"expected min_replicas <= replicas <= max_replicas, got {self.min_replicas} <= {self.replicas} "
                f"<= {self.max_replicas}"
            )
        return self


class PoolsConfig(Section):
    """Desired pools. Either prefill and decode, or aggregated, or all three."""

    prefill: PoolConfig = PoolConfig(replicas=1)
    decode: PoolConfig = PoolConfig(replicas=1)
    aggregated: PoolConfig = PoolConfig()


class AutoscalerConfig(Section):
    """When the controller changes pool sizes by itself. Latencies are 90th percentiles over `window_s`."""

    mode: Literal["off", "recommend", "act"] = "off"  # recommend: decide and log, change nothing
    router_metrics: tuple[str, ...] = ()  # http://host:port/metrics of routers; (): the controller's own
    max_cards: int | None = Field(None, ge=1)  # of all pools together; None: only the pools' own bounds count
    period_s: float = Field(5.0, gt=0)
    window_s: float = Field(30.0, gt=0)
    ttft_slo_s: float = Field(2.0, gt=0)
    tpot_slo_s: float = Field(0.05, gt=0)
    backlog_s: float = Field(1.0, gt=0)  # seconds of prefill work that may wait
    prefill_busy: float = Field(0.8, gt=0, le=1)  # share of time that prefill workers may compute
    decode_kv: float = Field(0.8, gt=0, le=1)  # share of decode blocks that may be in use
    decode_seqs: float = Field(0.9, gt=0, le=1)  # share of decode places that may be taken
    up_after_s: float = Field(10.0, ge=0)  # a pool is too small for so long before it grows
    down_after_s: float = Field(120.0, ge=0)  # too large for so long before it shrinks
    down_margin: float = Field(0.7, gt=0, lt=1)  # load that one replica less must stay below, relative to its target
    cooldown_s: float = Field(60.0, ge=0)  # after any change before a pool shrinks
    growth: float = Field(2.0, gt=1)  # most that a pool grows by at once, relative to its ready replicas


class ClusterConfig(Section):
    """The whole tree. One file serves every process of a cluster."""

    model: ModelConfig
    engine: EngineConfig = EngineConfig()
    kv: KvConfig = KvConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    transfer: TransferConfig = TransferConfig()
    worker: WorkerConfig = WorkerConfig()
    router: RouterConfig = RouterConfig()
    controller: ControllerConfig = ControllerConfig()
    pools: PoolsConfig = PoolsConfig()
    autoscaler: AutoscalerConfig = AutoscalerConfig()


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration and the origin of every value that is not a default: dotted key → "file …" or "override"."""

    config: ClusterConfig
    sources: Mapping[str, str]


def load(path: Path | None, overrides: Sequence[str] = ()) -> Resolved:
    """Read `path` (TOML) and apply `dotted.key=value` overrides (values in TOML syntax, bare words as strings).

    Raises ConfigError with one line that names the file or the key.
    """
    tree: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if path is not None:
        tree = _read_toml(path)
        sources.update(dict.fromkeys(_leaves(tree), f"file {path}"))
    for item in overrides:
        key, value = _parse_override(item)
        _assign(tree, key, value)
        sources[key] = "override"
    return Resolved(build(tree), sources)


def build(tree: Mapping[str, Any]) -> ClusterConfig:
    """Validate a plain tree. Raises ConfigError naming the first offending key."""
    try:
        return ClusterConfig.model_validate(dict(tree))
    except ValidationError as exc:
        first = exc.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        value = "" if first["type"] in ("missing", "extra_forbidden") else f"={first['input']!r}"
        raise ConfigError(f"{key}{value}: {first['msg'].lower()}") from exc


def cluster_key(environ: Mapping[str, str] = os.environ) -> ClusterKey:
    """The shared key of all planes, from BATON_SECRET, with BATON_SECRET_ALSO accepted while a secret is replaced.

    Raises ConfigError when one is unusable.
    """
    also = environ.get(SECRET_ALSO_ENV, "")
    if also and len(also) < MIN_SECRET_CHARS:
        raise ConfigError(f"{SECRET_ALSO_ENV}: expected at least {MIN_SECRET_CHARS} characters, or unset")
    secret = environ.get(SECRET_ENV, "")
    if len(secret) < MIN_SECRET_CHARS:
        raise ConfigError(
            f"{SECRET_ENV}: set it to the same random string of at least {MIN_SECRET_CHARS} characters on every process"
        )
    return ClusterKey(secret.encode()[:64], (also.encode()[:64],) if also else ())


def on_this_host(config: ClusterConfig, environ: Mapping[str, str] = os.environ) -> ClusterConfig:
    """The configuration with `worker.host` from BATON_HOST, for platforms that give each worker its own address."""
    host = environ.get(HOST_ENV, "")
    if not host:
        return config
    return config.model_copy(update={"worker": config.worker.model_copy(update={"host": host})})


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: not TOML: {exc}") from exc


def _parse_override(item: str) -> tuple[str, Any]:
    key, sep, text = item.partition("=")
    if not sep or not key:
        raise ConfigError(f"override {item!r}: expected section.key=value")
    try:
        return key, tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return key, text


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: {part} is a value, not a section")
    tree[leaf] = value


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, value in tree.items():
        keys.extend(_leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name])
    return keys
