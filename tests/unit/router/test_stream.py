from __future__ import annotations

import codecs
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llm_engine.api.errors import ServingError
from llm_engine.api.request import FinishReason, TokenLogprobs
from router.dispatch_api import OutputChunk
from router.stream import Piece, TextStream, held_suffix

WORD = 8
END = 9  # the id that ends a sequence
TABLE = [b"a", b"b", b"ab", b"\n\n", b"\xc3", b"\xa4", b"\xf0\x9f", b"\x99\x82", b"abba", b"</end>"]  # halves of ä, 🙂
TOKEN = st.integers(0, END - 1)


def split(tokens: Sequence[int], cuts: Sequence[int]) -> list[list[int]]:
    borders = sorted({min(cut, len(tokens)) for cut in cuts} | {0, len(tokens)})
    return [list(tokens[a:b]) for a, b in pairwise(borders)] or [[]]


def run(chunks: list[list[int]], finish: FinishReason, **options: object) -> tuple[str, list[int], str | None]:
    """(text, tokens, finish) of a stream; stops feeding at the first finish, as callers do."""
    stream = TextStream(TABLE, **options)  # type: ignore[arg-type]
    text, tokens = "", list[int]()
    for i, chunk in enumerate(chunks):
        piece = stream.feed(OutputChunk(tokens=chunk, finish=finish if i == len(chunks) - 1 else None))
        text += piece.text
        tokens += piece.tokens
        if piece.finish is not None:
            assert stream.num_tokens == len(tokens)
            return text, tokens, piece.finish
    raise AssertionError("no finish")


def expected(
    tokens: list[int], finish: FinishReason, stops: list[str], include: bool, min_tokens: int
) -> tuple[str, list[int], str]:
    """The definition: the first token that completes a stop string (in text behind min_tokens) ends the text."""
    ends = finish is FinishReason.STOP
    shown = tokens[:-1] if ends and not include else tokens
    data = b"".join(TABLE[t] for t in shown)
    start = len(_complete(b"".join(TABLE[t] for t in shown[:min_tokens])))
    for count in range(min_tokens + 1, len(tokens) + 1):
        known = _complete(b"".join(TABLE[t] for t in shown[:count]))
        for text in (known, data.decode("utf-8", "replace")) if count == len(tokens) else (known,):
            found = [(at + len(stop), at) for stop in stops if (at := text.find(stop, start)) >= 0]
            if found:
                end, begin = min(found)
                return text[: end if include else begin], tokens[:count], "stop"
    return data.decode("utf-8", "replace"), tokens, "stop" if ends else "length"


