"""From a configuration to an engine: read the model's shape, load weights, lay out the caches, build.

On the host the caches lie in memory that the worker's hand-off gives, so that peers reach them. On a card they are the
engine's own, sized from what is left beside weights and the largest pass; see `staging` for how they are handed on.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from llm_engine.api.config import ClusterConfig
from llm_engine.api.errors import ConfigError
from llm_engine.api.handoff import KvLayout
from llm_engine.api.messages import Role
from llm_engine.models.deepseek_v32 import CausalLM, build_model
from llm_engine.models.spec import ModelSpec
from llm_engine.ops.load import choose_device, load_ops
from llm_engine.ops.table import Ops
from llm_engine.runtime.engine import Engine
from llm_engine.runtime.kv_store import KvStore, format_id, page_dtype, plan_layout
from llm_engine.runtime.memory import MemoryReport, free_and_total, size_caches, taken, trial_pass
from llm_engine.runtime.recorded import Recorded
from llm_engine.runtime.weights import WeightStream
from llm_engine.sched import LayerSink
from llm_engine.serving import preflight
from llm_engine.serving.staging import Mirror, staging_layout

_log = logging.getLogger(__name__)

DEVICE_TRANSPORT = "cuda_ipc"  # reaches caches on a card where they lie
HostMemory = Callable[[int], memoryview]  # gives so many bytes of page-aligned memory that peers can reach


@dataclass(frozen=True, slots=True)
class Plan:
    """What is known before weights are read. `layout`: of caches on the host; on a card it depends on what is free."""

    spec: ModelSpec
    ops: Ops
    pages: torch.dtype
    layout: KvLayout | None
    with_mtp: bool

    @property
    def on_host(self) -> bool:
        """Whether the caches lie in host memory."""
        return self.ops.device.type == "cpu"


@dataclass(frozen=True, slots=True)
class Assembly:
    """An engine with the identity its caches have on the wire."""

    engine: Engine
    store: KvStore
    format_id: str
    weight_version: str
    slots: KvLayout | None = None  # of the host memory through which peers reach caches on a card
    mirror: Mirror | None = None  # between the two
    memory: MemoryReport | None = None  # None on the host

    @property
    def layout(self) -> KvLayout:
        """Of the engine's caches."""
        return self.store.layout


def plan(config: ClusterConfig, *, uses_control_port: bool) -> Plan:
    """Run the preflight checks, read the model's shape and choose kernels and pages. Raises ConfigError."""
    preflight.check(config, uses_control_port=uses_control_port)
    spec = ModelSpec.from_dir(config.model.path)
    engine = config.engine
    ops = load_ops(engine.backend, engine.numerics, engine.computed, engine.device)
    pages = page_dtype(spec, config.kv, engine.backend, ops.dtype)
    with_mtp = spec.num_mtp_layers > 0 and engine.num_drafts > 0
    if ops.device.type != "cpu":
        return Plan(spec, ops, pages, None, with_mtp)
    layout = plan_layout(spec, config.kv, pages, with_mtp=with_mtp)
    preflight.check_memory(layout.arena_bytes + preflight.checkpoint_bytes(config.model.path))
    return Plan(spec, ops, pages, layout, with_mtp)


