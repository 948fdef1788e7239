"""What attention needs to know of a batch, once for all layers. Tensors lie where the batch's lie.

Nothing here waits for the device, and for batches whose sequences have equally many rows nothing is copied to it
either: such a plan can be made inside a captured graph.

Shapes: R rows, N real rows, S sequences, B blocks of the longest table, J rope pairs, G row groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_engine.ops import ForwardBatch

GROUP_ROWS: Final = 4  # neighbouring rows of one sequence that share what the indexer reads


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """Rows, the cache rows they may see, and their rotations."""

    num_rows: int
    max_visible: int
    num_keys: int  # places for the keys of all sequences side by side
    block_tokens: int
    slots_N: Tensor  # int64; where each real row is written, -1: nowhere
    seqs_N: Tensor  # int32; sequence of each real row
    visible_N: Tensor  # int32; positions it sees: 0 .. visible - 1
    tables_SB: Tensor  # int32
    lengths_S: Tensor  # int32; positions of each sequence that some row may see
    starts_S: Tensor  # int32; first place of each sequence among `num_keys`
    cos_RJ: Tensor
    sin_RJ: Tensor
    group_starts_G: Tensor  # int32; first row of each group of up to GROUP_ROWS rows of one sequence
    group_sizes_G: Tensor  # int32
    group_starts: npt.NDArray[np.int64]  # the same on the host, with num_rows behind


def plan(batch: ForwardBatch, *, block_tokens: int, cos_TJ: Tensor, sin_TJ: Tensor) -> TritonPlan:
    """See `llm_engine.ops.spec.Plan`. `context_lens` may be upper bounds: rows go by their positions."""
    rows, positions = batch.num_rows, batch.positions_R
    counts = np.array([end - first for first, end in pairwise(batch.row_starts)], dtype=np.int64)
    group_starts, group_sizes = _groups(batch.row_starts, counts)
    visible_N, most = (positions[:rows] + 1).int(), max(batch.context_lens, default=0)
    num_keys = sum(batch.context_lens)
    if len(counts) and (counts == counts[0]).all():
        count = int(counts[0])
        seqs_N, starts_G, sizes_G = _uniform(batch.num_seqs, count, positions.device)
        lengths_S, num_keys = visible_N[count - 1 :: max(count, 1)], most * batch.num_seqs
        starts_S = torch.arange(batch.num_seqs, device=positions.device, dtype=torch.int32) * most
    else:
        lengths = np.array(batch.context_lens, dtype=np.int64)
        seqs_N = _upload(np.repeat(np.arange(len(counts)), counts), positions.device)
        starts_G, sizes_G = _upload(group_starts, positions.device), _upload(group_sizes, positions.device)
        lengths_S = _upload(lengths, positions.device)
        starts_S = _upload(np.cumsum(lengths) - lengths, positions.device)
    return TritonPlan(
        num_rows=rows,
        max_visible=most,
        num_keys=num_keys,
        block_tokens=block_tokens,
        slots_N=batch.slots_N,
        seqs_N=seqs_N,
        visible_N=visible_N,
        tables_SB=batch.block_tables_SB.contiguous(),
        lengths_S=lengths_S,
        starts_S=starts_S,
        cos_RJ=cos_TJ.index_select(0, positions),
        sin_RJ=sin_TJ.index_select(0, positions),
        group_starts_G=starts_G,
        group_sizes_G=sizes_G,
        group_starts=np.append(group_starts, rows),
    )


def _groups(
    row_starts: tuple[int, ...], counts: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First row and size of every group, on the host."""
    groups = -(-counts // GROUP_ROWS)
    of_seq = np.repeat(np.arange(len(counts)), groups)
    within = np.arange(groups.sum()) - np.repeat(np.cumsum(groups) - groups, groups)
    starts = np.array(row_starts[:-1], dtype=np.int64)[of_seq] + within * GROUP_ROWS
    return starts, np.minimum(counts[of_seq] - within * GROUP_ROWS, GROUP_ROWS)


def _uniform(num_seqs: int, count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences of rows, first rows and sizes of groups, worked out on the device."""
    per_seq = -(-count // GROUP_ROWS)
    seqs_N = torch.arange(num_seqs * count, device=device, dtype=torch.int32) // max(count, 1)
    group = torch.arange(num_seqs * per_seq, device=device, dtype=torch.int32)
    seq = group // max(per_seq, 1)
    within = (group - seq * per_seq) * GROUP_ROWS
    return seqs_N, seq * count + within, (count - within).clamp(max=GROUP_ROWS)


def _upload(values: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    host = torch.from_numpy(values.astype(np.int32))
    if device.type == "cpu":
        return host
    return host.to(device) if device.type == "meta" else host.pin_memory().to(device, non_blocking=True)