def _complete(data: bytes) -> str:
    """Decoded without an incomplete character at the end."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


STOPS = st.lists(
    st.sampled_from(["a", "ab", "ba", "bab", "\n\na", "ä", "🙂b", "\n", "�", "aab"]), max_size=3, unique=True
)


@given(
    st.lists(TOKEN, max_size=20),
    st.lists(st.integers(0, 20), max_size=6),
    STOPS,
    st.booleans(),
    st.integers(0, 4),
    st.booleans(),
)
@example([0, 1, 0, 1], [1, 2, 3], ["bab"], False, 0, False)
@example([4, 5], [1], ["ä"], True, 0, True)
@example([6], [], ["�"], False, 0, False)
def test_text_and_token_count_follow_the_definition_however_chunks_are_cut(
    tokens: list[int], cuts: list[int], stops: list[str], include: bool, min_tokens: int, ended: bool
) -> None:
    tokens = [*tokens, END] if ended else tokens
    finish = FinishReason.STOP if ended else FinishReason.LENGTH
    want = expected(tokens, finish, stops, include, min_tokens)
    options = {"stops": stops, "include_stop": include, "min_tokens": min_tokens}
    chunks = split(tokens, cuts)
    assert run(chunks, finish, **options) == want
    assert run(chunks, finish, **options, want_offsets=True) == want
    if not ended:  # the finish may also come on its own
        assert run([*chunks, []], finish, **options) == want


@given(st.lists(TOKEN, max_size=20), st.lists(st.integers(0, 20), max_size=6))
def test_text_without_stops_is_that_of_all_bytes_at_once(tokens: list[int], cuts: list[int]) -> None:
    text, _, _ = run(split(tokens, cuts), FinishReason.LENGTH)
    assert text == b"".join(TABLE[token] for token in tokens).decode("utf-8", "replace")


def test_the_stop_string_that_ends_first_wins_then_the_longer_one() -> None:
    assert run([[0, 1, 0]], FinishReason.LENGTH, stops=["aba", "b"])[0] == "a"
    assert run([[1, 0, 1]], FinishReason.LENGTH, stops=["ab", "bab"])[0] == ""
    assert run([[WORD]], FinishReason.LENGTH, stops=["abba", "bb"])[0] == "a"


def test_text_is_held_back_only_while_it_could_become_a_stop_string() -> None:
    stream = TextStream(TABLE, stops=["abb"])
    pieces = [stream.feed(OutputChunk(tokens=[token])).text for token in (0, 1, 0, 1)]
    assert pieces == ["", "", "ab", ""]
    assert stream.feed(OutputChunk(tokens=[1])) == Piece("", [1], None, None, "stop")


def test_held_text_is_released_at_the_end() -> None:
    assert run([[0, 1]], FinishReason.LENGTH, stops=["abb"]) == ("ab", [0, 1], "length")
    assert run([[0, 1, END]], FinishReason.STOP, stops=["abb"]) == ("ab", [0, 1, END], "stop")


def test_logprobs_are_cut_with_the_tokens_and_offsets_count_characters() -> None:
    logprobs = [TokenLogprobs(-float(i), [], []) for i in range(4)]
    stream = TextStream(TABLE, stops=["ba"], want_offsets=True)
    piece = stream.feed(OutputChunk(tokens=[2, 5, 1, 0], logprobs=logprobs))
    assert piece.finish == "stop"
    assert piece.logprobs == logprobs
    assert piece.offsets == [0, 2, 3, 4]
    early = TextStream(TABLE, stops=["b"], want_offsets=True).feed(OutputChunk(tokens=[0, 1, 0, 0], logprobs=logprobs))
    assert (early.tokens, early.logprobs, early.offsets) == ([0, 1], logprobs[:2], [0, 1])


def test_the_end_token_is_counted_but_has_no_text() -> None:
    assert run([[0, END]], FinishReason.STOP) == ("a", [0, END], "stop")
    assert run([[0, END]], FinishReason.STOP, include_stop=True) == ("a</end>", [0, END], "stop")
    assert run([[0, END]], FinishReason.LENGTH) == ("a</end>", [0, END], "length")


def test_cached_tokens_are_kept() -> None:
    stream = TextStream(TABLE)
    stream.feed(OutputChunk(tokens=[0], cached_tokens=7))
    stream.feed(OutputChunk(tokens=[0]))
    assert stream.cached_tokens == 7


@pytest.mark.parametrize("finish", [FinishReason.CANCELLED, FinishReason.DEADLINE])
def test_an_abnormal_finish_is_an_error(finish: FinishReason) -> None:
    with pytest.raises(ServingError):
        TextStream(TABLE).feed(OutputChunk(tokens=[], finish=finish))


@given(st.text("ab\n<", max_size=12), st.lists(st.text("ab\n<", min_size=1, max_size=5), min_size=1, max_size=3))
def test_held_suffix_is_the_longest_proper_beginning_of_a_marker(text: str, markers: list[str]) -> None:
    candidates = [
        n for n in range(len(text) + 1) if any(len(m) > n and m.startswith(text[len(text) - n :]) for m in markers)
    ]
    assert held_suffix(text, markers) == max(candidates)
