"""The markup of DeepSeek V3.2's prompts and answers: special tokens, tool-call tags, how a call is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_START = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"

CALLS_OPEN = f"<{DSML}function_calls>"
CALLS_CLOSE = f"</{DSML}function_calls>"
INVOKE_OPEN = f"<{DSML}invoke"
INVOKE_CLOSE = f"</{DSML}invoke>"
PARAMETER_OPEN = f"<{DSML}parameter"
PARAMETER_CLOSE = f"</{DSML}parameter>"
CALLS_GAP = "\n\n"  # between the content and the block of calls; belongs to neither

MARKERS = (THINK_START, THINK_END, DSML)  # special tokens that the answer's parser needs to see


def to_json(value: Any) -> str:
    """JSON as the model was trained on: non-ASCII characters as they are, a space after comma and colon."""
    return json.dumps(value, ensure_ascii=False)


def parameter_value(value: Any) -> tuple[str, str]:
    """(`string` attribute, text) of an argument: strings go in as they are, anything else as JSON."""
    return ("true", value) if isinstance(value, str) else ("false", to_json(value))


Arguments = Mapping[str, Any]
