"""What every request handler needs, built once."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from llm_engine.api.config import ClusterConfig, RouterConfig
from llm_engine.api.errors import RequestError, UnknownModel
from router.chat.format import ChatFormat, load_chat_format
from router.dispatch_api import Dispatcher, EdgeMetrics
from router.logprobs import LogprobFormatter
from router.sampling import Limits
from router.tokenizer import INLINE_CHARS, Segment, Tokenizer

MAX_SEQUENCES = 128  # prompts times choices of one HTTP request


class Edge:
    """The served model as the HTTP side sees it."""

    def __init__(
        self,
        config: RouterConfig,
        dispatcher: Dispatcher,
        metrics: EdgeMetrics,
        tokenizer: Tokenizer,
        chat: ChatFormat,
    ) -> None:
        self.config = config
        self.dispatcher = dispatcher
        self.metrics = metrics
        self.tokenizer = tokenizer
        self.chat = chat
        self.logprobs = LogprobFormatter(tokenizer.token_bytes)
        self.completion_bytes = tokenizer.visible_bytes()
        self.chat_bytes = tokenizer.visible_bytes(keep=chat.markers)
        self.started = int(time.time())
        self._limits = Limits(
            max_model_len=dispatcher.max_model_len,
            vocab_size=tokenizer.vocab_size,
            max_n=config.max_n,
            max_logprobs=config.max_logprobs,
            max_sequences=MAX_SEQUENCES,
        )

    @classmethod
    def load(cls, config: ClusterConfig, dispatcher: Dispatcher, metrics: EdgeMetrics) -> Edge:
        """Read tokenizer and chat format of the configured checkpoint. Raises ConfigError."""
        model_dir: Path = config.model.path
        return cls(config.router, dispatcher, metrics, Tokenizer.from_dir(model_dir), load_chat_format(model_dir))

    @property
    def limits(self) -> Limits:
        """The limits now; the context may depend on the workers that are up."""
        if self._limits.max_model_len != self.dispatcher.max_model_len:
            self._limits = dataclasses.replace(self._limits, max_model_len=self.dispatcher.max_model_len)
        return self._limits

    def check_model(self, name: str) -> None:
        """Raises UnknownModel."""
        if name not in self.dispatcher.model_names:
            served = ", ".join(self.dispatcher.model_names)
            raise UnknownModel(f"the model {name!r} is not served here; served: {served}", param="model")

    async def encode(self, segments: tuple[Segment, ...]) -> list[int]:
        """Token ids of a prompt. Raises RequestError for one that can't fit, without tokenising it."""
        size = sum([len(segment.text) for segment in segments])
        if size <= INLINE_CHARS:
            return self.tokenizer.encode(segments)
        if size > self.dispatcher.max_model_len * self.tokenizer.longest_token:
            raise RequestError(
                f"a prompt of {size} characters can't fit into {self.dispatcher.max_model_len} tokens", param="prompt"
            )
        return await self.tokenizer.encode_async(segments)
