"""Matrix products with packed weights, in two kinds.

Tiled (`exact`): every row goes through a product of one fixed shape, TILE_ROWS × depth × out, in fp32. BLAS libraries
choose kernels, blocking and the split over threads by the shape, so with the shape fixed the order of summation of a
row is fixed too. The depth is cut at MAX_DEPTH, because deeper products are split over threads along the depth.
`self_check` verifies both at start-up.

Free (`fast`): one product over all rows; in bf16 through oneDNN with weights in its own layout. oneDNN generates code
for every number of rows it meets, which takes longer than the product itself, so there it meets few: rows go in chunks,
and the last chunk is padded.

Shapes: R rows, t row tiles, M = TILE_ROWS, I in, O out, h heads.
"""

from __future__ import annotations

from typing import Final, Protocol

import torch
from torch import Tensor

TILE_ROWS: Final = 8
MAX_DEPTH: Final = 512
PANEL_ELEMENTS: Final = 256 << 10  # fp32 weights of one panel: 1 MiB
_FINE_ROWS: Final = 16
_CHUNK_ROWS: Final = 256


class PackedProduct(Protocol):
    """A weight that can be applied to rows: [R, I] → [R, O], or per head [R, h, I] → [h, R, O]."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


class Gemm(Protocol):
    """One kind of product: how weights are packed."""

    @property
    def inner_dtype(self) -> torch.dtype:
        """Of values between two products."""

    def linear(self, weight_OI: Tensor, out_dtype: torch.dtype) -> PackedProduct: ...

    def heads(self, weight_hIO: Tensor) -> PackedProduct:
        """One matrix a head; the result is of `inner_dtype`."""
        ...


def whole_tiles(x: Tensor) -> Tensor:
    """fp32 rows, with zero rows added up to a multiple of TILE_ROWS."""
    if x.dtype != torch.float32:
        x = x.float()
    missing = -x.shape[0] % TILE_ROWS
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


class TiledLinear:
    """x · Wᵀ in fp32 tiles. A wide weight is cut in panels that stay in a core's cache while all tiles pass by."""

    def __init__(self, weight_OI: Tensor, out_dtype: torch.dtype) -> None:
        weight_IO = weight_OI.t().float()
        width = max(1, PANEL_ELEMENTS // min(weight_IO.shape[0], MAX_DEPTH))
        self._out_dtype = out_dtype
        self._out = weight_IO.shape[1]
        self._panels = [
            [part.contiguous() for part in torch.split(panel, MAX_DEPTH)]
            for panel in torch.split(weight_IO, width, dim=1)
        ]

    def __call__(self, x_RI: Tensor) -> Tensor:
        rows = x_RI.shape[0]
        x_tMI = whole_tiles(x_RI).view(-1, TILE_ROWS, x_RI.shape[1])
        panels = [_tiled_product(x_tMI, parts) for parts in self._panels]
        y_RO = (panels[0] if len(panels) == 1 else torch.cat(panels, dim=2)).view(-1, self._out)
        if y_RO.shape[0] != rows:
            y_RO = y_RO[:rows]
        return y_RO if self._out_dtype == torch.float32 else y_RO.to(self._out_dtype)


def _tiled_product(x_tMI: Tensor, parts: list[Tensor]) -> Tensor:
    """Sum over the parts of the depth, in order."""
    tiles = x_tMI.shape[0]
    if len(parts) == 1:
        return torch.bmm(x_tMI, parts[0].expand(tiles, -1, -1))
    first, *rest = torch.split(x_tMI, MAX_DEPTH, dim=2)
    y_tMO = torch.bmm(first, parts[0].expand(tiles, -1, -1))
    for x_part, part in zip(rest, parts[1:], strict=True):
        y_tMO.baddbmm_(x_part, part.expand(tiles, -1, -1))
    return y_tMO


class TiledHeads:
    """A matrix a head, in fp32 tiles."""

    def __init__(self, weight_hIO: Tensor) -> None:
        self._weight_hIO = weight_hIO.float().contiguous()

    def __call__(self, x_RhI: Tensor) -> Tensor:
        heads, _, out = self._weight_hIO.shape
        rows = x_RhI.shape[0]
        x_hRI = whole_tiles(x_RhI).transpose(0, 1)
        padded = x_hRI.shape[1]
        tiles = padded // TILE_ROWS
        if tiles <= 2:  # the same products either way; below, a head's matrix stays cached while all tiles pass by
            parts = [torch.bmm(x_hMI, self._weight_hIO) for x_hMI in torch.split(x_hRI, TILE_ROWS, dim=1)]
            return (parts[0] if tiles == 1 else torch.cat(parts, dim=1))[:, :rows]
        y_hRO = x_hRI.new_empty(heads, padded, out)
        for x_RI, weight_IO, y_RO in zip(x_hRI, self._weight_hIO, y_hRO, strict=True):
            torch.bmm(
                x_RI.view(tiles, TILE_ROWS, -1), weight_IO.expand(tiles, -1, -1), out=y_RO.view(tiles, TILE_ROWS, out)
            )
        return y_hRO[:, :rows]


class TiledGemm:
    """Products for `exact`."""

    inner_dtype: Final = torch.float32

    def linear(self, weight_OI: Tensor, out_dtype: torch.dtype) -> PackedProduct:
        return TiledLinear(weight_OI, out_dtype)

    def heads(self, weight_hIO: Tensor) -> PackedProduct:
        return TiledHeads(weight_hIO)


class FreeLinear:
    """x · Wᵀ in fp32, all rows at once."""

    def __init__(self, weight_OI: Tensor, out_dtype: torch.dtype) -> None:
        self._weight_IO = weight_OI.t().float().contiguous()
        self._out_dtype = out_dtype

    def __call__(self, x_RI: Tensor) -> Tensor:
        return torch.mm(x_RI.float(), self._weight_IO).to(self._out_dtype)


def rung(rows: int) -> int:
    """The number of rows to compute for up to _CHUNK_ROWS rows: up to 16 as they are, then 24, 32, 48, 64, 96, …"""
    if rows <= _FINE_ROWS:
        return rows
    step = 1 << ((rows - 1).bit_length() - 2)
    return -(-rows // step) * step


def padded(rows: int) -> int:
    """`rows`, or as many more as make the last chunk a number that is computed."""
    return rows - rows % _CHUNK_ROWS + rung(rows % _CHUNK_ROWS)


def _up_to_rung(x: Tensor) -> Tensor:
    """Zero rows added up to a number that is computed."""
    missing = rung(len(x)) - len(x)
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


class OneDnnLinear:
    """x · Wᵀ in bf16 with fp32 accumulation."""

    def __init__(self, weight_OI: Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.bfloat16().contiguous())

    def __call__(self, x_RI: Tensor) -> Tensor:
        if len(x_RI) <= _CHUNK_ROWS:
            return self._product(x_RI)
        return torch.cat([self._product(chunk) for chunk in torch.split(x_RI, _CHUNK_ROWS)])

    def _product(self, x_RI: Tensor) -> Tensor:
        x_MI = _up_to_rung(x_RI.bfloat16())
        y_MO: Tensor = torch.ops.mkldnn._linear_pointwise(x_MI, self._packed, None, "none", [], "")
        return y_MO[: len(x_RI)]


class FreeHeads:
    """A matrix a head."""

    def __init__(self, weight_hIO: Tensor, dtype: torch.dtype) -> None:
        self._weight_hIO = weight_hIO.to(dtype).contiguous()

    def __call__(self, x_RhI: Tensor) -> Tensor:
        if len(x_RhI) <= _CHUNK_ROWS:
            return self._product(x_RhI)
        return torch.cat([self._product(chunk) for chunk in torch.split(x_RhI, _CHUNK_ROWS)], dim=1)

    def _product(self, x_RhI: Tensor) -> Tensor:
        x_MhI = _up_to_rung(x_RhI.to(self._weight_hIO.dtype))
        return torch.bmm(x_MhI.transpose(0, 1), self._weight_hIO)[:, : len(x_RhI)]


class FreeGemm:
    """Products for `fast`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.has_bf16 = dtype == torch.bfloat16 and _onednn_has_bf16()
        self.inner_dtype = torch.bfloat16 if self.has_bf16 else torch.float32
        self._compiled: dict[tuple[int, ...], PackedProduct] = {}  # one of every shape, by the shape of its weight

    def linear(self, weight_OI: Tensor, out_dtype: torch.dtype) -> PackedProduct:
        if out_dtype != torch.bfloat16 or not self.has_bf16:
            return FreeLinear(weight_OI, out_dtype)
        product = OneDnnLinear(weight_OI)
        self._compiled.setdefault(tuple(weight_OI.shape), product)
        return product

    def heads(self, weight_hIO: Tensor) -> PackedProduct:
        product = FreeHeads(weight_hIO, self.inner_dtype)
        if self.has_bf16:
            self._compiled.setdefault(tuple(weight_hIO.shape), product)
        return product

    def warm_up(self, max_rows: int) -> None:
        """See `llm_engine.ops.spec.WarmUp`: every number of rows that is computed, once for every shape of weight."""
        sizes = {rung(rows) for rows in range(1, min(max_rows, _CHUNK_ROWS) + 1)}
        for shape, product in self._compiled.items():
            inputs = shape[1:] if len(shape) == 2 else shape[:2]
            for size in sizes:
                product(torch.zeros(size, *inputs, dtype=torch.bfloat16))


def _onednn_has_bf16() -> bool:
    return torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
