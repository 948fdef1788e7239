"""What `make_checkpoint` writes: reproducible weights, a walk that the model follows, tokenizer and chat files."""

from __future__ import annotations

import ast
import hashlib
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GenerationConfig

from llm_engine.api.errors import ConfigError
from llm_engine.models.byte_tokenizer import BOS, EOS, MARKERS, build_tokenizer
from llm_engine.models.checkpoint import inspect_checkpoint
from llm_engine.models.spec import ModelSpec
from llm_engine.models.synthetic import make_checkpoint, planted_successors
from llm_engine.ops import Ops
from tests.models.harness import Harness


def file_digests(path: Path) -> dict[str, str]:
    return {
        str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in path.rglob("*") if f.is_file()
    }


def test_equal_seeds_write_equal_files(tmp_path: Path) -> None:
    for planted in (True, False):
        a, b, c = (
            file_digests(make_checkpoint("nano", tmp_path / f"{planted}{i}", seed=seed, planted=planted))
            for i, seed in enumerate((5, 5, 6))
        )
        assert a == b
        assert a["model.safetensors"] != c["model.safetensors"]


@pytest.mark.parametrize(
    ("size", "main", "mtp"), [("nano", 0.24, 0.08), ("tiny", 10.1, 2.9), ("tiny-v3", 9.4, 2.7), ("bench", 35.4, 0.0)]
)
def test_sizes_in_millions_of_parameters(size: str, main: float, mtp: float, tmp_path: Path) -> None:
    report = inspect_checkpoint(make_checkpoint(size, tmp_path))
    assert report["parameters"] / 1e6 == pytest.approx(main, abs=0.05)
    assert report["mtp_parameters"] / 1e6 == pytest.approx(mtp, abs=0.05)


def test_impossible_wishes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="size='huge': expected one of nano, tiny"):
        make_checkpoint("huge", tmp_path)
    with pytest.raises(ConfigError, match="dtype='fp64'"):
        make_checkpoint("nano", tmp_path, dtype="fp64")
    with pytest.raises(ConfigError, match=r"size=nano: .* fp8 block"):
        make_checkpoint("nano", tmp_path, fp8=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fixture", ["nano_planted_dir", "tiny_planted_dir"])
def test_greedy_output_and_drafts_follow_the_planted_walk(
    fixture: str, request: pytest.FixtureRequest, exact: Ops
) -> None:
    harness = Harness.load(request.getfixturevalue(fixture), exact)
    after = planted_successors(0)
    everything = list(range(264))  # every token of the tokenizer once, specials included
    hidden = harness.run([(0, 0, everything)])
    assert harness.logits(hidden).argmax(-1).tolist() == after
    walked = [after[token] for token in everything]
    drafts = harness.model.draft_logits(harness.run_mtp([(0, 0, walked)], hidden))
    assert drafts.argmax(-1).tolist() == [after[token] for token in walked]


def test_the_walk_is_valid_text_and_comes_back_to_its_start() -> None:
    after = planted_successors(3)
    walk = [1]
    while after[walk[-1]] != 1:
        walk.append(after[walk[-1]])
    assert len(walk) == len(set(walk)) == 1 + 96 + 2 + 3 + 4
    text = build_tokenizer().decode(walk[1:])
    assert sorted(text) == sorted([*map(chr, range(0x20, 0x7F)), "\n", "é", "中", "😀"])
    starts = {after[token] for token in range(264) if token not in walk}
    assert 1 not in starts
    assert not any(0x80 <= token - 3 < 0xC0 for token in starts), "a walk may not begin inside a character"


def test_specials_have_their_ids(nano_dir: Path) -> None:
    for tokenizer in (Tokenizer.from_file(str(nano_dir / "tokenizer.json")), build_tokenizer()):
        assert tokenizer.get_vocab_size() == 264
        assert [tokenizer.token_to_id(text) for text in (BOS, EOS, *MARKERS)] == [0, 1, 259, 260, 261, 262, 263]
        assert tokenizer.encode(f"{BOS}Aé<think>", add_special_tokens=False).ids == [0, 3 + 65, 3 + 0xC3, 3 + 0xA9, 259]


def test_transformers_loads_the_tokenizer(nano_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(nano_dir)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    text = f"{MARKERS[2]}ß 中\n😀{MARKERS[3]}</think>"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    config = GenerationConfig.from_pretrained(nano_dir)
    assert (config.eos_token_id, config.temperature, config.top_p) == (1, 1.0, 0.95)


TOKENIZER = build_tokenizer()


@given(st.text())
def test_any_text_survives_a_round_trip(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert ids == [3 + byte for byte in text.encode()]


def test_the_tools_template_is_a_literal_with_the_known_placeholders(nano_dir: Path) -> None:
    source = (nano_dir / "encoding" / "encoding_dsv32.py").read_text(encoding="utf-8")
    constants = {
        target.id: ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    template = constants["TOOLS_SYSTEM_TEMPLATE"]
    names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    assert names == {"dsml_token", "thinking_start_token", "thinking_end_token", "tool_schemas"}
    assert template.startswith("## Tools\n")
    assert ModelSpec.from_dir(nano_dir).eos_ids == (1,)
