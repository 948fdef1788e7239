"""The commands of the chart's containers make a cluster, resize it and replace its workers."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from deploy.control import ClusterStatus
from deploy.kube.__main__ import main
from deploy.kube.head import RAY_COMMAND_ENV
from tests.helm.pods import ADDRESS, CONTROL, SECRET, URL, Pods, open_pods, serving, start_node

pytestmark = pytest.mark.timeout(480)


@pytest.fixture
def pods(tmp_path: Path, nano_dir: Path) -> Iterator[Pods]:
    with open_pods(tmp_path, nano_dir) as opened:
        yield opened


@pytest.mark.slow
def test_the_containers_of_the_chart_make_a_cluster(pods: Pods) -> None:
    with serving(pods) as (api, head):
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
