"""A Ray cluster with Ray's own autoscaler on fake nodes, Baton's controller in it, and pools that scale under traffic.

    python -m tests.e2e.fake_nodes MODEL DIRECTORY

Runs on a host of its own (Ray's command line stops every Ray it finds). Writes what it saw to DIRECTORY/seen.json.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

SECRET = "fake-nodes-secret-0123456789"
WAIT_S = 150.0
_TYPES = {"prefill": 2, "decode": 3}  # node type → most nodes
_UNUSED = ("auth", "docker", "file_mounts")
_UNUSED_LISTS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
)  # fmt: skip

os.environ.update({"BATON_SECRET": SECRET, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"})
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def base_config() -> dict[str, Any]:
    """What the fake node provider needs."""
    return {
        "cluster_name": "fake",
        "max_workers": 8,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,  # all nodes have one address
            "disable_node_updaters": True,  # nothing is installed on them
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.1,
        "file_mounts_sync_continuously": False,
        **{key: {} for key in _UNUSED},
        **{key: [] for key in _UNUSED_LISTS},
    }


def complete_ray(directory: Path) -> None:
    """Ray's wheel lacks a file that its fake node provider reads: show one, to the processes of this host only."""
    import ray

    installed = Path(ray.__file__).parent / "autoscaler" / "_private" / "fake_multi_node"
    complete = directory / installed.name
    shutil.copytree(installed, complete)
    (complete / "example.yaml").write_text(json.dumps(base_config()), encoding="utf-8")
    subprocess.run(["mount", "--bind", str(complete), str(installed)], check=True)


def start_ray() -> Any:
    """Ray's head with its autoscaler (v2); nodes come when actors ask for their resources."""
    import ray
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
    from ray.cluster_utils import AutoscalingCluster

    class Cluster(AutoscalingCluster):
        def _generate_config(
            self, head_resources: Any, worker_node_types: Any, autoscaler_v2: bool = False, **more: Any
        ) -> Any:
            head = {"resources": head_resources, "node_config": {}, "max_workers": 0}
            config = {**base_config(), "available_node_types": {**worker_node_types, "ray.head.default": head}, **more}
            config["provider"].update(launch_multiple=True, head_node_id=FAKE_HEAD_NODE_ID)
            return config

    types = {
        name: {
            "resources": {"CPU": 1, "NPU": 1, name: 1},
            "node_config": {},
            "min_workers": 0,
            "max_workers": most,
        }
        for name, most in _TYPES.items()
    }
    cluster = Cluster({"CPU": 0, "object_store_memory": 80 << 20}, types, autoscaler_v2=True)
    cluster.start()
    ray.init(address="auto", namespace="baton", log_to_driver=False)
    return cluster


def nodes() -> Counter[str]:
    """Living worker nodes by type."""
    import ray

    living = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Counter(name for name in _TYPES for resources in living if name in resources)


class Site:
    """The running cluster, as a person would use it."""

    def __init__(self, model: str, directory: Path) -> None:
        from deploy import local_ray
        from deploy.rundir import RunDir
        from llm_engine.api.config import build

        pools = {
            name: {"replicas": 1, "min_replicas": 1, "max_replicas": most, "resources": {"NPU": 1, name: 1}}
            for name, most in _TYPES.items()
        }
        self.config = build(
            {
                "model": {"path": model, "name": "nano"},
                "kv": {"memory_mb": 32},
                "worker": {"drain_timeout_s": 10.0},
                "pools": pools,
            }
        )
        self.run_dir = RunDir(directory / "run")
        self.run_dir.acquire()
        self.run_dir.create_secret()
        self._controller = local_ray.start_controller(self.config, self.run_dir.path)
        self.http = httpx.Client(base_url="http://127.0.0.1:8000", trust_env=False, timeout=30.0)

    def status(self) -> dict[str, Any]:
        if self._controller.done():
            self._controller.result()
        done = self.baton("status", "--json")
        return json.loads(done.stdout) if done.stdout else {"ready": False, "pools": {}, "workers": []}

    def baton(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deploy.cli", *words, "--run-dir", str(self.run_dir.path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    def until(self, condition: Callable[[], Any]) -> float:
        """Wait; how long it took."""
        started = time.monotonic()
        while not condition():
            if time.monotonic() - started > WAIT_S:
                raise TimeoutError(f"{self.status()} {nodes()}")
            time.sleep(0.2)
        return round(time.monotonic() - started, 1)

    def ready(self, **sizes: int) -> bool:
        status = self.status()
        now = {name: pool["ready"] for name, pool in status["pools"].items()}
        return bool(status["ready"] and all(now.get(name) == size for name, size in sizes.items()))


class Traffic(threading.Thread):
    """Streams one completion after the other until told to stop; `wrong` has every one that was not as it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.enough = threading.Event()
        self.texts: list[str] = []
        self.wrong: list[str] = []

    def run(self) -> None:
        body = {"model": "nano", "prompt": "The quick brown fox", "max_tokens": 150, "seed": 7, "ignore_eos": True}
        with httpx.Client(base_url="http://127.0.0.1:8000", trust_env=False, timeout=60.0) as http:
            while not self.enough.is_set():
                with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                    lines = [line for line in answer.iter_lines() if line]
                if answer.status_code != 200 or lines[-1] != "data: [DONE]" or any('"error"' in line for line in lines):
                    self.wrong.append(lines[-1])
                else:
                    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
                    self.texts.append("".join(chunk["choices"][0]["text"] for chunk in chunks))


def scale(site: Site) -> dict[str, Any]:
    """decode 1 → 3 through the admin API, prefill 1 → 2 → 1 by the command line; the nodes follow."""
    seen: dict[str, Any] = {"up_s": site.until(lambda: site.ready(prefill=1, decode=1)), "first_nodes": nodes()}
    site.http.put("/admin/pools/decode", json={"replicas": 3}).raise_for_status()
    seen["decode_3_s"] = site.until(lambda: site.ready(prefill=1, decode=3))
    seen["nodes_after_decode"] = nodes()
    assert site.baton("scale", "prefill", "2").returncode == 0
    seen["nodes_after_prefill"] = nodes()
    assert site.baton("scale", "prefill", "1").returncode == 0
    seen["prefill_node_gone_s"] = site.until(lambda: nodes() == {"prefill": 1, "decode": 3})
    return seen


def main(model: str, directory: str) -> None:
    ray_dir = tempfile.mkdtemp(prefix="baton-", dir="/tmp")
    complete_ray(Path(directory))
    os.environ["RAY_TMPDIR"] = ray_dir  # not in DIRECTORY: paths of sockets must be short
    cluster = start_ray()
    try:
        site = Site(model, Path(directory))
        site.until(lambda: site.ready(prefill=1, decode=1))
        clients = [Traffic() for _ in range(3)]
        for client in clients:
            client.start()
        try:
            seen = scale(site)
        finally:
            for client in clients:
                client.enough.set()
            for client in clients:
                client.join(60.0)
        seen["wrong"] = [line for client in clients for line in client.wrong]
        seen["texts"] = sorted({text for client in clients for text in client.texts})
        seen["streams"] = sum(len(client.texts) for client in clients)
    finally:
        cluster.shutdown()
        shutil.rmtree(ray_dir, ignore_errors=True)
    (Path(directory) / "seen.json").write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
