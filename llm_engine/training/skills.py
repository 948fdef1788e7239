"""All skills: what is trained, in which shares and from which stage on, and what is evaluated."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from llm_engine.training import skills_retrieval, skills_text, skills_tools
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
    Share("retrieval", retrieval_of(300), 0.24),
    Share("arithmetic", skills_text.arithmetic, 0.16),
    Share("strings", skills_text.strings, 0.10),
    Share("system", skills_text.system_instruction, 0.07),
    Share("turns", skills_text.turns, 0.08),
    Share("thinking", skills_text.derivation, 0.08),
    Share("tool_call", skills_tools.tool_call, 0.11),
    Share("tool_result", skills_tools.tool_result, 0.06),
    Share("json", skills_tools.json_answer, 0.06),
)
TEXT_SHARE: Final = 0.04  # the rest of the tokens: documentation that ships with Python

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
