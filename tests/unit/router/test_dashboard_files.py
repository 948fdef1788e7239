from __future__ import annotations

import hashlib
import importlib.resources
import re
from collections.abc import Iterator

import pytest

from router.dashboard import PATHS
from tests.unit.router.edge_harness import RunningEdge, Script, ScriptedDispatcher, running_edge

VENDORED = {  # uPlot 1.6.32 as published on npm
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "uPlot.LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}


@pytest.fixture(scope="module")
def edge() -> Iterator[RunningEdge]:
    with running_edge(ScriptedDispatcher(lambda request: Script([[10]]))) as edge:
        yield edge


@pytest.mark.parametrize("name", VENDORED)
def test_what_is_vendored_is_what_was_published(name: str) -> None:
    content = (importlib.resources.files("router.static") / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == VENDORED[name]


def test_every_file_is_served_and_the_page_asks_for_no_other(edge: RunningEdge) -> None:
    wanted: set[str] = set()
    for path in PATHS:
        answer = edge.http.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        if "uPlot" not in path:
            wanted |= set(re.findall(r'(?:src|href)="(/[^"]+)"', answer.text))
            wanted |= {f"/dashboard/{name}" for name in re.findall(r'from "\./([^"]+)"', answer.text)}
            assert not re.search(r"https?://(?!\$)", answer.text), f"{path} names another host"
    assert wanted | {"/dashboard"} == set(PATHS)


@pytest.mark.parametrize("path", ["/dashboard/", "/dashboard/__init__.py", "/dashboard/../admin.py", "/dashboard/x.js"])
def test_nothing_else_is_served(edge: RunningEdge, path: str) -> None:
    assert edge.http.get(path).status_code == 404
