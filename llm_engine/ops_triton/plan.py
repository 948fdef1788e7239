"""What attention needs to know of a batch, once for all layers. Tensors lie where the batch's lie.

Nothing here waits for the device, and for batches whose sequences have equally many rows nothing is copied to it
either, and one launch makes everything: such a plan can be made inside a captured graph.

Shapes: R rows, N real rows, S sequences, B blocks of the longest table, J rope pairs, G row groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypedDict

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from torch import Tensor

from llm_engine.ops import ForwardBatch
from llm_engine.ops_triton.lang import Ptr, await_inputs, ceil_div, kernel, let_next_in, tile_size

_LAID_OUT: Final = 16  # rows of one program
GROUP_ROWS: Final = 4  # neighbouring rows of one sequence that share what the indexer reads


class _Tensors(TypedDict):
    """The fields of a plan that are worked out on the device or copied to it."""

    seqs_N: Tensor
    visible_N: Tensor
    lengths_S: Tensor
    starts_S: Tensor
    cos_RJ: Tensor
    sin_RJ: Tensor
    group_starts_G: Tensor
    group_sizes_G: Tensor


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
    most = max(batch.context_lens, default=0)
    tensors: _Tensors
    if rows and (counts == counts[0]).all():
        num_keys = most * batch.num_seqs
        tensors = _uniform(positions, batch.num_seqs, int(counts[0]), len(group_starts), most, cos_TJ, sin_TJ)
    else:
        lengths = np.array(batch.context_lens, dtype=np.int64)
        num_keys, device = int(lengths.sum()), positions.device
        tensors = {
            "seqs_N": _upload(np.repeat(np.arange(len(counts)), counts), device),
            "visible_N": (positions[:rows] + 1).int(),
            "lengths_S": _upload(lengths, device),
            "starts_S": _upload(np.cumsum(lengths) - lengths, device),
            "cos_RJ": cos_TJ.index_select(0, positions),
            "sin_RJ": sin_TJ.index_select(0, positions),
            "group_starts_G": _upload(group_starts, device),
            "group_sizes_G": _upload(group_sizes, device),
        }
    return TritonPlan(
        num_rows=rows,
        max_visible=most,
        num_keys=num_keys,
        block_tokens=block_tokens,
        slots_N=batch.slots_N,
        tables_SB=batch.block_tables_SB.contiguous(),
        group_starts=np.append(group_starts, rows),
        **tensors,
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


def _uniform(
    positions_R: Tensor, num_seqs: int, count: int, num_groups: int, most: int, cos_TJ: Tensor, sin_TJ: Tensor
) -> _Tensors:
    """What lies on the device, for sequences of `count` rows each."""
    assert cos_TJ.stride() == sin_TJ.stride() == (cos_TJ.shape[1], 1), "rows of angles are adjacent"
    rows, pairs, int32 = num_seqs * count, cos_TJ.shape[1], torch.int32
    visible_N, seqs_N = positions_R.new_empty(2, rows, dtype=int32)
    starts_S = positions_R.new_empty(num_seqs, dtype=int32)
    group_starts_G, group_sizes_G = positions_R.new_empty(2, num_groups, dtype=int32)
    cos_RJ, sin_RJ = cos_TJ.new_empty(2, len(positions_R), pairs)
    _lay_out[(ceil_div(len(positions_R), _LAID_OUT),)](
        positions_R, cos_TJ, sin_TJ, visible_N, seqs_N, starts_S, group_starts_G, group_sizes_G, cos_RJ, sin_RJ,
        len(positions_R), rows, count, most, pairs, tile_size(pairs), _LAID_OUT, GROUP_ROWS,
    )  # fmt: skip
    return {
        "seqs_N": seqs_N,
        "visible_N": visible_N,
        "lengths_S": visible_N[count - 1 :: count],
        "starts_S": starts_S,
        "cos_RJ": cos_RJ,
        "sin_RJ": sin_RJ,
        "group_starts_G": group_starts_G,
        "group_sizes_G": group_sizes_G,
    }


@kernel
def _lay_out(
    positions: Ptr,
    cos: Ptr,
    sin: Ptr,
    visible: Ptr,
    seqs: Ptr,
    starts: Ptr,
    group_starts: Ptr,
    group_sizes: Ptr,
    own_cos: Ptr,
    own_sin: Ptr,
    num_positions: int,
    num_rows: int,
    num_of_seq: int,
    num_longest: int,
    J: tl.constexpr,
    J_TILE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    """The plan of some rows, of which every sequence has `num_of_seq`; those from `num_rows` on only have angles."""
    await_inputs(OVERLAP)
    let_next_in(OVERLAP)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, J_TILE)[None, :]
    position = tl.load(positions + row, mask=row < num_positions, other=0)
    mask = (row < num_positions)[:, None] & (pair < J)
    source, target = position[:, None] * J + pair, row.to(tl.int64)[:, None] * J + pair
    tl.store(own_cos + target, tl.load(cos + source, mask=mask), mask=mask)
    tl.store(own_sin + target, tl.load(sin + source, mask=mask), mask=mask)
    real, seq = row < num_rows, row // num_of_seq
    within = row - seq * num_of_seq
    tl.store(visible + row, (position + 1).to(tl.int32), mask=real)
    tl.store(seqs + row, seq, mask=real)
    tl.store(starts + seq, seq * num_longest, mask=real & (within == 0))
    group, leads = seq * tl.cdiv(num_of_seq, GROUP) + within // GROUP, real & (within % GROUP == 0)
    tl.store(group_starts + group, row, mask=leads)
    tl.store(group_sizes + group, tl.minimum(num_of_seq - within, GROUP), mask=leads)


def _upload(values: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    host = torch.from_numpy(values.astype(np.int32))
    if device.type == "cpu":
        return host
    return host.to(device) if device.type == "meta" else host.pin_memory().to(device, non_blocking=True)
