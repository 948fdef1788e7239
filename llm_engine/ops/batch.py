"""The rows of one forward pass.

Shapes: R rows including padding, N real rows (the first N of R), S sequences, B blocks of the longest table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, by a copy that nobody waits for."""
    if device.type in ("cpu", "meta"):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """Rows of all sequences, flat. The rows of one sequence are adjacent and their positions count up by one.

    R is a multiple of `Ops.row_tile`; padding rows come last and repeat the token and position of the last real row.
    They are computed and ignored: nothing is written to a cache for them. Repeating a row keeps them from waking
    experts that no real row has chosen.
    A row sees the cache positions up to and including its own, which is written before it is read.
    `context_lens` may be upper bounds where a batch stands for others of its shape, in a captured graph.
    """

    token_ids_R: Tensor  # int64
    positions_R: Tensor  # int64
    slots_N: Tensor  # int64, block * block_tokens + offset of the cache row that a real row writes; -1: it writes none
    block_tables_SB: Tensor  # int32, padded with -1
    row_starts: tuple[int, ...]  # S + 1 entries: sequence s has rows row_starts[s] .. row_starts[s + 1] - 1
    context_lens: tuple[int, ...]  # S entries: tokens of the sequence in the cache after this pass

    @property
    def num_rows(self) -> int:
        """N, the number of real rows."""
        return self.row_starts[-1]

    @property
    def num_seqs(self) -> int:
        """S."""
        return len(self.context_lens)

    def to(self, device: torch.device) -> ForwardBatch:
        """The same batch on a device. The copies go through pinned memory: nobody waits for them."""
        if device == self.token_ids_R.device:
            return self
        return replace(
            self,
            token_ids_R=to_device(self.token_ids_R, device),
            positions_R=to_device(self.positions_R, device),
            slots_N=to_device(self.slots_N, device),
            block_tables_SB=to_device(self.block_tables_SB, device),
        )

    def check(self, block_tokens: int) -> None:
        """Raise ValueError when a promise above is broken. For tests and debugging: it synchronises with the device."""
        n = self.num_rows
        if self.row_starts[0] != 0 or len(self.row_starts) != self.num_seqs + 1:
            raise ValueError(f"row_starts {self.row_starts} does not frame {self.num_seqs} sequences")
        if not n <= len(self.token_ids_R) == len(self.positions_R) or len(self.slots_N) != n:
            raise ValueError("token_ids_R, positions_R, slots_N and row_starts disagree on the number of rows")
        positions, slots = self.positions_R.tolist(), self.slots_N.tolist()
        for s, (first, end) in enumerate(zip(self.row_starts, self.row_starts[1:], strict=False)):
            stop = self.context_lens[s]
            if positions[first:end] != list(range(stop - (end - first), stop)):
                raise ValueError(f"sequence {s}: positions {positions[first:end]} do not end at {stop - 1}")
            table = self.block_tables_SB[s].tolist()
            wanted = [table[p // block_tokens] * block_tokens + p % block_tokens for p in positions[first:end]]
            if slots[first:end] != wanted or min(table[: -(-stop // block_tokens)], default=0) < 0:
                raise ValueError(f"sequence {s}: slots or block table do not cover its positions")
        if len(set(slots)) != n:
            raise ValueError("two rows write the same cache slot")
