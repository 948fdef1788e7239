"""How products are cut: tile shapes and splits of the depth, by numerics.

With `exact` a row's sum is one fixed expression: tile shape and number of splits follow from the weight alone, whatever
the batch. Whether the splits of a product run side by side or one after the other changes nothing: both add the same
partial sums in the same order. With `fast` the cut also follows the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

from llm_engine.ops_triton.lang import ceil_div, nvidia_arch, tile_size

Numerics = Literal["exact", "fast"]

_PROCESSORS: Final = 132  # of the cards this was laid out for (H100, H200); others are served, perhaps less well
FEW_ROWS: Final = 16  # rows of a tile that reads weights for next to nobody
_EXACT_ROWS: Final = 64  # one size for few rows and for many
_MAX_SPLITS: Final = 8
_SPLIT_DEPTH: Final = 896  # shallower splits cost more to add than they gain
_FEW_MAX_SPLITS: Final = 16  # the same for few rows, whose sums are small
_FEW_SPLIT_DEPTH: Final = 448
_FULL_TILES: Final = 512  # rows of an expert from which on tiles are mostly full


@dataclass(frozen=True, slots=True)
class Tile:
    """One program's share of a product, rows × columns, in steps of `depth`; and how the compiler should run it.

    `turned`: computed as the transpose, for tiles of few rows. `height`: row tiles that walk the columns together.
    `paired`: two tiles beside each other read their rows once. `registers`: of a thread, at most, on Nvidia's cards.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    turned: bool = False
    height: int = 8
    paired: bool = False
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """How to launch a kernel with such tiles."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return {**options, "maxnreg": self.registers} if self.registers and nvidia_arch() else options


@dataclass(frozen=True, slots=True)
class Cut:
    """A tile, the number of splits of the depth, and whether they run side by side."""

    tile: Tile
    splits: int
    parallel: bool


def cut_product(numerics: Numerics, rows: int, depth: int, columns: int, batches: int = 1, *, fp8: bool = False) -> Cut:
    """The cut of [rows, depth] · [depth, columns], `batches` times. `fp8`: a step is a block of 128."""
    tile = _tile(numerics, rows, depth, columns, batches, fp8)
    column_tiles = ceil_div(columns, tile.columns) * batches
    if numerics == "exact":
        splits = 1 if batches > 1 else _splits(column_tiles, depth, 2)
        busy = ceil_div(rows, tile.rows) * column_tiles >= _PROCESSORS
        return Cut(tile, splits, splits > 1 and not busy)
    few = tile.rows <= FEW_ROWS
    waves = 4 if few else 2 if rows <= 128 else 1
    splits = 1 if batches > 1 else _splits(ceil_div(rows, tile.rows) * column_tiles, depth, waves, few=few)
    if few:
        tile = replace(tile, stages=min(tile.stages, ceil_div(ceil_div(depth, tile.depth), splits)))
    return Cut(tile, splits, splits > 1)


def expert_tiles(
    numerics: Numerics, rows_an_expert: float, experts: int, depth: int, width: int, *, fp8: bool = False
) -> tuple[Tile, Tile]:
    """The tiles of the up and of the down product of experts `width` wide, with as many rows.

    The weights of `experts` experts are read, each for about `rows_an_expert` rows of `depth` values. Measured on an
    H200 with 256 experts of 7168 × 2048, of which a row chooses eight.
    """
    step = min(128, tile_size(depth, 16))
    if numerics == "exact":
        up = Tile(_EXACT_ROWS, 64, step, 4, 3, height=1)
        return up, Tile(_EXACT_ROWS, 128 if fp8 else 64, step, 4, 3, height=1)
    if rows_an_expert <= FEW_ROWS:
        wide = fp8 and experts * width // 128 >= 4 * _PROCESSORS
        up = Tile(FEW_ROWS, 128 if wide else 64, step, 4, 3, turned=True, height=1)
        return up, Tile(FEW_ROWS, 128 if fp8 else 64, step, 4, 3, turned=True, height=1)
    if rows_an_expert <= 96:
        tile = Tile(64, 64, step, 4, 3)
        return tile, tile
    if not fp8:
        tile = Tile(128, 64, min(step, 64), 8, 3)
        return tile, tile
    up = Tile(128, 64, step, 8, 3, registers=128)
    if rows_an_expert < _FULL_TILES:
        return up, Tile(128, 64, step, 8, 3, paired=True, registers=128)
    return up, Tile(128, 128, step, 8, 3, paired=True, height=1)


def quantise_tile(rows: int) -> tuple[int, int, int]:
    """Rows and groups of 128 values that one program quantises, and its warps."""
    return (1, 4, 1) if rows <= FEW_ROWS else (4, 4, 4)


def _tile(numerics: Numerics, rows: int, depth: int, columns: int, batches: int, fp8: bool) -> Tile:
    width, step = min(128, tile_size(columns, 16)), min(128, tile_size(depth, 16))
    narrow = min(width, 64)
    if numerics == "exact":
        return Tile(_EXACT_ROWS, narrow, step, 4, 4, turned=narrow == 64)
    if rows <= FEW_ROWS:
        if ceil_div(columns, narrow) * batches * _FEW_MAX_SPLITS < _PROCESSORS:
            narrow = min(narrow, 32)
        return Tile(FEW_ROWS, narrow, step, 4, 4, turned=narrow == 64)
    if rows <= 128:
        columns = width if fp8 and depth > 8192 else narrow
        return Tile(64, columns, step, 4, 4 if fp8 else 3, turned=columns >= 64)
    return Tile(128, width, step if fp8 else min(step, 64), 8, 4 if fp8 else 3)


def _splits(tiles: int, depth: int, waves: int, *, few: bool = False) -> int:
    """Enough splits for each processor to hold `waves` programs, none too shallow; a power of two."""
    least, most = (_FEW_SPLIT_DEPTH, _FEW_MAX_SPLITS) if few else (_SPLIT_DEPTH, _MAX_SPLITS)
    wanted = min(waves * _PROCESSORS // max(tiles, 1), depth // least, most)
    return 1 << max(wanted, 1).bit_length() - 1
