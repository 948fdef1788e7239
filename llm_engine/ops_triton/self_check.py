"""Whether this card keeps what `exact` builds on: a row of a tile gives the same bits whatever the other rows are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from llm_engine.api.errors import ConfigError

Product = Callable[[Tensor], Tensor]  # rows → rows
_DEPTH_AND_OUT: Final = ((128, 64), (1024, 192))  # the second has splits
_ROWS: Final = 66  # more than a tile


def check_products(make_product: Callable[[Tensor], Product], dtype: torch.dtype, device: torch.device) -> None:
    """Compare products of the same rows in several batches, bit for bit. Raises ConfigError. Seconds, to compile."""
    generator = torch.Generator(device).manual_seed(0)
    for depth, out in _DEPTH_AND_OUT:
        rows = torch.randn(_ROWS, depth, generator=generator, device=device).to(dtype)
        product = make_product(torch.randn(out, depth, generator=generator, device=device).to(dtype))
        if not _independent(product, rows):
            raise ConfigError(
                f"engine.numerics=exact: this card rounds a row by its place in the batch "
                f"(depth {depth}, width {out}); set engine.numerics=fast"
            )


def _independent(product: Product, rows: Tensor) -> bool:
    together = product(rows)
    order = torch.arange(len(rows), device=rows.device).roll(3)
    poisoned = rows.clone()
    poisoned[1::2] = torch.nan
    return (
        torch.equal(product(rows[order]), together[order])
        and torch.equal(product(poisoned)[::2], together[::2])
        and all(torch.equal(product(rows[r : r + 1]), together[r : r + 1]) for r in (0, 9))
    )
