"""The trained checkpoint on the card: what it knows, by pages, and what drafts gain."""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmarks import accuracy
from deploy.commands import SHIPPED_MODEL
from llm_engine.runtime.engine import Engine
from llm_engine.training.render import prompt_text
from llm_engine.training.samples import draw
from llm_engine.training.skills import EVALUATION
from tests.gpu.conftest import Note
from tests.gpu.lab import Lab
from tests.gpu.test_workers import cluster, started
from tests.unit.sched.requests import submit_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

_LEAST_RIGHT = 0.85  # of all questions; on the CPU in fp32 nine of ten answers are right


@pytest.mark.parametrize("dtype", ["bf16-auto", "fp8-fp8"])
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


@pytest.mark.parametrize("num_seqs", [1, 16])
def test_drafts_gain_time(num_seqs: int, note: Note) -> None:
    """Greedy answers to what it was trained on, engine only: what a draft saves and what it costs."""
    lab = Lab.load(SHIPPED_MODEL, numerics="fast", dtype="bf16", pages="fp8", max_len=1024)
    tokenizer = Tokenizer.from_file(str(SHIPPED_MODEL / "tokenizer.json"))
    texts = [prompt_text(draw(EVALUATION["tool-result"], random.Random(i), held_out=True)) for i in range(num_seqs)]
    prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    outputs = {}
    for num_drafts in (0, 1, 2, 3):
        driver, _ = lab.driver(num_drafts=num_drafts, graphs=True, chunk=512, max_num_seqs=num_seqs, num_blocks=1024)
        for attempt in ("warm", "timed"):
            for i, prompt in enumerate(prompts):
                driver.engine.add(submit_of(prompt, f"{attempt}{i}", max_tokens=96, ignore_eos=True))
            while driver.engine.load().num_waiting or driver.engine.load().waiting_tokens:
                driver.engine.step()
            outputs[num_drafts], seconds, steps, accepted, drafted = _decode(driver.engine)
        count = sum(map(len, outputs[num_drafts].values()))
        note(
            num_seqs=num_seqs, num_drafts=num_drafts, tokens_per_s=round(count / seconds, 1),
            step_ms=round(1e3 * seconds / steps, 3), tokens_a_step=round(count / steps / num_seqs, 3),
            accepted=round(accepted / drafted, 3) if drafted else None,
        )  # fmt: skip
        assert count > 80 * num_seqs


def _decode(engine: Engine) -> tuple[dict[str, list[int]], float, int, int, int]:
    """Run to the end: tokens of every request, seconds, steps, drafts accepted and verified."""
    tokens: dict[str, list[int]] = defaultdict(list)
    steps = accepted = drafted = 0
    begun = time.perf_counter()
    while (result := engine.step()) is not None:
        steps += 1
        accepted += sum(result.stats.accepted)
        drafted += sum(result.stats.drafts)
        for deltas in result.deltas.values():
            for delta in deltas:
                tokens[delta.request_id] += delta.tokens
    return dict(tokens), time.perf_counter() - begun, steps, accepted, drafted
