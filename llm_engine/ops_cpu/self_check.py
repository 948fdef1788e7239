"""Whether this machine's matrix library keeps what `exact` builds on: a row's bits do not depend on its neighbours."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from llm_engine.api.errors import ConfigError
from llm_engine.ops_cpu.gemm import TILE_ROWS, Gemm, PackedProduct

_DEPTH_AND_OUT: Final = ((64, 64), (128, 1024), (512, 256), (1024, 96))
_HEADS: Final = 4


def check_products(gemm: Gemm) -> None:
    """Compare products of the same rows in several batches, bit for bit. Raises ConfigError. Takes milliseconds."""
    generator = torch.Generator().manual_seed(0)
    for depth, out in _DEPTH_AND_OUT:
        x_RI = torch.randn(5 * TILE_ROWS, depth, generator=generator)
        linear = gemm.linear(torch.randn(out, depth, generator=generator), torch.float32)
        heads = gemm.heads(torch.randn(_HEADS, depth, out, generator=generator))
        x_RhI = x_RI.unsqueeze(1).expand(-1, _HEADS, -1)
        if not (_independent(linear, x_RI, row_dim=0) and _independent(heads, x_RhI, row_dim=1)):
            raise ConfigError(
                "engine.numerics=exact: the matrix library rounds a row by its place in the batch on this machine with "
                f"{torch.get_num_threads()} threads (depth {depth}, width {out}); "
                "set engine.threads=1, or engine.numerics=fast"
            )


def _independent(product: PackedProduct, x: Tensor, row_dim: int) -> bool:
    """Whether rows give the same bits together, alone, in another order and beside NaN."""

    def rows_of(rows: Tensor) -> Tensor:
        return product(rows).movedim(row_dim, 0)

    together = rows_of(x)
    order = torch.arange(len(x)).roll(3)
    poisoned = x.clone()
    poisoned[1::2] = torch.nan
    return (
        torch.equal(rows_of(x[order]), together[order])
        and torch.equal(rows_of(poisoned)[::2], together[::2])
        and all(
            torch.equal(rows_of(x[row : row + 1]), together[row : row + 1]) for row in range(0, len(x), TILE_ROWS + 1)
        )
    )
