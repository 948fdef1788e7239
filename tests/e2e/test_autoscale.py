"""The autoscaler on a live cluster: a step of load makes the decode pool grow, its end makes it shrink again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import netns
from tests.e2e.site import Json, Site
from tests.e2e.traffic import Traffic

REASON = netns.missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(REASON), reason=REASON),
    pytest.mark.timeout(400),
]

SETTINGS = """
[scheduler]
max_num_seqs = 4
[pools.decode]
replicas = 1
max_replicas = 2
[pools.prefill]
replicas = 1
max_replicas = 1
[autoscaler]
mode = "{mode}"
period_s = 0.5
window_s = 4.0
up_after_s = 1.0
down_after_s = 3.0
cooldown_s = 3.0
ttft_slo_s = 60.0
tpot_slo_s = 10.0
"""


def start(mode: str, model: Path, directory: Path) -> Iterator[Site]:
    with netns.Host() as host:
        site = Site(host, model, directory)
        with site.config.open("a", encoding="utf-8") as config:
            config.write(SETTINGS.format(mode=mode))
        process, site.ready_s = site.start()
        yield site
        host.kill(-site.record().supervisor.pid, "INT")
        assert process.wait(timeout=60) == 0, site.told()


@pytest.fixture
def acting(nano_planted_dir: Path, tmp_path: Path) -> Iterator[Site]:
    yield from start("act", nano_planted_dir, tmp_path)


@pytest.fixture
def dry(nano_planted_dir: Path, tmp_path: Path) -> Iterator[Site]:
    yield from start("recommend", nano_planted_dir, tmp_path)


def size(status: Json, pool: str = "decode") -> tuple[int, int]:
    return status["pools"][pool]["desired"], status["pools"][pool]["ready"]


def test_the_pool_follows_the_load_up_and_down_and_no_stream_breaks(acting: Site) -> None:
    with Traffic(acting) as traffic:
        acting.until(lambda now: size(now) == (2, 2))
        texts = traffic.texts()
    assert set(texts) == {traffic.expected}
    status = acting.until(lambda now: size(now) == (1, 1) and now["ready"])
    up, down = status["changes"][:2]
    assert (up["before"], up["after"], up["by"]) == (1, 2, "autoscaler")
    assert "decode places" in up["reason"]
    assert (down["before"], down["after"], down["by"]) == (2, 1, "autoscaler")
    assert down["reason"].startswith("room to spare")


def test_a_dry_run_says_what_it_would_do_and_does_nothing(dry: Site) -> None:
    with Traffic(dry) as traffic:
        status = dry.until(lambda now: now["pools"]["decode"].get("recommended") == 2)
        assert size(status) == (1, 1)
        assert status["pools"]["decode"]["reason"].startswith("decode places")
        dry.until(lambda now: "decode: 2 recommended: decode places" in dry.baton("status").stdout)
        traffic.texts()
    assert dry.status()["changes"] == []
    assert "recommended, not carried out: decode 1 → 2" in (dry.run_dir / "logs" / "controller.log").read_text()
