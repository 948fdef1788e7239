"""Options that change logits before a token is drawn, as sparse data of one sequence. Shapes: R rows, V vocabulary."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llm_engine.api.request import SamplingParams
from llm_engine.ops import to_device
from llm_engine.runtime.drafts import Drafts
from llm_engine.sched.sequence import Sequence


class LogitEdits:
    """Bias, penalties and bans of one sequence. Its output tokens are counted as they come."""

    @staticmethod
    def needed(seq: Sequence) -> bool:
        """Whether any option of `seq` changes logits."""
        params = seq.submit.sampling
        bans = seq.num_output < params.min_tokens and seq.stop_ids
        return bool(params.logit_bias or params.presence_penalty or params.frequency_penalty or bans)

    def __init__(self, seq: Sequence, vocab_size: int, device: torch.device) -> None:
        params = seq.submit.sampling
        self._seq = seq
        self._params: SamplingParams = params
        self._bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=device)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
        stop_ids = sorted(token for token in seq.stop_ids if 0 <= token < vocab_size)
        self._stop_ids = torch.tensor(stop_ids, dtype=torch.int64, device=device)
        penalised = bool(params.presence_penalty or params.frequency_penalty)
        self._counts_V = torch.zeros(vocab_size, dtype=torch.float32, device=device) if penalised else None
        self._num_counted = 0  # output tokens in `_counts_V`

    def apply(self, logits_RV: Tensor, given: int, drafts: Drafts) -> None:
        """Change the adjacent rows that draw after `given`, `given + 1`, … drafts, in place."""
        if len(self._bias_ids):
            logits_RV[:, self._bias_ids] += self._bias
        if self._counts_V is not None:
            counts_RV = self._count(len(logits_RV), given, drafts)
            logits_RV.sub_(counts_RV * self._params.frequency_penalty)
            logits_RV.sub_((counts_RV > 0) * self._params.presence_penalty)
        num_banned = self._params.min_tokens - self._seq.num_output - given
        if num_banned > 0 and len(self._stop_ids):
            logits_RV[:num_banned, self._stop_ids] = -math.inf

    def _count(self, num_rows: int, given: int, drafts: Drafts) -> Tensor:
        """How often each token is output before each row; drafts before a row included."""
        assert self._counts_V is not None
        output = self._seq.tokens[self._seq.submit.num_prompt + self._num_counted :]
        if output:
            _add_ones(self._counts_V, to_device(torch.tensor(output, device="cpu"), self._counts_V.device))
        self._num_counted += len(output)
        counts_RV = self._counts_V.repeat(num_rows, 1)
        if given + num_rows > 1:
            ids_n = drafts.ids_of(self._seq)
            for row in range(num_rows):
                _add_ones(counts_RV[row], ids_n[: given + row])
        return counts_RV


def _add_ones(counts_V: Tensor, ids_n: Tensor) -> None:
    counts_V.scatter_add_(0, ids_n, torch.ones(len(ids_n), device=counts_V.device))
