"""The trained checkpoint on the card: what it knows, by pages, and what drafts gain. Both through the router."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks import accuracy
from deploy.commands import SHIPPED_MODEL
from tests.gpu.conftest import Note
from tests.gpu.test_workers import cluster, started

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(280)]

_LEAST_RIGHT = 0.85  # of all questions; on the CPU in fp32 nine of ten answers are right
_COUNT_TO = 60


@pytest.mark.parametrize("dtype", ["bf16-auto", "bf16-fp8", "fp8-fp8"])
def test_it_knows_what_it_knows_on_the_cpu(dtype: str, tmp_path: Path, note: Note) -> None:
    weights, pages = dtype.split("-")
    pair = cluster(SHIPPED_MODEL, tmp_path / "run", "shm", pages)
    pair.settings |= {
        "model.max_len": 4096, "kv.num_blocks": 2048, "engine.numerics": "fast", "engine.dtype": weights
    }  # fmt: skip
    started(pair)
    try:
        out = tmp_path / "report.json"
        args = ["--url", pair.url, "--samples", "20", "--concurrency", "16", "--json", "--out", str(out)]
        assert accuracy.main(args) == 0
    finally:
        pair.stop()
    report = json.loads(out.read_text())
    scores = {name: skill["score"] for name, skill in report["skills"].items()}
    right = sum(s["right"] for s in report["skills"].values()) / sum(s["samples"] for s in report["skills"].values())
    note(weights=weights, pages=pages, right=round(right, 4), **scores, wall_s=report["wall_s"])
    assert report["errors"] == 0
    assert right > _LEAST_RIGHT, report["wrong"][:3]


def test_drafts_gain_time(tmp_path: Path, note: Note) -> None:
    """One stream at a time, greedy, of text that the model knows how to go on with."""
    tokens_per_s = {}
    texts = set()
    for num_drafts in (0, 1, 2, 3):
        one = cluster(SHIPPED_MODEL, tmp_path / str(num_drafts), "auto", "auto", prefill=0, decode=0, aggregated=1)
        one.settings |= {"model.max_len": 2048, "engine.num_drafts": num_drafts}
        started(one)
        try:
            asyncio.run(_ask(one.url))
            begun = time.monotonic()
            answers = asyncio.run(_ask(one.url))
            seconds = time.monotonic() - begun
            accepted, drafted = _acceptance(one.infos["aggregated-0"]["metrics_addr"])
        finally:
            one.stop()
        texts.add(json.dumps([answer["text"] for answer in answers]))
        count = sum(answer["count"] for answer in answers)
        tokens_per_s[num_drafts] = round(count / seconds, 1)
        note(
            num_drafts=num_drafts, tokens_per_s=tokens_per_s[num_drafts], tokens=count,
            accepted_share=round(accepted / drafted, 4) if drafted else None,
        )  # fmt: skip
    assert len(texts) == 1, "drafts change no token"


async def _ask(url: str) -> list[dict[str, Any]]:
    prompt = " ".join(f"{n}" for n in range(1, _COUNT_TO))
    bodies = [
        {"model": "baton", "prompt": prompt + tail, "max_tokens": 200, "temperature": 0.0, "ignore_eos": True}
        for tail in ("", " " + str(_COUNT_TO), ", and again 1 2 3")
    ]
    answers = []
    async with httpx.AsyncClient(base_url=url, timeout=100.0, trust_env=False) as http:
        for body in bodies:
            response = await http.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            tree = response.json()
            answers.append({"text": tree["choices"][0]["text"], "count": tree["usage"]["completion_tokens"]})
    return answers


def _acceptance(address: str) -> tuple[float, float]:
    """Drafts accepted and verified, over all positions."""
    text = httpx.get(address, trust_env=False).text
    values = {"baton_accepted_tokens_total": 0.0, "baton_draft_tokens_total": 0.0}
    for line in text.splitlines():
        name = line.partition("{")[0]
        if name in values:
            values[name] += float(line.split()[-1])
    return values["baton_accepted_tokens_total"], values["baton_draft_tokens_total"]
