"""The sentences of the prompt that belong to the model rather than to the server.

A checkpoint ships them as string constants in `encoding/encoding_dsv32.py`. That file is read as data: it is parsed,
never imported. Checkpoints without it get the wording below.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from llm_engine.api.errors import ConfigError
from router.chat import dsml
from router.tokenizer import Segment

ENCODING_FILE = Path("encoding") / "encoding_dsv32.py"

_TOOLS = """## Tools

The functions listed at the end of this section can be called. To call some of them, finish the reply with one block of
this form:

<{dsml_token}function_calls>
<{dsml_token}invoke name="FUNCTION">
<{dsml_token}parameter name="PARAMETER" string="true|false">VALUE</{dsml_token}parameter>
</{dsml_token}invoke>
</{dsml_token}function_calls>

Repeat the inner elements for more parameters and more calls. A parameter that is a string is written as it is, with
string="true"; every other value is written as JSON, with string="false".

Results arrive between <function_results> tags. Where thinking is on, think about them before going on:
{thinking_start_token}what the results mean{thinking_end_token}

<functions>
{tool_schemas}
</functions>
"""
_RESPONSE_FORMAT = "## Response Format:\n\nYou MUST use JSON of the following schema to reply:\n{schema}"


@dataclass(frozen=True, slots=True)
class PromptTexts:
    """Format strings; see `fill` for their placeholders."""

    tools: str = _TOOLS
    response_format: str = _RESPONSE_FORMAT

    @classmethod
    def from_dir(cls, model_dir: Path) -> PromptTexts:
        """The checkpoint's own wording, or the default one. Raises ConfigError for a file that can't be used."""
        path = model_dir / ENCODING_FILE
        if not path.exists():
            return cls()
        constants = _string_constants(path)
        try:
            texts = cls(
                tools=constants["TOOLS_SYSTEM_TEMPLATE"],
                response_format=constants.get("response_format_template", _RESPONSE_FORMAT),
            )
            fill(texts.tools, tool_schemas="")
            fill(texts.response_format, schema="")
        except (KeyError, ValueError) as exc:
            raise ConfigError(f"{path}: {exc}") from exc
        return texts


def fill(template: str, **user_values: str) -> list[Segment]:
    """Segments of a filled template: its own text and the markup tokens are trusted, `user_values` are not.

    Raises KeyError for a placeholder without a value.
    """
    markup = {
        "dsml_token": dsml.DSML,
        "thinking_start_token": dsml.THINK_START,
        "thinking_end_token": dsml.THINK_END,
    }
    segments: list[Segment] = []
    trusted = ""
    for literal, field, _, _ in Formatter().parse(template):
        trusted += literal
        if field in user_values:
            segments += [Segment(trusted, trusted=True), Segment(user_values[field])]
            trusted = ""
        elif field is not None:
            trusted += markup[field]
    segments.append(Segment(trusted, trusted=True))
    return segments


def _string_constants(path: Path) -> dict[str, str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from exc
    except (SyntaxError, ValueError) as exc:
        raise ConfigError(f"{path}: not Python: {exc}") from exc
    constants: dict[str, str] = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(node.value, ast.Constant):
            continue
        text = node.value.value
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if isinstance(text, str):
            constants.update({target.id: text for target in targets if isinstance(target, ast.Name)})
    return constants
