"""Ray on this machine: started and stopped with the cluster, bound to loopback, closed to other users.

Ray 2.60 binds every listener to the node's address, or to all interfaces, and replaces 127.0.0.1 by the machine's own
address. Only the switch it ships for desktop systems (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0: "local only") keeps every
socket on loopback; it is read when ray is imported. Token authentication, with a token derived from the cluster's
secret, keeps other users of the machine out. Both reach Ray's processes through the environment, never a command line.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from deploy.actors import RouterActor, RouterReport, WorkerActor, WorkerReport, redirect_output
from deploy.desired import pool_of
from deploy.rundir import RunDir
from llm_engine.api.config import SECRET_ENV, ClusterConfig, load
from llm_engine.api.errors import ServingError

if TYPE_CHECKING:
    from deploy.controller import Controller

NAMESPACE = "baton"
CONTROLLER = "controller"
ROUTER = "router"
HEAD_RESOURCE = "node:__internal_head__"
RAY_FILES = "ray"  # Ray opens this directory to everybody; the private one above it keeps them out
_WORKER_PREFIX = "worker:"
_POLL_S = 0.2
_OBJECT_STORE_BYTES = 80 << 20  # Ray's least: no object of ours is ever put there


def set_environment(secret: str, ray_dir: Path) -> None:
    """Prepare this process and all that it starts. Call before ray is imported."""
    token = hashlib.blake2b(secret.encode(), digest_size=32, person=b"ray-token").hexdigest()
    os.environ.update(
        {
            SECRET_ENV: secret,
            "TMPDIR": str(ray_dir),  # so that no killed process leaves a temporary file
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_prestart_worker_first_driver": "0",  # no idle process per core
            "AUTOSCALER_METRIC_PORT": "0",  # fixed ports otherwise: two clusters on one machine would collide
            "DASHBOARD_METRIC_PORT": "0",
        }
    )
    for name in ("RAY_ADDRESS", "RAY_NAMESPACE", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        os.environ.pop(name, None)  # another cluster of the user's must not be joined


def start(ray_dir: Path) -> None:
    """Start Ray with its files below `ray_dir`. Its processes die with this thread."""
    try:
        import ray
    except ModuleNotFoundError as exc:
        raise ServingError("Ray is not installed: install Baton with its `cluster` extra") from exc
    try:
        ray.init(
            address="local",
            namespace=NAMESPACE,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=str(ray_dir / RAY_FILES),
        )
    except (RuntimeError, ConnectionError, OSError, ValueError) as exc:
        raise ServingError(f"Ray does not start: {' '.join(str(exc).split())}") from exc


def stop() -> None:
    """End every process of the Ray that this process started."""
    import ray

    ray.shutdown()


def start_controller(
    config: ClusterConfig, run_dir: Path, kind: type[ControllerActor] | None = None, **resources: Any
) -> Any:
    """Create the controller; returns a concurrent future that ends when the controller has stopped, or broken."""
    import ray

    options = _actor_options(CONTROLLER, num_cpus=0, **resources)
    remote: Any = ray.remote(kind or ControllerActor).options(**options)
    return remote.remote(config.model_dump_json(), str(run_dir)).run.remote().future()


def remove_controller(timeout_s: float) -> None:
    """End a controller that Ray has kept over a restart of its head: it has the configuration of the one before.

    Workers stay, and the next controller finds them by name. Raises ServingError when it does not go.
    """
    import ray

    deadline = time.monotonic() + timeout_s
    while True:
        try:
            ray.kill(ray.get_actor(CONTROLLER, NAMESPACE), no_restart=True)
        except ValueError:  # there is none (any more)
            return
        if time.monotonic() > deadline:
            raise ServingError(f"the controller of the head before this one did not end within {timeout_s:g} s")
        time.sleep(_POLL_S)


class ControllerActor:
    """The controller in its Ray process."""

    worker_kind: ClassVar[type[WorkerActor]] = WorkerActor  # what it starts

    def __init__(self, config_json: str, run_dir: str) -> None:
        self._run_dir = Path(run_dir)
        redirect_output(Path(self._log(CONTROLLER)))
        known = RunDir(self._run_dir)  # a controller before this one may have rolled out another configuration
        restarted = known.control() is not None
        self._config = load(known.config).config if restarted else ClusterConfig.model_validate_json(config_json)

    async def run(self) -> None:
        """Reconcile until stopped."""
        await self._controller().run(_living_workers())

    def _controller(self) -> Controller:
        from deploy.controller import Controller

        return Controller(self._config, RunDir(self._run_dir), self._launch_worker, self._launch_router)

    def _launch_worker(self, name: str, revision: int, config: ClusterConfig) -> RayHandle:
        pool = getattr(config.pools, pool_of(name))
        resources = dict(pool.resources)
        gpus = resources.pop("GPU", 0)  # Ray knows this one by an option of its own
        actor = f"{_WORKER_PREFIX}{name}@{revision}"
        options = _actor_options(actor, num_cpus=pool.cpus, num_gpus=gpus, resources=resources)
        return RayHandle(self.worker_kind, options, config.model_dump_json(), pool_of(name), name, self._log(name))

    def _launch_router(self) -> RayHandle:
        config_file = str(self._run_dir / "config.toml")
        options = _actor_options(ROUTER, num_cpus=0, resources={HEAD_RESOURCE: 0.001})  # other nodes come and go
        return RayHandle(RouterActor, options, config_file, self._log(ROUTER))

    def _log(self, name: str) -> str:
        return str(self._run_dir / "logs" / f"{name}.log")


class RayHandle:
    """A named actor: the living one of that name, or a new one. Results are futures of the running loop."""

    def __init__(self, kind: type[WorkerActor | RouterActor], options: dict[str, Any], *args: str) -> None:
        import ray

        self._actor: Any = ray.remote(kind).options(**options).remote(*args)
        self._kind: type[WorkerReport] | type[RouterReport] = (
            WorkerReport if issubclass(kind, WorkerActor) else RouterReport
        )

    def run(self) -> asyncio.Future[None]:
        return _future(self._actor.run.remote())

    def report(self) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self._decoded(self._actor.report.remote()))

    async def _decoded(self, reference: Any) -> WorkerReport | RouterReport:
        report: WorkerReport | RouterReport = msgspec.json.decode(await reference, type=self._kind)
        return report

    def stop(self, limit_s: float) -> asyncio.Future[None]:
        return _future(self._actor.stop.remote(limit_s))

    def kill(self, *, restart: bool) -> None:
        import ray

        ray.kill(self._actor, no_restart=not restart)


def _future(reference: Any) -> asyncio.Future[Any]:
    """A Ray object reference as a future of the running loop."""
    future: asyncio.Future[Any] = asyncio.ensure_future(reference)
    return future


def _actor_options(name: str, **resources: Any) -> dict[str, Any]:
    return {
        "name": name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "max_task_retries": -1,
        **resources,
    }


def _living_workers() -> dict[str, int]:
    """Worker → revision: a controller that starts over learns from the names of the actors which are old."""
    from ray.util import list_named_actors

    names = [entry["name"] for entry in list_named_actors(all_namespaces=True) if entry["namespace"] == NAMESPACE]
    found: dict[str, int] = {}
    for name in sorted(names):
        worker, _, revision = name.removeprefix(_WORKER_PREFIX).partition("@")
        if name.startswith(_WORKER_PREFIX):
            found[worker] = max(int(revision), found.get(worker, 0))
    return found
