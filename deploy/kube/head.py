"""The head pod's main process: Ray's head with the controller in it.

KubeRay passes the command that starts Ray in an environment variable; this process runs it, starts the controller as an
actor pinned to this node, and tells it when the mounted configuration changes: new pool sizes, or new settings of
workers, which are then replaced one by one. Routers and workers are pods of their own. When Ray ends, so does this
process; a lost controller is restarted by Ray. With GCS fault tolerance, where Ray keeps its tables elsewhere, workers
outlive this pod: the controller of the next one takes them over.
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
from deploy.control import ConfigurePools, ControlClient, ControlRefused, ControlTimeout, RollOut
from deploy.controller import Controller
from deploy.fleet import one_line
from deploy.kube.api import KubeApi
from deploy.kube.desired_map import DesiredMap
from deploy.rollout import worker_settings
from deploy.rundir import DEFAULT_RUN_DIR, RunDir
from llm_engine.api.config import ClusterConfig, cluster_key, load
from llm_engine.api.errors import ConfigError, ServingError

_log = logging.getLogger(__name__)

RAY_COMMAND_ENV = "KUBERAY_GEN_RAY_START_CMD"
NAMESPACE_ENV = "BATON_NAMESPACE"
DESIRED_ENV = "BATON_DESIRED"  # name of the ConfigMap that holds the desired state; "": in the run directory
CONTAINER_LOG = "/proc/1/fd/1"  # what `kubectl logs` shows
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
        local_ray.remove_controller(_RAY_START_S)
        controller = local_ray.start_controller(
            config, run_dir.path, KubeController, resources={"node:__internal_head__": 0.001}
        )
        return _watch(ray_head, controller, _Configured(config_file, config), run_dir)
    finally:
        ray_head.terminate()
        try:
            ray_head.wait(_RAY_STOP_S)
        except subprocess.TimeoutExpired:
            ray_head.kill()
        run_dir.release()


class _Configured:
    """The mounted file, which the kubelet replaces a while after the ConfigMap has changed."""

    def __init__(self, file: Path, config: ClusterConfig) -> None:
        self._file = file
        self._told = config
        self._text = file.read_bytes()

    def news(self) -> list[ConfigurePools | RollOut]:
        """What the controller has to hear since the last call. A file that can't be read changes nothing."""
        try:
            text = self._file.read_bytes()
            if text == self._text:
                return []
            config = load(self._file).config
        except (OSError, ConfigError) as exc:
            _log.error("%s is not used: %s", self._file, exc)
            return []
        before, self._text, self._told = self._told, text, config
        requests: list[ConfigurePools | RollOut] = []
        if config.pools != before.pools:
            requests.append(ConfigurePools(pools=config.pools.model_dump(mode="json")))
        if worker_settings(config) != worker_settings(before):
            requests.append(RollOut(config=config.model_dump_json()))
        if (config.controller, config.autoscaler) != (before.controller, before.autoscaler):
            _log.warning("%s: controller and autoscaler settings take effect when the head restarts", self._file)
        return requests


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
    waiting: list[ConfigurePools | RollOut] = []
    while ray_head.poll() is None:
        if controller.done():
            error = controller.exception()
            raise ServingError(f"the controller ended: {'it was told to stop' if error is None else one_line(error)}")
        waiting.extend(configured.news())
        while waiting and _tell(waiting[0], run_dir):
            del waiting[0]
        time.sleep(_LOOK_S)
    return ray_head.returncode


def _tell(request: ConfigurePools | RollOut, run_dir: RunDir) -> bool:
    """Whether the request is settled. The controller may be starting, or unable to store the desired state."""
    record = run_dir.control()
    if record is None:
        return False
    try:
        with ControlClient(record.control_addr, run_dir.key()) as client:
            client.ask(request)
    except ControlTimeout as exc:
        _log.warning("a new configuration is not in force yet: %s", exc)
        return False
    except ControlRefused as exc:
        _log.error("a new configuration is refused: %s", exc)
        return isinstance(request, RollOut)  # sizes are asked for again: storing them may have failed
    return True
