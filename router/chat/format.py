"""The chat format of a model family: how conversations are written, and how answers are read."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from llm_engine.api.errors import ConfigError
from router.chat import dsml
from router.chat.encoding import Conversation, Rendered, render
from router.chat.events import Event
from router.chat.parser import AnswerParser
from router.chat.template import PromptTexts
from router.tokenizer import read_json


class Parser(Protocol):
    """Reads one answer. What it emits must not depend on how the text is cut."""

    @property
    def num_complete_calls(self) -> int:
        """Calls whose end has been seen."""
        ...

    @property
    def done(self) -> bool:
        """Nothing that follows matters any more."""
        ...

    def feed(self, text: str) -> list[Event]:
        """Events that `text` completes."""
        ...

    def finish(self) -> list[Event]:
        """Events held back so far; call once."""
        ...


class ChatFormat(Protocol):
    """Stateless; shared by all requests."""

    @property
    def markers(self) -> tuple[str, ...]:
        """Special tokens whose text the parser needs to see."""
        ...

    def render(self, conversation: Conversation) -> Rendered:
        """Raises RequestError for a conversation that has no rendering."""
        ...

    def forced_call(self, name: str | None) -> str:
        """The beginning of an answer that is a call: of the function `name`, or of one that the model chooses."""
        ...

    def parser(self, *, in_reasoning: bool) -> Parser:
        """A parser for one answer."""
        ...


class DeepseekV32Format:
    """DeepSeek V3.2; also used for V3 checkpoints, whose tokenizers know the same turn markers."""

    markers = dsml.MARKERS

    def __init__(self, texts: PromptTexts) -> None:
        self._texts = texts

    def render(self, conversation: Conversation) -> Rendered:
        return render(conversation, self._texts)

    def forced_call(self, name: str | None) -> str:
        call = f'{dsml.CALLS_GAP}{dsml.CALLS_OPEN}\n{dsml.INVOKE_OPEN} name="'
        return call if name is None else f'{call}{name}">\n'

    def parser(self, *, in_reasoning: bool) -> Parser:
        return AnswerParser(in_reasoning=in_reasoning)


_FORMATS = {"DeepseekV32ForCausalLM": DeepseekV32Format, "DeepseekV3ForCausalLM": DeepseekV32Format}


def load_chat_format(model_dir: Path) -> ChatFormat:
    """The format of a checkpoint directory, by its architecture. Raises ConfigError for one that has none."""
    architectures = read_json(model_dir / "config.json").get("architectures") or ["none"]
    kind = _FORMATS.get(architectures[0])
    if kind is None:
        known = ", ".join(_FORMATS)
        raise ConfigError(f"{model_dir}: no chat format for architecture {architectures[0]!r}; known: {known}")
    return kind(PromptTexts.from_dir(model_dir))
