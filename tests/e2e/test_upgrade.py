"""A rolling upgrade of both pools under traffic, to workers that can't hand off to the old ones."""

from __future__ import annotations

import pytest

from tests.e2e.site import Site
from tests.e2e.traffic import STREAMS, Traffic

pytestmark = pytest.mark.timeout(300)


@pytest.mark.slow
def test_every_worker_is_replaced_and_no_stream_breaks(shared_site: Site) -> None:
    before = shared_site.until(lambda now: now["ready"])
    traffic = Traffic(shared_site)
    with traffic:
        done = shared_site.baton("rollout", "--set", "kv.block_tokens=32")
        assert (done.returncode, done.stdout) == (0, "every worker is of revision 1\n"), (
            done.stderr + shared_site.told()
        )
        texts = traffic.texts()
    assert len(texts) >= STREAMS
    assert set(texts) == {traffic.expected}
    after = shared_site.status()
    assert {pool: size["ready"] for pool, size in after["pools"].items()} == {"prefill": 1, "decode": 1}
    assert {w["pid"] for w in after["workers"]}.isdisjoint(w["pid"] for w in before["workers"])
    assert {worker["restarts"] for worker in after["workers"]} == {0}
    log = (shared_site.run_dir / "logs" / "router.log").read_text()
    assert "workers can't be paired" in log, "the two revisions were compatible: the test shows less than it says"


@pytest.mark.slow
def test_a_rollout_goes_on_after_its_controller_was_killed(shared_site: Site) -> None:
    before = shared_site.until(lambda now: now["ready"])
    revision = before["revision"] + 1
    traffic = Traffic(shared_site)
    with traffic:
        assert shared_site.baton("rollout", "--set", f"kv.num_blocks={600 + revision}", "--no-wait").returncode == 0
        half = shared_site.until(lambda now: {w["revision"] for w in now["workers"]} == {revision - 1, revision})
        pid = shared_site.host.run("pgrep", "-f", "ray::ControllerActor").stdout.split()[0]
        shared_site.host.kill(int(pid), "KILL")
        after = shared_site.until(
            lambda now: now["ready"] and {w["revision"] for w in now["workers"]} == {revision}, timeout_s=120.0
        )
        texts = traffic.texts()
    assert set(texts) == {traffic.expected}
    assert after["revision"] == revision
    started = {w["name"]: w["pid"] for w in half["workers"] if w["revision"] == revision and w["pid"]}
    kept = {w["name"]: w["pid"] for w in after["workers"]}
    assert started.items() <= kept.items(), "what the killed controller had started is kept"
    assert {pool: size["ready"] for pool, size in after["pools"].items()} == {"prefill": 1, "decode": 1}


@pytest.mark.slow
def test_a_revision_that_does_not_start_leaves_the_old_one_serving(shared_site: Site) -> None:
    traffic = Traffic(shared_site)
    with traffic:
        done = shared_site.baton("rollout", "--set", "kv.num_blocks=99999999", "--timeout", "6")
        assert done.returncode == 4
        texts = traffic.texts()
        failed = shared_site.until(lambda now: any(worker["error"] for worker in now["workers"]))
        assert "kv.num_blocks" in next(worker["error"] for worker in failed["workers"] if worker["error"])
    assert set(texts) == {traffic.expected}
    again = shared_site.baton("rollout", "--set", "kv.num_blocks=512")
    assert again.returncode == 0, again.stderr + shared_site.told()
