"""The chart's containers without Kubernetes: what each pod runs, started by hand on a host of its own.

Real are the configuration, the head and a node of Ray, controller, workers, router, and the store in a ConfigMap of the
stand-in API server. The parts of the kubelet and of the operator are played here.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import tomli_w

from deploy.control import ClusterStatus, ControlClient, ControlTimeout, GetStatus
from deploy.kube.__main__ import main
from deploy.kube.api import SERVER_ENV
from deploy.kube.head import RAY_COMMAND_ENV
from tests.e2e import netns
from tests.helm.api_server import ApiServer
from tests.helm.charts import NAMESPACE, config_text, groups, ray_resource, rendered

pytestmark = pytest.mark.timeout(480)

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
        tree["pools"]["decode"] |= decode
        draft = self.config.with_suffix(".new")
        draft.write_text(tomli_w.dumps(tree), encoding="utf-8")
        draft.replace(self.config)

    def start(self, name: str, *words: str, **env: str) -> subprocess.Popen[bytes]:
        with (self._directory / f"{name}.log").open("wb") as log:
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


@pytest.fixture
def pods(tmp_path: Path, nano_dir: Path) -> Iterator[Pods]:
    if reason := netns.missing():
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        host = netns.Host()
        site = Pods(host, tmp_path, nano_dir)
        stack.callback(site.reap)
        stack.enter_context(host)
        yield site


@pytest.mark.slow
def test_the_containers_of_the_chart_make_a_cluster(pods: Pods) -> None:
    with pods.host.network():
        api = ApiServer()
    with api:
        metadata = {"name": "baton-pools", "namespace": NAMESPACE}
        empty = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}
        api.create(("v1", "configmaps", "baton-pools"), empty, "helm")
        head = start(pods, api)
        status = pods.until(lambda now: now.ready)
        assert {worker.name for worker in status.workers} == {"prefill-0", "decode-0"}
        assert all(worker.request_addr.startswith(f"tcp://{ADDRESS}:") for worker in status.workers)

        smoke = pods.run("python", "-m", "deploy.kube", "smoke", "--url", URL, "--model", "nano", "--timeout", "60")
        assert smoke.returncode == 0, smoke.stderr + pods.logs()
        assert "first token after" in smoke.stdout

        pods.mount(replicas=2)  # the kubelet brings a new ConfigMap
        status = pods.until(lambda now: now.pools["decode"].ready == 2)
        stored = api.get("ConfigMap", "baton-pools")["data"]["desired.json"]
        assert msgspec.json.decode(stored)["replicas"]["decode"] == 2

        [leaving] = [worker for worker in status.workers if worker.name == "decode-0"]
        words = ("--metrics", leaving.metrics_addr, "--controller", CONTROL, "--timeout", "30")
        left = pods.run("python", "-m", "deploy.kube", "leave", *words)
        assert "drained" in left.stderr, left.stderr + pods.logs()
        status = pods.until(lambda now: now.pools["decode"].ready == 2 and not knows(now, leaving.incarnation))
        again = pods.run("python", "-m", "deploy.kube", "leave", *words)
        assert again.returncode == 0, "a pod without a worker leaves at once"

        pods.mount(memory_mb=17, replicas=2)  # a setting of workers: they are replaced, one by one
        status = pods.until(lambda now: now.ready and all(worker.revision == 1 for worker in now.workers))
        assert len(status.workers) == 3

        pods.mount("image.tag=next", memory_mb=17, replicas=2)  # another image: workers move to new pods
        start_node(pods, "image.tag=next")
        status = pods.until(lambda now: now.ready and all(worker.revision == 2 for worker in now.workers))
        assert len(status.workers) == 3

        scaled = pods.run("baton", "scale", "decode", "1")
        assert (scaled.returncode, scaled.stdout) == (0, "decode: 1 ready\n"), scaled.stderr
        head.send_signal(signal.SIGTERM)
        head.wait(40.0)


def start(pods: Pods, api: ApiServer) -> subprocess.Popen[bytes]:
    """The pods of a release: a head, one node for two kinds of workers, a router."""
    pods.mount()
    ray = f"ray start --head --num-cpus=0 --port=6379 --include-dashboard=False {_RAY}"
    words = ("python", "-m", "deploy.kube", "head", "--config", str(pods.config))
    head = pods.start("head", *words, **{RAY_COMMAND_ENV: ray, SERVER_ENV: api.url})
    start_node(pods)
    pods.start("router", "python", "-m", "router", "--config", str(pods.config))
    return head


def start_node(pods: Pods, *sets: str) -> None:
    """A node with room for all pods of one release."""
    docs = rendered("cpu", False, True, *sets)
    room = {ray_resource(docs, "prefill"): 2, ray_resource(docs, "decode"): 3}
    node = f"until ray health-check --address={ADDRESS}:6379; do sleep 0.3; done; exec ray start "
    node += f"--address={ADDRESS}:6379 --num-cpus=2 --resources='{json.dumps(room)}' {_RAY}"
    pods.start(f"node{len(sets)}", "bash", "-c", node)


def knows(status: ClusterStatus, incarnation: str) -> bool:
    return any(worker.incarnation == incarnation for worker in status.workers)


def test_a_service_that_does_not_answer_is_an_error_of_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["smoke", "--url", "http://127.0.0.1:9", "--model", "m", "--timeout", "0"]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("smoke: http://127.0.0.1:9/ready: not ready within 0 s")


def test_the_head_says_where_it_belongs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.toml"
    file.write_text('model.path = "/m"\n', encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATON_SECRET", SECRET)
        patch.delenv(RAY_COMMAND_ENV, raising=False)
        assert main(["head", "--config", str(file)]) == 2
    assert RAY_COMMAND_ENV in capsys.readouterr().err
