"""Real request traces turned into jobs: true arrival times, lengths and shared prefixes; synthetic token ids."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec

from benchmarks.loadgen import Job

TRACE_BLOCK_TOKENS = 512


class TraceRow(msgspec.Struct):
    """One line of a Mooncake trace (FAST'25 release): `hash_ids` name the prompt's 512-token prefix blocks."""

    timestamp: int  # milliseconds
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_mooncake(path: Path, limit: int) -> list[TraceRow]:
    """The first `limit` rows. Raises ValueError naming the line that is not a trace row."""
    decode = msgspec.json.Decoder(TraceRow).decode
    rows: list[TraceRow] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if len(rows) == limit:
                break
            try:
                rows.append(decode(line))
            except msgspec.MsgspecError as exc:
                raise ValueError(f"{path}:{number}: not a trace row: {exc}") from exc
    return rows


def to_jobs(
    rows: list[TraceRow], *, time_scale: float, length_scale: float, vocab: range, max_len: int, seed: int
) -> list[Job]:
    """Scale times by `time_scale` and lengths by `length_scale`; equal hash ids give equal token blocks.

    Prompt and output together are cut to `max_len` tokens.
    """
    block = max(1, round(TRACE_BLOCK_TOKENS * length_scale))
    jobs: list[Job] = []
    for row in rows:
        output = max(1, min(round(row.output_length * length_scale), max_len - 1))
        length = max(1, min(round(row.input_length * length_scale), max_len - output))
        prompt: list[int] = []
        for hash_id in row.hash_ids:
            prompt.extend(_block_tokens(hash_id, block, vocab, seed))
        filler = _block_tokens(-1 - len(jobs), max(0, length - len(prompt)), vocab, seed)
        at_s = (row.timestamp - rows[0].timestamp) / 1e3 * time_scale
        jobs.append(Job(prompt=(prompt + filler)[:length], max_tokens=output, at_s=at_s, seed=seed + len(jobs)))
    return jobs


def _block_tokens(hash_id: int, length: int, vocab: range, seed: int) -> list[int]:
    return random.Random(f"{seed}:{hash_id}").choices(vocab, k=length)
