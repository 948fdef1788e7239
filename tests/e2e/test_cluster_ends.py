"""Ends that are not Ctrl-C: a detached cluster stopped by `baton down`, a killed supervisor, a start that fails."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import netns
from tests.e2e.site import Site

REASON = netns.missing()
pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON), pytest.mark.timeout(300)]


@pytest.fixture
def site(nano_planted_dir: Path, tmp_path: Path) -> Iterator[Site]:
    with netns.Host() as host:
        yield Site(host, nano_planted_dir, tmp_path)


@pytest.mark.slow
def test_a_detached_cluster_runs_until_down(site: Site) -> None:
    shm_before = netns.shared_memory()
    started = site.baton("up", "--config", str(site.config), "--detach")
    assert started.returncode == 0, started.stderr + site.told()
    assert "Stop it with `baton down`" in started.stdout
    record = site.record()
    with site.host.network(), urllib.request.urlopen(f"{record.url}/v1/models", timeout=10) as response:
        assert response.status == 200
    stopped = site.baton("down")
    assert (stopped.returncode, stopped.stdout) == (0, "stopped\n"), stopped.stderr
    site.assert_nothing_left(shm_before, record.ray_dir)
    assert site.baton("status").returncode == 3
    assert "no cluster is running" in site.baton("down").stdout


@pytest.mark.slow
def test_a_killed_supervisor_takes_everything_with_it(site: Site) -> None:
    shm_before = netns.shared_memory()
    assert site.baton("up", "--config", str(site.config), "--detach").returncode == 0, site.told()
    record = site.record()
    site.host.kill(record.supervisor.pid)
    assert site.baton("status").returncode == 3
    stopped = site.baton("down")
    assert (stopped.returncode, stopped.stdout) == (0, "stopped\n"), stopped.stderr
    site.assert_nothing_left(shm_before, record.ray_dir)


@pytest.mark.slow
def test_a_start_can_be_interrupted(site: Site) -> None:
    shm_before = netns.shared_memory()
    process = site.begin()
    site.until_told(process, b"prefill-0: starting")
    record = site.record()
    site.host.kill(-record.supervisor.pid, "INT")
    assert process.wait(timeout=60) == 0, site.told()
    assert site.output.read_text().endswith("stopping\nstopped\n")
    site.assert_nothing_left(shm_before, record.ray_dir)


@pytest.mark.slow
def test_a_start_that_fails_says_why_and_leaves_nothing(site: Site) -> None:
    shm_before = netns.shared_memory()
    taken = "worker.metrics_port=18000"  # for both workers: only one can have it
    failed = site.baton("up", "--config", str(site.config), "--set", taken)
    assert failed.returncode == 1, failed.stdout
    assert failed.stderr.count("\n") == 1
    assert "-0: worker.metrics_port=18000: can't listen on 127.0.0.1" in failed.stderr
    site.assert_nothing_left(shm_before, "/nowhere")
