"""From the options of a request to sampling parameters, and the checks that need the server's limits."""

from __future__ import annotations

import hashlib
import os
import random
from dataclasses import dataclass

from llm_engine.api.errors import PromptTooLong, RequestError
from llm_engine.api.request import SamplingParams
from router.schemas import GenerationBody

GREEDY_BELOW = 1e-4  # a smaller temperature overflows the scaled logits, and draws the most likely token anyway
_SEED_SPACE = 1 << 63

_random = random.Random(os.urandom(32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the server accepts."""

    max_model_len: int
    vocab_size: int
    max_n: int
    max_logprobs: int
    max_sequences: int


def draw_seed() -> int:
    """A fresh seed; small enough to survive JSON readers that know doubles only."""
    return _random.getrandbits(53)


def fresh_id() -> str:
    """A part of an id that no other request of any router has."""
    return f"{_random.getrandbits(96):024x}"


def choice_seed(seed: int, choice: int) -> int:
    """Seed of the `choice`-th answer to one prompt. Choice 0 has the request's own seed, so n=1 equals it."""
    if choice == 0:
        return seed % _SEED_SPACE
    digest = hashlib.blake2b(b"%d/%d" % (seed, choice), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _SEED_SPACE


def output_budget(requested: int | None, default: int | None, prompt_tokens: int, limits: Limits) -> int:
    """Number of output tokens. Without a request or a default: all that is left of the context.

    Raises PromptTooLong when prompt and requested output do not fit into the context.
    """
    room = limits.max_model_len - prompt_tokens
    if room < 1 or (requested is not None and requested > room):
        wanted = f" and {requested} output tokens were requested" if requested is not None else ""
        raise PromptTooLong(
            f"the context is {limits.max_model_len} tokens; the prompt has {prompt_tokens}{wanted}", param="max_tokens"
        )
    return requested or min(room, default or room)


def sampling_params(
    body: GenerationBody, limits: Limits, *, seed: int, max_tokens: int, logprobs: int | None
) -> SamplingParams:
    """Raises RequestError naming the field that asks for more than the server's limits."""
    if logprobs is not None and logprobs > limits.max_logprobs:
        raise RequestError(f"at most {limits.max_logprobs} logprobs a token are served", param="logprobs")
    temperature = 1.0 if body.temperature is None else body.temperature
    return SamplingParams(
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=min(body.min_tokens or 0, max_tokens),
        temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_logit_bias(body, limits) if body.logit_bias else {},
        stop_token_ids=_stop_token_ids(body, limits) if body.stop_token_ids else (),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
    )


def num_choices(body: GenerationBody, limits: Limits) -> int:
    """`n`, checked."""
    n = body.n or 1
    if n > limits.max_n:
        raise RequestError(f"at most {limits.max_n} choices are served", param="n")
    return n


def stop_strings(body: GenerationBody) -> tuple[str, ...]:
    """The stop strings as a tuple."""
    if body.stop is None:
        return ()
    return (body.stop,) if isinstance(body.stop, str) else tuple(dict.fromkeys(body.stop))


def _logit_bias(body: GenerationBody, limits: Limits) -> dict[int, float]:
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    _check_ids(bias, "logit_bias", limits)
    return bias


def _stop_token_ids(body: GenerationBody, limits: Limits) -> tuple[int, ...]:
    ids = tuple(body.stop_token_ids or ())
    _check_ids(ids, "stop_token_ids", limits)
    return ids


def _check_ids(ids: dict[int, float] | tuple[int, ...], param: str, limits: Limits) -> None:
    if max(ids) >= limits.vocab_size:
        raise RequestError(f"{max(ids)} is not a token id: the vocabulary has {limits.vocab_size}", param=param)
