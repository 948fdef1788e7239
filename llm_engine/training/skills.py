"""All skills: what is trained, in which shares and from which stage on, and what is evaluated."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from llm_engine.training import skills_chat, skills_retrieval, skills_text, skills_tools
from llm_engine.training.samples import Sample, Skill

INDEX_TOPK: Final = 64  # distances of the retrieval skills are multiples of what a query may select


@dataclass(frozen=True, slots=True)
class Share:
    """A skill of the training mixture. `tokens`: its share of the tokens of a stage."""

    name: str
    draw: Skill
    tokens: float


def retrieval_of(longest: int) -> Skill:
    """Retrieval from texts of up to about `longest` tokens."""

    def sample(rng: random.Random) -> Sample:
        return skills_retrieval.training(rng, longest)

    return sample


MIXTURE: Final = (
    Share("retrieval", retrieval_of(300), 0.22),
    Share("arithmetic", skills_text.arithmetic, 0.14),
    Share("strings", skills_text.strings, 0.09),
    Share("system", skills_text.system_instruction, 0.06),
    Share("turns", skills_text.turns, 0.06),
    Share("thinking", skills_text.derivation, 0.06),
    Share("tool-call", skills_tools.tool_choice, 0.11),
    Share("tool-result", skills_tools.tool_result, 0.05),
    Share("json", skills_tools.json_answer, 0.05),
    Share("talk", skills_chat.small_talk, 0.02),
    Share("conversation", skills_chat.conversation, 0.04),
)
TEXT_SHARE: Final = 0.10  # the rest of the tokens: documentation that ships with Python

EVALUATION: Final[Mapping[str, Skill]] = {
    "retrieval-2x": skills_retrieval.far(2 * INDEX_TOPK),
    "retrieval-8x": skills_retrieval.far(8 * INDEX_TOPK),
    "retrieval-8x-multi": skills_retrieval.far(8 * INDEX_TOPK, needles=3),
    "retrieval-32x": skills_retrieval.far(32 * INDEX_TOPK),
    "arithmetic": skills_text.arithmetic,
    "strings": skills_text.strings,
    "system": skills_text.system_instruction,
    "turns": skills_text.turns,
    "thinking": skills_text.derivation,
    "tool-call": skills_tools.tool_call,
    "tool-result": skills_tools.tool_result,
    "json": skills_tools.json_answer,
}
