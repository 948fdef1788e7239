"""Samples as token ids in the chat format of DeepSeek V3.2, with a weight for the loss on every token.

The server has its own renderer, which does more; a test holds the two together token for token. Texts of samples never
contain special tokens, so a rendered string may be tokenised at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import Tokenizer

from llm_engine.training.samples import Call, Sample

BOS: Final = "<｜begin▁of▁sentence｜>"
EOS: Final = "<｜end▁of▁sentence｜>"
PAD: Final = "<｜▁pad▁｜>"
THINK_START: Final = "<think>"
THINK_END: Final = "</think>"
USER: Final = "<｜User｜>"
ASSISTANT: Final = "<｜Assistant｜>"
DSML: Final = "｜DSML｜"
SPECIAL: Final = (BOS, EOS, PAD, THINK_START, THINK_END, USER, ASSISTANT, DSML)

TOOLS_TEMPLATE: Final = """## Tools

To call functions, end the reply with:

<{dsml_token}function_calls>
<{dsml_token}invoke name="FUNCTION">
<{dsml_token}parameter name="PARAMETER" string="true|false">VALUE</{dsml_token}parameter>
</{dsml_token}invoke>
</{dsml_token}function_calls>

Thoughts go between {thinking_start_token} and {thinking_end_token}.

<functions>
{tool_schemas}
</functions>
"""
FORMAT_TEMPLATE: Final = "## Response Format:\n\nReply with JSON of this schema:\n{schema}"

PROMPT_WEIGHT: Final = 0.1
ANSWER_WEIGHT: Final = 1.0
TEXT_WEIGHT: Final = 0.3

Piece = tuple[str, float]  # text, and the weight of the loss on its tokens


@dataclass(frozen=True, slots=True)
class Document:
    """Token ids, the weight of predicting each of them, and where the part that is compared begins."""

    ids: list[int]
    weights: list[float]
    num_prompt: int


def prompt_text(sample: Sample) -> str:
    """What a server sends to the model for this request."""
    return "".join(text for text, _ in _prompt(sample))


def document(sample: Sample, tokenizer: Tokenizer) -> Document:
    """A sample as one training document; answers in its history count as much as the last one."""
    prompt = _encode(_prompt(sample), tokenizer)
    answer = _encode([(answer_text(sample), ANSWER_WEIGHT)], tokenizer)
    return Document(prompt[0] + answer[0], prompt[1] + answer[1], len(prompt[0]))


def text_document(text: str, tokenizer: Tokenizer) -> Document:
    """Plain text, as raw completions see it."""
    ids, weights = _encode([(BOS, 0.0), (text, TEXT_WEIGHT), (EOS, TEXT_WEIGHT)], tokenizer)
    return Document(ids, weights, 1)


def answer_text(sample: Sample) -> str:
    """What the model is to write, its end token included."""
    answer = sample.answer
    thought = answer.reasoning + THINK_END if sample.thinking else ""
    return f"{thought}{answer.content}{_calls(answer.calls)}{EOS}"


def _prompt(sample: Sample) -> list[Piece]:
    messages = list(sample.messages)
    attachments = _attachments(sample)
    if attachments and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": ""})
    last_user = max(i for i, message in enumerate(messages) if message["role"] == "user")
    pieces: list[Piece] = [(BOS, 0.0)]
    for i, message in enumerate(messages):
        follows_tool = i > 0 and messages[i - 1]["role"] == "tool"
        match message["role"]:
            case "system":
                pieces.append((message["content"] + attachments, PROMPT_WEIGHT))
            case "user":
                mark = THINK_START if sample.thinking and i == last_user else THINK_END
                pieces += [(USER, 0.0), (message["content"], PROMPT_WEIGHT), (ASSISTANT + mark, 0.0)]
            case "assistant":
                thinks = sample.thinking and i > last_user
                thought = message.get("reasoning_content", "") + THINK_END if thinks else ""
                calls = [_called(call) for call in message.get("tool_calls", ())]
                pieces.append((f"{thought}{message['content']}{_calls(calls)}{EOS}", ANSWER_WEIGHT))
            case "tool":
                opening = "" if follows_tool else "\n\n<function_results>"
                pieces.append((f"{opening}\n<result>{message['content']}</result>", PROMPT_WEIGHT))
                if i == len(messages) - 1 or messages[i + 1]["role"] != "tool":
                    mark = THINK_START if sample.thinking and i > last_user else THINK_END
                    pieces += [("\n</function_results>\n\n", PROMPT_WEIGHT), (mark, 0.0)]
    return pieces


def _attachments(sample: Sample) -> str:
    """What follows the system message: the functions on offer and the format of the answer."""
    text = ""
    if sample.tools:
        schemas = "\n".join(_json(tool["function"]) for tool in sample.tools)
        marks = {"dsml_token": DSML, "thinking_start_token": THINK_START, "thinking_end_token": THINK_END}
        text += "\n\n" + TOOLS_TEMPLATE.format(tool_schemas=schemas, **marks)
    if sample.schema is not None:
        text += "\n\n" + FORMAT_TEMPLATE.format(schema=_json(sample.schema))
    return text


def _called(call: Mapping[str, Any]) -> Call:
    return Call(call["function"]["name"], json.loads(call["function"]["arguments"]))


def _calls(calls: Sequence[Call]) -> str:
    if not calls:
        return ""
    invokes = "\n".join(f'<{DSML}invoke name="{call.name}">\n{_parameters(call)}\n</{DSML}invoke>' for call in calls)
    return f"\n\n<{DSML}function_calls>\n{invokes}\n</{DSML}function_calls>"


def _parameters(call: Call) -> str:
    return "\n".join(
        f'<{DSML}parameter name="{name}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else _json(value)}</{DSML}parameter>"
        for name, value in call.arguments.items()
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _encode(pieces: Sequence[Piece], tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    """Neighbouring pieces are tokenised together, as the server does; a token weighs what its last character does."""
    text = "".join(piece for piece, _ in pieces)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    ends: list[tuple[int, float]] = []
    position = 0
    for piece, weight in pieces:
        position += len(piece)
        ends.append((position, weight))
    weights: list[float] = []
    current = 0
    for _, end in encoding.offsets:
        while ends[current][0] < end:
            current += 1
        weights.append(ends[current][1])
    return list(encoding.ids), weights
