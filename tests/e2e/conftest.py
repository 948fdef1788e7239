"""A running cluster that several modules share. Each test leaves it ready, with one prefill and one decode worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import netns
from tests.e2e.site import Site

MAX_CARDS = 4


@pytest.fixture(scope="package")
def shared_site(nano_planted_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if reason := netns.missing():
        pytest.skip(reason)
    with netns.Host() as host:
        site = Site(host, nano_planted_dir, tmp_path_factory.mktemp("shared"))
        with site.config.open("a", encoding="utf-8") as config:
            config.write(f"[autoscaler]\nmax_cards = {MAX_CARDS}\n")
        process, site.ready_s = site.start()
        yield site
        host.kill(-site.record().supervisor.pid, "INT")
        assert process.wait(timeout=60) == 0, site.told()
