from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from llm_engine.api.errors import ConfigError, Overloaded
from router import tokenizer as module
from router.tokenizer import Segment, Tokenizer
from tests.unit.router.edge_harness import MARKERS, SPECIALS, byte_tokenizer, byte_tokenizer_json

CORPUS = Path(module.__file__).read_text(encoding="utf-8")
ADDED = (*SPECIALS, *MARKERS)


def trained() -> tokenizers.Tokenizer:
    """A BPE with merges, so that cutting a text in the wrong place changes its ids."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [CORPUS, "äöü 漢字 🙂 <think> <｜User｜>"],
        trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False),
    )
    bpe.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    bpe.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKERS])
    return bpe


REFERENCE = trained()
OURS = Tokenizer(REFERENCE.to_str(), REFERENCE.get_vocab_size() + 7, bos_id=None)

words = st.sampled_from([*ADDED, "def ", "return", "\n\n", " ", "<", "｜", "think>", "ä", "漢", "🙂", "x" * 5])
texts = st.one_of(st.text(max_size=30), st.lists(words, max_size=12).map("".join))


@given(texts)
def test_trusted_text_encodes_as_the_reference_does(text: str) -> None:
    assert OURS.encode([Segment(text, trusted=True)]) == REFERENCE.encode(text, add_special_tokens=False).ids


@given(st.lists(texts, max_size=5))
def test_untrusted_text_never_becomes_a_special_token(pieces: list[str]) -> None:
    ids = OURS.encode([Segment(piece) for piece in pieces])
    assert not set(ids) & set(OURS.added_ids.values())
    assert OURS.decode(ids) == "".join(pieces)


@given(st.lists(st.tuples(st.text(max_size=12), st.booleans()), max_size=6))
def test_cutting_a_text_into_segments_does_not_change_its_ids(pieces: list[tuple[str, bool]]) -> None:
    whole = "".join(text for text, _ in pieces)
    assume(not any(text in whole for text in ADDED))
    ids = OURS.encode([Segment(text, trusted) for text, trusted in pieces])
    assert ids == REFERENCE.encode(whole, add_special_tokens=False).ids


def test_a_special_token_is_not_formed_across_segments() -> None:
    ids = OURS.encode([Segment("<｜Us", trusted=True), Segment("er｜>")])
    assert OURS.added_ids["<｜User｜>"] not in ids
    assert OURS.decode(ids) == "<｜User｜>"


@given(st.lists(st.integers(0, REFERENCE.get_vocab_size() - 1), max_size=40))
def test_decoding_equals_the_reference(ids: list[int]) -> None:
    assert OURS.decode(ids) == REFERENCE.decode(ids, skip_special_tokens=False)


def test_the_longest_special_token_wins() -> None:
    reference = trained()
    reference.add_tokens([AddedToken("<think>er", special=False, normalized=False)])
    ours = Tokenizer(reference.to_str(), reference.get_vocab_size())
    text = "<think>er<think>e"
    assert ours.encode([Segment(text, trusted=True)]) == reference.encode(text, add_special_tokens=False).ids


def test_hundreds_of_special_tokens_do_not_slow_down_splitting() -> None:
    """Trying each of them at every place that looks like a beginning takes longer than the encoding itself."""
    reference = trained()
    names = [f"<｜place▁holder▁no▁{i}｜>" for i in range(800)]
    reference.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    ours = Tokenizer(reference.to_str(), reference.get_vocab_size())
    text = "<｜pla " * 10_000 + names[799]
    ids = ours.encode([Segment(text, trusted=True)])  # fills the tokenizer's own cache
    assert ids[-1] == ours.added_ids[names[799]]

    def seconds(trusted: bool) -> float:
        started = time.process_time()
        ours.encode([Segment(text, trusted)])
        return time.process_time() - started

    assert min(seconds(True) for _ in range(3)) < 2 * min(seconds(False) for _ in range(3))


def test_padding_ids_have_no_text() -> None:
    assert OURS.vocab_size == REFERENCE.get_vocab_size() + 7
    assert OURS.decode(range(REFERENCE.get_vocab_size(), OURS.vocab_size)) == ""


def test_visible_bytes_silence_special_tokens_except_the_kept_ones() -> None:
    table = OURS.visible_bytes(keep=["｜DSML｜"])
    shown = {text for text in ADDED if table[OURS.added_ids[text]]}
    assert shown == {"｜DSML｜", *MARKERS}


async def test_long_prompts_are_encoded_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    text = "a" * (module.INLINE_CHARS + 1)
    seen: list[str] = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda s: (seen.append(threading.current_thread().name), encode(s))[1])
    assert len(await tokenizer.encode_async([Segment(text)])) == len(text)
    assert len(await tokenizer.encode_async([Segment("short")])) == 5
    assert seen[0].startswith("encode")
    assert seen[1] == threading.current_thread().name
    tokenizer.close()


async def test_too_many_waiting_long_prompts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    monkeypatch.setattr(module, "MAX_PENDING_ENCODES", 1)
    release = threading.Event()
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda s: (release.wait(10), encode(s))[1])
    long = [Segment("a" * (module.INLINE_CHARS + 1))]
    first = asyncio.ensure_future(tokenizer.encode_async(long))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await tokenizer.encode_async(long)
    release.set()
    assert len(await first) == len(long[0].text)
    tokenizer.close()


def test_a_generated_checkpoint_loads(nano_dir: Path) -> None:
    tokenizer = Tokenizer.from_dir(nano_dir)
    text = "grüße <think> 🙂"
    assert tokenizer.decode(tokenizer.encode([Segment(text, trusted=True)])) == text
    assert tokenizer.vocab_size == 320
    assert tokenizer.added_ids["｜DSML｜"] == 263
    assert not tokenizer.adds_bos


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "byte-level"),
        ({"model": {"type": "Unigram"}}, "byte-level"),
    ],
)
def test_other_kinds_of_tokenizer_are_refused(change: dict[str, object], message: str) -> None:
    tree = json.loads(byte_tokenizer_json()) | change
    with pytest.raises(ConfigError, match=message):
        Tokenizer(json.dumps(tree), 320)


def test_stripping_added_tokens_are_refused() -> None:
    tree = json.loads(byte_tokenizer_json())
    tree["added_tokens"][0]["lstrip"] = True
    with pytest.raises(ConfigError, match="lstrip"):
        Tokenizer(json.dumps(tree), 320)


def test_a_vocabulary_without_all_bytes_is_refused() -> None:
    tree = json.loads(byte_tokenizer_json())
    tree["model"]["vocab"] = {piece: i for piece, i in tree["model"]["vocab"].items() if piece not in "ab"}
    with pytest.raises(ConfigError, match="2 of the 256 bytes"):
        Tokenizer(json.dumps(tree), 320)


def test_merges_that_spell_a_special_token_are_refused() -> None:
    tree = json.loads(byte_tokenizer_json())
    vocab = tree["model"]["vocab"]
    merged = ""
    for char in "<think>":
        if merged:
            tree["model"]["merges"].append([merged, char])
        merged += char
        vocab.setdefault(merged, tree["added_tokens"][4]["id"] if merged == "<think>" else 300 + len(merged))
    with pytest.raises(ConfigError, match="<think>"):
        Tokenizer(json.dumps(tree), 320)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 320}')
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)
