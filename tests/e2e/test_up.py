"""`baton up` as a person uses it, on a host of its own: ready soon, serves, survives kills, leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests.e2e import netns
from tests.e2e.site import Site, worker_of

REASON = netns.missing()
pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON), pytest.mark.timeout(300)]

URL = "http://127.0.0.1:8000"
READY_S = 20.0


@pytest.fixture(scope="module")
def host() -> Iterator[netns.Host]:
    with netns.Host() as host:
        yield host


@pytest.fixture(scope="module")
def site(host: netns.Host, nano_planted_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(host, nano_planted_dir, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def cluster(site: Site) -> Iterator[Site]:
    """A running cluster that every test leaves ready, with one prefill and one decode worker."""
    shm_before = netns.shared_memory()
    process, site.ready_s = site.start()
    record = site.record()
    yield site
    site.host.kill(-record.supervisor.pid, "INT")  # Ctrl-C reaches the whole process group
    assert process.wait(timeout=60) == 0, site.told()
    assert "killed" not in site.output.read_text(), "everything stops by itself"
    site.assert_nothing_left(shm_before, record.ray_dir)


@pytest.fixture
def api(cluster: Site) -> Iterator[OpenAI]:
    with cluster.host.network(), httpx.Client(trust_env=False, timeout=60.0) as http:
        yield OpenAI(base_url=f"{URL}/v1", api_key="none", http_client=http, max_retries=0)


def complete(api: OpenAI, max_tokens: int = 48) -> str:
    answer = api.completions.create(
        model="nano", prompt="The quick brown fox", max_tokens=max_tokens, seed=7, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == max_tokens
    return answer.choices[0].text


def test_it_is_ready_soon(cluster: Site) -> None:
    others = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # a machine busy with other work is slower
    assert cluster.ready_s < READY_S * others
    assert f"curl -N {URL}/v1/chat/completions" in cluster.output.read_text()


def test_a_chat_is_answered(api: OpenAI) -> None:
    answer = api.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": "Hello"}], max_tokens=16, seed=1
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
    streamed = api.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": "Hello"}], max_tokens=16, seed=1, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == answer.choices[0].message.content


def test_everything_listens_on_loopback(cluster: Site) -> None:
    listeners = cluster.host.listeners()
    assert f"127.0.0.1:{URL.rpartition(':')[2]}" in listeners
    assert [address for address in listeners if not netns.is_loopback(address)] == []


def test_other_users_reach_no_file_of_it(cluster: Site) -> None:
    for directory in (cluster.record().ray_dir, cluster.run_dir):
        assert Path(directory).stat().st_mode & 0o777 == 0o700


def test_no_secret_is_on_a_command_line(cluster: Site) -> None:
    secret = (cluster.run_dir / "secret").read_text(encoding="utf-8")
    commands = cluster.host.processes()
    assert len(commands) > 8
    environment = Path(f"/proc/{os.getpid()}/environ").read_bytes()
    assert secret.encode() not in environment
    assert [command for command in commands if secret in command or "RAY_AUTH_TOKEN" in command] == []
    assert secret not in "".join(log.read_text(errors="replace") for log in (cluster.run_dir / "logs").glob("*.log"))


def test_a_second_cluster_in_the_same_directory_is_refused(cluster: Site) -> None:
    for detach in ([], ["--detach"]):
        done = cluster.baton("up", "--config", str(cluster.config), *detach)
        assert done.returncode == 1
        assert "a cluster is already running" in done.stderr
    assert cluster.status()["ready"]


def test_status_and_metrics_say_how_the_workers_are_linked(cluster: Site, api: OpenAI) -> None:
    complete(api, 4)
    status = cluster.until(lambda now: now["ready"] and bool(worker_of(now, "prefill-0")["links"]))
    (link,) = worker_of(status, "prefill-0")["links"]
    assert (link["transport"], link["healthy"]) == ("shm", True)
    assert link["reason"].startswith("shm: ")
    assert f"prefill-0 → {link['peer']}: {link['reason']}" in cluster.baton("status").stdout
    wanted = f'baton_link_info{{peer="{link["peer"]}",reason="{link["reason"]}",transport="shm"}} 1.0'
    with cluster.host.network(), httpx.Client(trust_env=False) as http:
        assert wanted in http.get(worker_of(status, "prefill-0")["metrics_addr"]).text


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_a_killed_worker_costs_a_stream_nothing_and_comes_back(cluster: Site, api: OpenAI, name: str) -> None:
    undisturbed = complete(api, 400)
    before = cluster.worker(name)
    stream = api.completions.create(
        model="nano",
        prompt="The quick brown fox",
        max_tokens=400,
        seed=7,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    pieces = [next(stream).choices[0].text]
    cluster.host.kill(before["pid"])
    pieces.extend(chunk.choices[0].text for chunk in stream)
    assert "".join(pieces) == undisturbed
    status = cluster.until(lambda now: now["ready"] and worker_of(now, name)["restarts"] > before["restarts"])
    after = worker_of(status, name)
    assert (after["state"], after["pid"] != before["pid"]) == ("ready", True)
    assert complete(api) == undisturbed[: len(complete(api))]


def test_a_killed_router_comes_back_on_its_port(cluster: Site, api: OpenAI) -> None:
    before = complete(api)
    router = cluster.status()["router"]
    cluster.host.kill(router["pid"])
    status = cluster.until(lambda now: now["ready"] and now["router"]["pid"] != router["pid"])
    assert status["router"]["restarts"] == router["restarts"] + 1
    assert complete(api) == before


def test_a_killed_controller_finds_everything_again(cluster: Site, api: OpenAI) -> None:
    before = cluster.status()
    pid = cluster.host.run("pgrep", "-f", "ray::ControllerActor").stdout.split()[0]
    cluster.host.kill(int(pid))
    assert complete(api), "the data plane does not need it"
    after = cluster.until(lambda now: now["ready"])
    assert after["router"]["pid"] == before["router"]["pid"]
    assert [worker["pid"] for worker in after["workers"]] == [worker["pid"] for worker in before["workers"]]


@pytest.mark.slow
def test_a_pool_scales_and_a_worker_drains(cluster: Site, api: OpenAI) -> None:
    text = complete(api)
    grown = cluster.baton("scale", "decode", "2")
    assert (grown.returncode, grown.stdout) == (0, "decode: 2 ready\n"), grown.stderr
    assert {worker["name"] for worker in cluster.status()["workers"]} == {"prefill-0", "decode-0", "decode-1"}
    drained = cluster.baton("drain", "decode-0")
    assert (drained.returncode, drained.stdout) == (0, "decode-0: drained\n"), drained.stderr
    assert complete(api) == text
    assert cluster.baton("scale", "decode", "1").returncode == 0
    status = cluster.until(lambda now: now["ready"])
    assert [worker["name"] for worker in status["workers"]] == ["decode-1", "prefill-0"]
    assert complete(api) == text
    assert cluster.baton("drain", "decode-7").returncode == 1
