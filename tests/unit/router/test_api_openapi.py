from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_engine.api.request import FinishReason
from tests.unit.router.edge_harness import (
    MODEL,
    RunningEdge,
    Script,
    ScriptedDispatcher,
    byte_tokenizer,
    ids_of,
    running_edge,
)

CONFIG = Path(__file__).parent / "schemathesis.toml"
CHUNKS = [[token] for token in ids_of(byte_tokenizer(), "hé")]


@pytest.fixture(scope="module")
def edge() -> Iterator[RunningEdge]:
    dispatcher = ScriptedDispatcher(lambda request: Script(CHUNKS, finish=FinishReason.LENGTH))
    with running_edge(dispatcher, max_n=3, max_logprobs=4) as running:
        yield running


def schemathesis(edge: RunningEdge, tmp_path: Path, *options: str) -> None:
    """Runs the fuzzer as a user would; it fails on undocumented answers, wrong schemas and accepted nonsense."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG)),
        *("run", f"{edge.url}/openapi.json", "--url", edge.url, "--seed", "1", *options),
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=110, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert not [entry for entry in edge.metrics.responses if entry[1] >= 500]


def test_random_requests_get_documented_answers(edge: RunningEdge, tmp_path: Path) -> None:
    schemathesis(edge, tmp_path, "--phases", "fuzzing", "--max-examples", "4")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_boundary_values_of_every_field_get_documented_answers(edge: RunningEdge, tmp_path: Path) -> None:
    schemathesis(edge, tmp_path, "--max-examples", "20")


def test_the_document_has_the_limits_of_this_server(edge: RunningEdge) -> None:
    document = edge.http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    completion = schemas["CompletionBody"]["properties"]
    assert completion["model"]["enum"] == [MODEL]
    assert completion["n"]["anyOf"][0]["maximum"] == 3
    assert completion["logprobs"]["anyOf"][0]["maximum"] == 4
    ids = completion["prompt"]["anyOf"][1]
    assert (ids["items"]["maximum"], ids["maxItems"]) == (319, 4095)
    assert schemas["ChatBody"]["additionalProperties"] is False
    assert set(document["paths"]) == {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/{model}",
        "/health",
        "/ready",
        "/metrics",
        "/openapi.json",
        "/tokenize",
        "/detokenize",
    }
