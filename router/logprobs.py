"""Log probabilities in the two shapes of the API."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from llm_engine.api.request import TokenLogprobs
from router.answers import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

IMPOSSIBLE = -9999.0  # JSON has no infinity


class LogprobFormatter:
    """Knows the texts of tokens. Shared by all requests."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._text = functools.lru_cache(maxsize=1 << 16)(self._token_text)

    def chat(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs], num_top: int) -> ChatLogprobs:
        """One entry per token, with the `num_top` most likely alternatives."""
        return ChatLogprobs(
            [
                TokenLogprob(
                    self._decoded(token),
                    _finite(entry.logprob),
                    list(self._token_bytes[token]),
                    [
                        TopLogprob(self._decoded(top), _finite(logprob), list(self._token_bytes[top]))
                        for top, logprob in zip(entry.top_ids[:num_top], entry.top_logprobs, strict=False)
                    ],
                )
                for token, entry in zip(tokens, logprobs, strict=True)
            ]
        )

    def completion(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs], num_top: int, offsets: Sequence[int]
    ) -> CompletionLogprobs:
        """Parallel lists; the drawn token is among the alternatives even if it is not one of the most likely."""
        tops: list[dict[str, float]] = []
        for token, entry in zip(tokens, logprobs, strict=True):
            top = zip(entry.top_ids[:num_top], entry.top_logprobs, strict=False)
            tops.append({self._text(alternative): _finite(logprob) for alternative, logprob in top})
            tops[-1].setdefault(self._text(token), _finite(entry.logprob))
        return CompletionLogprobs(
            [self._text(token) for token in tokens],
            [_finite(entry.logprob) for entry in logprobs],
            tops,
            list(offsets),
        )

    def _decoded(self, token: int) -> str:
        return self._token_bytes[token].decode("utf-8", "replace")

    def _token_text(self, token: int) -> str:
        """A name that differs between tokens: the text, or the bytes where they are not UTF-8 on their own."""
        data = self._token_bytes[token]
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return logprob if logprob > IMPOSSIBLE else IMPOSSIBLE
