"""The router's page in headless Chromium, on a live cluster and without any other network."""

from __future__ import annotations

import json
import re
import shutil
import sys
from typing import Any

import httpx
import pytest

from deploy.scaling_signals import parse, percentile
from tests.e2e.site import Site
from tests.e2e.traffic import URL, stream

MISSING = [tool for tool in ("chromium", "chromedriver") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
]

HISTOGRAMS = {"TTFT": ("baton_ttft_seconds_bucket", 1.0, 3), "TPOT": ("baton_tpot_seconds_bucket", 1000.0, 2)}


@pytest.fixture(scope="module")
def saw(shared_site: Site, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a visit to the dashboard showed, after some traffic."""
    directory = tmp_path_factory.mktemp("browser")
    with shared_site.host.network(), httpx.Client(trust_env=False, timeout=60.0) as http:
        for _ in range(4):
            stream(http)
    done = shared_site.host.run(sys.executable, "-m", "tests.e2e.browse", URL, str(directory), timeout_s=200.0)
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads(done.stdout), "directory": directory}


def test_every_chart_is_painted(saw: dict[str, Any]) -> None:
    assert len(saw["painted"]) == 6
    assert all(colours > 3 for colours in saw["painted"].values()), saw["painted"]


def test_the_numbers_are_those_of_metrics(saw: dict[str, Any]) -> None:
    assert saw["before"].count("baton_ttft_seconds_bucket") > 10
    for title, (name, scale, digits) in HISTOGRAMS.items():
        buckets = [
            {label: value for (metric, label), value in parse(saw[when]).items() if metric == name}
            for when in ("before", "after")
        ]
        assert buckets[0] == buckets[1], "no request ended meanwhile"
        for label, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
            expected = percentile(buckets[0], share)
            assert expected is not None
            shown = float(re.sub(r"[^\d.]", "", saw["tiles"][f"{title} {label}"]))
            assert shown == pytest.approx(expected * scale, abs=0.51 * 10**-digits), f"{title} {label}"


def test_a_scale_button_scales(saw: dict[str, Any]) -> None:
    assert saw["sizes"] == ["2 / 2", "1 / 1"]


def test_a_request_has_its_waterfall_and_workers_are_listed(saw: dict[str, Any]) -> None:
    for part in ("prefill_queue", "prefill_compute", "relay", "1: prefill-0", "hand-off", "1: decode-0"):
        assert part in saw["waterfall"]
    assert "prefill-0 prefill serving" in saw["workers"]
    assert "decode-0 decode serving" in saw["workers"]


def test_it_is_dark_on_demand_and_fits_a_phone(saw: dict[str, Any]) -> None:
    assert saw["dark"] == "rgb(16, 19, 23)"
    assert saw["phone"]["content"] <= saw["phone"]["width"] == 375
    assert all((saw["directory"] / f"{name}.png").stat().st_size > 20_000 for name in ("light", "dark", "phone"))


def test_nothing_comes_from_elsewhere_and_nothing_goes_wrong(saw: dict[str, Any]) -> None:
    assert len(saw["resources"]) > 6
    assert [name for name in saw["resources"] if not name.startswith((f"{URL}/", "data:"))] == []
    assert saw["console"] == []