def assemble(
    config: ClusterConfig, plan: Plan, host_memory: HostMemory, role: Role, on_layer: LayerSink | None = None
) -> Assembly:
    """Load weights and build the engine. Raises ConfigError.

    `host_memory` is called once if the caches lie there, or if peers may have to reach them through it.
    All of it happens on a thread that ends. OpenMP gives every thread that computes a team of its own, for as long as
    the thread lives; with a second team beside that of the step thread there are more threads than cores, and it stops
    spinning between products, which doubles the time of small ones.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="assemble", initializer=thread_setup(config)) as thread:
        return thread.submit(_assemble, config, plan, host_memory, role, on_layer).result()


def _assemble(
    config: ClusterConfig, plan: Plan, host_memory: HostMemory, role: Role, on_layer: LayerSink | None
) -> Assembly:
    started = time.monotonic()
    plan.ops.self_check()
    model, fingerprint = _load(config, plan)
    weights_s = time.monotonic() - started
    plan.ops.warm_up(config.scheduler.max_step_tokens)
    if plan.on_host:
        store, recorded, report = _on_host(plan, host_memory), None, None
    else:
        store, recorded, report = _on_device(config, plan, model, role)
        _log.info("%s", report)
    kernels, numerics = plan.ops.name, config.engine.numerics
    identity = format_id(plan.spec, fingerprint, store.layout, plan.pages, numerics, kernels)
    engine = Engine(
        config, model, store, role=role, format_id=identity, on_layer=on_layer, recorded=recorded, race=plan.ops.race
    )
    gc.collect()
    gc.freeze()  # weights and modules live as long as the process: the collector need not look at them again
    _log.info(
        "model %s ready after %.2f s (weights %.2f s) on %s, kernels %s, format %s",
        config.model.served_name, time.monotonic() - started, weights_s, plan.ops.device, kernels, identity,
    )  # fmt: skip
    slots, mirror = None, None
    if not plan.on_host and role is Role.DECODE and config.transfer.transport != DEVICE_TRANSPORT:
        slots = staging_layout(store.layout, config.kv, engine.max_len)
        mirror = Mirror(store, slots, torch.frombuffer(host_memory(slots.arena_bytes), dtype=torch.uint8), plan.ops)
    return Assembly(engine, store, identity, fingerprint, slots, mirror, report)


def use_threads(num_threads: int) -> None:
    """Threads of the kernels called from this thread (OpenMP keeps the number per calling thread)."""
    torch.set_num_threads(num_threads)


def thread_setup(config: ClusterConfig) -> Callable[[], None]:
    """What the step thread does first."""

    def prepare() -> None:
        use_threads(config.engine.threads)
        if config.engine.backend != "cpu":
            choose_device(config.engine.device)

    return prepare


def _load(config: ClusterConfig, plan: Plan) -> tuple[CausalLM, str]:
    """The model, and the fingerprint of its weights."""
    path, ops, device = config.model.path, plan.ops, plan.ops.device
    with WeightStream(path, plan.spec, ops.dtype, device, fp8_block=ops.fp8_block, with_mtp=plan.with_mtp) as stream:
        try:
            model = build_model(plan.spec, stream.weights, ops, config.model.max_len)
        except torch.OutOfMemoryError as exc:
            free, total = free_and_total(device)
            raise ConfigError(
                f"model.path={path}: the weights do not fit device {device}: {free >> 20} of {total >> 20} MiB are "
                "free; use another device or engine.dtype=fp8"
            ) from exc
        return model, stream.fingerprint()


def _on_host(plan: Plan, host_memory: HostMemory) -> KvStore:
    assert plan.layout is not None, "known for caches on the host"
    memory = torch.frombuffer(host_memory(plan.layout.arena_bytes), dtype=torch.uint8)
    return KvStore(plan.layout, memory, plan.pages)


def _on_device(
    config: ClusterConfig, plan: Plan, model: CausalLM, role: Role
) -> tuple[KvStore, Recorded | None, MemoryReport]:
    device = plan.ops.device
    weights = taken(device)
    smallest = config.kv.model_copy(update={"num_blocks": 8})
    trial = plan_layout(plan.spec, smallest, plan.pages, with_mtp=plan.with_mtp)
    most_drawn = config.scheduler.max_num_seqs * (1 + config.engine.num_drafts)
    rows = config.scheduler.max_step_tokens + most_drawn
    activations = trial_pass(model, trial, plan.pages, device, rows, most_drawn)
    layout = size_caches(config, plan.spec, plan.pages, device, activations, plan.with_mtp)
    try:
        store = KvStore.allocate(layout, plan.pages, device)
    except torch.OutOfMemoryError as exc:
        free, _ = free_and_total(device)
        raise ConfigError(
            f"kv.num_blocks={layout.num_blocks}: the caches need {layout.arena_bytes >> 20} MiB of the device, "
            f"{free >> 20} are free; lower kv.num_blocks, kv.memory_mb or kv.memory_fraction"
        ) from exc
    before, _ = free_and_total(device)
    recorded = _record(config, plan, model, store, role)
    free, total = free_and_total(device)
    report = MemoryReport(
        weights=weights,
        activations=activations,
        caches=layout.arena_bytes,
        graphs=max(before - free, 0),
        free=free,
        total=total,
    )
    return store, recorded, report


def _record(config: ClusterConfig, plan: Plan, model: CausalLM, store: KvStore, role: Role) -> Recorded | None:
    """Record the passes of decode, where that is wanted and the table can."""
    if role is Role.PREFILL or not config.engine.graphs or plan.ops.row_tile != 1:
        return None
    recorded = Recorded(
        model,
        store,
        plan.ops,
        num_drafts=config.engine.num_drafts if plan.with_mtp else 0,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_len=min(model.max_len, store.num_blocks * store.block_tokens),
    )
    recorded.prepare()
    return recorded
