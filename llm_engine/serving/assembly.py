"""From a configuration to an engine: read the model's shape, lay out the caches, load weights, build."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llm_engine.api.config import ClusterConfig
from llm_engine.api.handoff import KvLayout
from llm_engine.api.messages import Role
from llm_engine.models.deepseek_v32 import build_model
from llm_engine.models.spec import ModelSpec
from llm_engine.ops.load import load_ops
from llm_engine.ops.table import Ops
from llm_engine.runtime.engine import Engine
from llm_engine.runtime.kv_store import KvStore, format_id, plan_layout
from llm_engine.runtime.weights import load_weights
from llm_engine.sched import LayerSink
from llm_engine.serving import preflight

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is known before weights are read: enough to allocate the caches' arena."""

    spec: ModelSpec
    ops: Ops
    layout: KvLayout
    with_mtp: bool


@dataclass(frozen=True, slots=True)
class Assembly:
    """An engine with the identity its caches have on the wire."""

    engine: Engine
    layout: KvLayout
    format_id: str
    weight_version: str


def plan(config: ClusterConfig, *, uses_control_port: bool) -> Plan:
    """Run the preflight checks, read the model's shape and lay out the caches. Raises ConfigError."""
    preflight.check(config, uses_control_port=uses_control_port)
    spec = ModelSpec.from_dir(config.model.path)
    ops = load_ops(config.engine.backend, config.engine.numerics, config.engine.dtype)
    with_mtp = spec.num_mtp_layers > 0 and config.engine.num_drafts > 0
    layout = plan_layout(spec, config.kv, ops.dtype, with_mtp=with_mtp)
    preflight.check_memory(layout.arena_bytes + preflight.checkpoint_bytes(config.model.path))
    return Plan(spec, ops, layout, with_mtp)


def assemble(
    config: ClusterConfig, plan: Plan, buffer: memoryview, role: Role, on_layer: LayerSink | None = None
) -> Assembly:
    """Load weights and build the engine over `buffer` (`plan.layout.arena_bytes` of memory). Raises ConfigError."""
    started = time.monotonic()
    use_threads(config.engine.threads)
    plan.ops.self_check()
    weights = load_weights(config.model.path, plan.spec, plan.ops.dtype, with_mtp=plan.with_mtp)
    model = build_model(plan.spec, weights, plan.ops, config.model.max_len)
    store = KvStore(plan.layout, torch.frombuffer(buffer, dtype=torch.uint8), plan.ops.dtype)
    identity = format_id(plan.spec, weights.fingerprint, plan.layout, plan.ops.dtype, config.engine.numerics)
    engine = Engine(config, model, store, role=role, format_id=identity, on_layer=on_layer)
    gc.collect()
    gc.freeze()  # weights and modules live as long as the process: the collector need not look at them again
    _log.info("model %s ready after %.2f s, format %s", config.model.served_name, time.monotonic() - started, identity)
    return Assembly(engine, plan.layout, identity, weights.fingerprint)


def use_threads(num_threads: int) -> None:
    """Threads of the kernels called from this thread (OpenMP keeps the number per calling thread)."""
    torch.set_num_threads(num_threads)


def thread_setup(config: ClusterConfig) -> Callable[[], None]:
    """What the step thread does first."""
    return lambda: use_threads(config.engine.threads)
