"""The head pod's main process: Ray's head with the controller in it.

KubeRay passes the command that starts Ray in an environment variable; this process runs it, starts the controller as an
actor pinned to this node, and hands it the pools of the mounted configuration whenever they change. Routers and workers
are pods of their own. When Ray ends, so does this process; a lost controller is restarted by Ray.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from deploy import local_ray
from deploy.control import ConfigurePools, ControlClient, ControlRefused, ControlTimeout
from deploy.controller import Controller
from deploy.fleet import one_line
from deploy.kube.api import KubeApi
from deploy.kube.desired_map import DesiredMap
from deploy.rundir import DEFAULT_RUN_DIR, RunDir
from llm_engine.api.config import ClusterConfig, PoolsConfig, cluster_key, load
from llm_engine.api.errors import ConfigError, ServingError

_log = logging.getLogger(__name__)

RAY_COMMAND_ENV = "KUBERAY_GEN_RAY_START_CMD"
NAMESPACE_ENV = "BATON_NAMESPACE"
DESIRED_ENV = "BATON_DESIRED"  # name of the ConfigMap that holds the desired state; "": in the run directory
CONTAINER_LOG = "/proc/1/fd/1"  # what `kubectl logs` shows
_HEAD_RESOURCE = "node:__internal_head__"
_RAY_START_S = 120.0
_RAY_STOP_S = 20.0
_LOOK_S = 2.0


class KubeController(local_ray.ControllerActor):
    """The controller of a cluster whose routers are a Deployment and whose desired state is a ConfigMap."""

    def _controller(self) -> Controller:
        name = os.environ.get(DESIRED_ENV, "")
        store = DesiredMap(KubeApi(), os.environ[NAMESPACE_ENV], name) if name else None
        return Controller(self._config, RunDir(self._run_dir), self._launch_worker, None, store)

    def _log(self, name: str) -> str:
        return CONTAINER_LOG


def run(config_file: Path, run_dir: RunDir | None = None) -> int:
    """Run until Ray ends or a signal arrives; returns the exit code. Raises ServingError."""
    config = load(config_file).config
    cluster_key()
    command = os.environ.get(RAY_COMMAND_ENV, "")
    if not command:
        raise ConfigError(f"{RAY_COMMAND_ENV} is not set: this command belongs in the head of a RayCluster of KubeRay")
    run_dir = run_dir or RunDir(DEFAULT_RUN_DIR)
    run_dir.acquire()
    run_dir.create_secret()
    ray_head = subprocess.Popen(["/bin/bash", "-c", f"ulimit -n 65536; exec {command}"])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ray_head.terminate())
    try:
        _connect(ray_head)
        controller = local_ray.start_controller(config, run_dir.path, KubeController, resources={_HEAD_RESOURCE: 0.001})
        return _watch(ray_head, controller, _Configured(config_file, config), run_dir)
    finally:
        ray_head.terminate()
        try:
            ray_head.wait(_RAY_STOP_S)
        except subprocess.TimeoutExpired:
            ray_head.kill()
        run_dir.release()


class _Configured:
    """Pools of the mounted file, which the kubelet replaces a while after the ConfigMap has changed."""

    def __init__(self, file: Path, config: ClusterConfig) -> None:
        self._file = file
        self._told = config
        self._text = file.read_bytes()

    def changed(self) -> PoolsConfig | None:
        """The pools, if they differ from what `accepted` was told. A file that can't be read changes nothing."""
        try:
            text = self._file.read_bytes()
            if text == self._text:
                return None
            config = load(self._file).config
        except (OSError, ConfigError) as exc:
            _log.error("%s is not used: %s", self._file, exc)
            return None
        if config == self._told:
            return None
        if config.model_copy(update={"pools": self._told.pools}) != self._told:
            _log.warning("%s changed beyond its pools: that takes effect when the head restarts", self._file)
        self._text, self._told = text, config
        return config.pools


def _connect(ray_head: subprocess.Popen[bytes]) -> None:
    import ray

    deadline = time.monotonic() + _RAY_START_S
    while True:
        try:
            ray.init(address="auto", namespace=local_ray.NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
            return
        except (ConnectionError, RuntimeError, OSError, ValueError) as exc:
            if ray_head.poll() is not None:
                raise ServingError(f"Ray's head ended with status {ray_head.returncode}: its output is above") from exc
            if time.monotonic() > deadline:
                raise ServingError(f"Ray's head does not answer within {_RAY_START_S:g} s: {one_line(exc)}") from exc
        time.sleep(_LOOK_S / 4)


def _watch(ray_head: subprocess.Popen[bytes], controller: Any, configured: _Configured, run_dir: RunDir) -> int:
    pools: PoolsConfig | None = None
    while ray_head.poll() is None:
        if controller.done():
            error = controller.exception()
            raise ServingError(f"the controller ended: {'it was told to stop' if error is None else one_line(error)}")
        pools = configured.changed() or pools
        if pools is not None and _tell(pools, run_dir):
            pools = None
        time.sleep(_LOOK_S)
    return ray_head.returncode


def _tell(pools: PoolsConfig, run_dir: RunDir) -> bool:
    """Whether the controller has heard of the pools. It may be starting, or unable to store the desired state."""
    record = run_dir.control()
    if record is None:
        return False
    try:
        with ControlClient(record.control_addr, run_dir.key()) as client:
            client.ask(ConfigurePools(pools=pools.model_dump(mode="json")))
    except (ControlTimeout, ControlRefused) as exc:
        _log.warning("the new pool sizes are not in force yet: %s", exc)
        return False
    return True
