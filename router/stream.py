"""From token chunks to text that may be shown: incremental UTF-8, stop strings with hold-back, exact token counts.

What a TextStream emits depends on the tokens alone, never on how they were cut into chunks.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Literal

import msgspec

from llm_engine.api.errors import ServingError
from llm_engine.api.request import FinishReason, TokenLogprobs
from router.dispatch_api import OutputChunk

Finish = Literal["stop", "length"]

_utf8_decoder = codecs.getincrementaldecoder("utf-8")
_FINISH: dict[FinishReason, Finish] = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


def held_suffix(text: str, markers: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that a following piece could complete to one of `markers`."""
    longest = 0
    for marker in markers:
        start = max(0, len(text) - len(marker) + 1)
        while len(text) - start > longest and (start := text.find(marker[0], start)) >= 0:
            if marker.startswith(text[start:]):
                longest = max(longest, len(text) - start)
                break
            start += 1
    return longest


class StopStrings:
    """Finds the stop string that is completed first; holds back text that could be the beginning of one."""

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = stops
        self._include = include
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Returns (text that may be shown, whether a stop string is complete). Feed nothing more after one is."""
        buffer = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := buffer.find(stop)) >= 0]
        if found:
            end, start = min(found)
            self._held = ""
            return buffer[: end if self._include else start], True
        shown = len(buffer) - held_suffix(buffer, self._stops)
        self._held = buffer[shown:]
        return buffer[:shown], False

    def flush(self) -> str:
        """The text held back, now that no more will follow."""
        held, self._held = self._held, ""
        return held


class Piece(msgspec.Struct):
    """What one chunk adds to a choice. `tokens` may run ahead of `text`, which can be held back for a while."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None
    offsets: list[int] | None  # with logprobs: characters of the choice's text in front of each token
    finish: Finish | None


class TextStream:
    """The text of one choice. After a Piece with `finish`, feed nothing more."""

    def __init__(
        self,
        table: Sequence[bytes],
        *,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        want_offsets: bool = False,
    ) -> None:
        """`table`: the bytes each token id shows. Text of the first `min_tokens` tokens can't stop the stream."""
        self._table = table
        self._decoder: codecs.IncrementalDecoder | None = None  # between two chunks
        self._stops = StopStrings(stops, include_stop) if stops else None
        self._include_stop = include_stop
        self._unchecked = min_tokens
        self._want_offsets = want_offsets
        self._num_chars = 0
        self.num_tokens = 0
        self.cached_tokens = 0

    def feed(self, chunk: OutputChunk) -> Piece:
        """Raises ServingError for a chunk that ends otherwise than by STOP or LENGTH."""
        finish: Finish | None = None
        if chunk.finish is not None:
            finish = _FINISH.get(chunk.finish)
            if finish is None:
                raise ServingError(f"generation ended early: {chunk.finish}")
        if chunk.cached_tokens is not None:
            self.cached_tokens = chunk.cached_tokens
        if self._stops is None and not self._want_offsets:
            return self._feed_fast(chunk, finish)
        return self._feed_each(chunk, finish)

    def _feed_fast(self, chunk: OutputChunk, finish: Finish | None) -> Piece:
        table = self._table
        tokens = chunk.tokens
        self.num_tokens += len(tokens)
        if finish is None:
            data = b"".join([table[token] for token in tokens])
        else:
            data = b"".join([table[token] for token in self._shown(tokens, finish)])
        return Piece(self._text(data, finish is not None), tokens, chunk.logprobs, None, finish)

    def _text(self, data: bytes, last: bool) -> str:
        """What is complete of the text so far and was not returned before; bytes that are not UTF-8 become U+FFFD."""
        if self._decoder is None:
            if last:
                return data.decode("utf-8", "replace")
            self._decoder = _utf8_decoder("replace")
        return self._decoder.decode(data, last)

    def _feed_each(self, chunk: OutputChunk, finish: Finish | None) -> Piece:
        """Token by token: needed when the place of each token in the text matters."""
        shown: list[str] = []
        offsets: list[int] = []
        num_shown = len(self._shown(chunk.tokens, finish))
        for i, token in enumerate(chunk.tokens):
            offsets.append(self._num_chars)
            self.num_tokens += 1
            text = self._text(self._table[token], False) if i < num_shown else ""
            if self._show(text, shown):
                return self._piece(shown, chunk, i + 1, offsets, "stop")
        if finish is not None:
            if self._show(self._text(b"", True), shown):
                finish = "stop"
            elif self._stops is not None:
                shown.append(self._stops.flush())
        return self._piece(shown, chunk, len(chunk.tokens), offsets, finish)

    def _show(self, text: str, shown: list[str]) -> bool:
        """Append what may be shown of `text`; whether a stop string is complete."""
        self._num_chars += len(text)
        stopped = False
        if self._stops is not None and self.num_tokens > self._unchecked:
            text, stopped = self._stops.feed(text)
        shown.append(text)
        return stopped

    def _shown(self, tokens: list[int], finish: Finish | None) -> list[int]:
        """The token that ended the sequence is not part of its text."""
        return tokens[:-1] if finish == "stop" and not self._include_stop else tokens

    def _piece(
        self, shown: list[str], chunk: OutputChunk, num_tokens: int, offsets: list[int], finish: Finish | None
    ) -> Piece:
        logprobs = None if chunk.logprobs is None else chunk.logprobs[:num_tokens]
        return Piece(
            "".join(shown), chunk.tokens[:num_tokens], logprobs, offsets if self._want_offsets else None, finish
        )
