"""The chart's containers without Kubernetes: what each pod runs, started by hand on a host of its own.

Real are the configuration, the head and a node of Ray, controller, workers, router, and the store in a ConfigMap of the
stand-in API server. The parts of the kubelet and of the operator are played here.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import tomli_w

from deploy.control import ClusterStatus, ControlClient, ControlTimeout, GetStatus
from deploy.kube.api import SERVER_ENV
from deploy.kube.head import RAY_COMMAND_ENV
from tests.e2e import netns
from tests.helm.api_server import ApiServer
from tests.helm.charts import NAMESPACE, config_text, groups, ray_resource, rendered

ADDRESS = "192.0.2.1"
SECRET = "test-secret-0123456789"
BIN = Path(sys.executable).parent
URL = "http://127.0.0.1:8000"
CONTROL = "tcp://127.0.0.1:7002"
_RAY = "--block --disable-usage-stats --include-log-monitor=False"


class Pods:
    """Processes with the environment that the chart gives its containers."""

    def __init__(self, host: netns.Host, directory: Path, model: Path) -> None:
        self.host, self._directory, self._model = host, directory, model
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []
        self.config = directory / "config.toml"
        pod = next(iter(groups(rendered("cpu")).values()))["template"]["spec"]
        assert "BATON_HOST" in {variable["name"] for variable in pod["containers"][0]["env"]}
        self._env = {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(directory),
            "BATON_SECRET": SECRET,
            "BATON_HOST": ADDRESS,
            "BATON_NAMESPACE": NAMESPACE,
            "BATON_DESIRED": "baton-pools",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0" * 64,
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def mount(self, *sets: str, memory_mb: int = 16, **decode: int) -> None:
        """Write the chart's configuration, as far as it can be the same on one host: pods share ports, hosts do not."""
        tree = tomllib.loads(config_text(rendered("cpu", False, True, *sets)))
        tree["model"] = {"path": str(self._model), "name": "nano"}
        tree["router"] |= {"membership": "tcp://127.0.0.1:7001", "controller": CONTROL, "drain_timeout_s": 2}
        tree["worker"] |= {"request_port": 0, "control_port": 0, "metrics_port": 0, "drain_timeout_s": 5}
        tree["kv"] = {"memory_mb": memory_mb}
        tree["autoscaler"]["mode"] = "recommend"  # changes nothing, and exports what it would do
        tree["pools"]["decode"] |= decode
        draft = self.config.with_suffix(".new")
        draft.write_text(tomli_w.dumps(tree), encoding="utf-8")
        draft.replace(self.config)

    def start(self, name: str, *words: str, **env: str) -> subprocess.Popen[bytes]:
        with (self._directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                self.host.command(f"--wdns={self._directory}", *words),
                env={**self._env, **env},
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        self._running.append((name, process))
        return process

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.host.run("sh", "-c", 'cd "$0" && exec "$@"', str(self._directory), *words, env=self._env)

    def logs(self) -> str:
        return "\n".join(f"== {name}\n{(self._directory / f'{name}.log').read_text()}" for name, _ in self._running)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """A pod is gone with everything in it."""
        self._running = [entry for entry in self._running if entry[1] is not process]
        parent = psutil.Process(process.pid)
        for child in parent.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait(20.0)

    def reap(self) -> None:
        """Everything has been killed with its host."""
        for _, process in self._running:
            process.wait(20.0)

    def until(self, condition: Callable[[ClusterStatus], bool], timeout_s: float = 90.0) -> ClusterStatus:
        """Ask the controller until it says so."""
        deadline = time.monotonic() + timeout_s
        last: object = None
        with self.host.network(), ControlClient(CONTROL, SECRET.encode()) as client:
            while time.monotonic() < deadline:
                with contextlib.suppress(ControlTimeout):
                    last = status = client.ask(GetStatus(), timeout_s=1.0)
                    if condition(status):
                        return status
                for name, process in self._running:
                    assert process.poll() is None, f"{name} ended: {self.logs()}"
                time.sleep(0.1)
        pytest.fail(f"not reached: {last}\n{self.logs()}")


def start(pods: Pods, api: ApiServer, **env: str) -> subprocess.Popen[bytes]:
    """The pods of a release: a head, one node for two kinds of workers, a router. `env`: of Ray's pods."""
    pods.mount()
    head = start_head(pods, api, **env)
    start_node(pods, **env)
    pods.start("router", "python", "-m", "router", "--config", str(pods.config))
    return head


def start_head(pods: Pods, api: ApiServer, **env: str) -> subprocess.Popen[bytes]:
    ray = f"ray start --head --num-cpus=0 --port=6379 --include-dashboard=False {_RAY}"
    words = ("python", "-m", "deploy.kube", "head", "--config", str(pods.config))
    return pods.start("head", *words, **{RAY_COMMAND_ENV: ray, SERVER_ENV: api.url}, **env)


def start_node(pods: Pods, *sets: str, **env: str) -> None:
    """A node with room for all pods of one release."""
    docs = rendered("cpu", False, True, *sets)
    room = {ray_resource(docs, "prefill"): 2, ray_resource(docs, "decode"): 3}
    node = f"until ray health-check --address={ADDRESS}:6379; do sleep 0.3; done; exec ray start "
    node += f"--address={ADDRESS}:6379 --num-cpus=2 --resources='{json.dumps(room)}' {_RAY}"
    pods.start(f"node{len(sets)}", "bash", "-c", node, **env)


@contextlib.contextmanager
def open_pods(directory: Path, model: Path) -> Iterator[Pods]:
    """A host of its own; everything on it is gone afterwards. Skips the test where there can be none."""
    if reason := netns.missing():
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        host = netns.Host()
        site = Pods(host, directory, model)
        stack.callback(site.reap)
        stack.enter_context(host)
        yield site


@contextlib.contextmanager
def serving(pods: Pods, **env: str) -> Iterator[tuple[ApiServer, subprocess.Popen[bytes]]]:
    """An API server with what the chart installs for the head, and the release's pods: yields both server and head."""
    with pods.host.network():
        api = ApiServer()
    with api:
        metadata = {"name": "baton-pools", "namespace": NAMESPACE}
        empty = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}
        api.create(("v1", "configmaps", "baton-pools"), empty, "helm")
        yield api, start(pods, api, **env)
