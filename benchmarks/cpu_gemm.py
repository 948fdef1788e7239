"""Which matrix product to build CPU kernels on: time per call, and whether a row's bits depend on the rows around it.

`python -m benchmarks.cpu_gemm [--threads N] [--dtype fp32|bf16] [--json]`. A call is "steady" in a tile of M rows when
rows come out the same, bit for bit, in any order, beside NaN, in one tile or in several, and on one thread or two.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

SHAPES = ((64, 64), (128, 1792), (256, 840), (512, 256), (1024, 2048))  # depth, width
TILES = (1, 2, 4, 8, 16, 32)
ROWS = (1, 2, 4, 8, 16, 32, 256)
_TILES_CHECKED = 6

Product = Callable[[Tensor], Tensor]


def products(weight_IO: Tensor) -> dict[str, Product]:
    """The calls that are compared; each takes tiles [t, M, in]."""
    weight_OI = weight_IO.t().contiguous()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI)

    def onednn(x_tMI: Tensor) -> Tensor:
        return torch.stack([torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "") for x in x_tMI])

    return {
        "bmm": lambda x_tMI: torch.bmm(x_tMI, weight_IO.expand(len(x_tMI), -1, -1)),
        "mm": lambda x_tMI: torch.stack([torch.mm(x, weight_IO) for x in x_tMI]),
        "linear": lambda x_tMI: torch.stack([torch.nn.functional.linear(x, weight_OI) for x in x_tMI]),
        "onednn": onednn,
    }


def is_steady(product: Product, tile: int, depth: int, dtype: torch.dtype) -> bool:
    """Compare the rows of several tiles in several surroundings, on one thread and on two."""
    rows = torch.randn(_TILES_CHECKED * tile, depth).to(dtype)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        together = product(rows.view(-1, tile, depth)).flatten(0, 1)
        one_by_one = torch.cat([product(part[None])[0] for part in torch.split(rows, tile)])
        order = torch.randperm(len(rows))
        shuffled = product(rows[order].view(-1, tile, depth)).flatten(0, 1)
        poisoned = rows.clone()
        poisoned[1::2] = torch.nan
        beside_nan = product(poisoned.view(-1, tile, depth)).flatten(0, 1)
        same = torch.equal(together, one_by_one) and torch.equal(shuffled, together[order])
        results.append((same and torch.equal(beside_nan[::2], together[::2]), together))
    torch.set_num_threads(before)
    return results[0][0] and results[1][0] and torch.equal(results[0][1], results[1][1])


def best_us(call: Callable[[], Any], repeats: int = 30) -> float:
    """Shortest of some runs, in microseconds."""
    call()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best * 1e6


def measure(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """One record for every shape, call and tile."""
    for depth, width in SHAPES:
        weight_IO = (torch.randn(depth, width) / depth**0.5).to(dtype)
        for name, product in products(weight_IO).items():
            for tile in TILES:
                times = {}
                for rows in ROWS:
                    padded = -(-rows // tile)
                    x = torch.randn(padded, tile, depth).to(dtype)
                    times[rows] = round(best_us(lambda x=x, product=product: product(x)), 1)  # type: ignore[misc]
                steady = is_steady(product, tile, depth, dtype)
                yield {"depth": depth, "width": width, "call": name, "tile": tile, "steady": steady, "us": times}


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--json", action="store_true", help="one JSON record a line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if not options.json:
        print("microseconds for this many rows:".rjust(44), *(f"{rows:>7}" for rows in ROWS))
    with torch.inference_mode():
        for record in measure({"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]):
            if options.json:
                print(json.dumps(record), flush=True)
                continue
            steady = "steady" if record["steady"] else "varies"
            head = (
                f"{record['depth']:>5} x {record['width']:<5} {record['call']:<7} tile {record['tile']:<3} {steady:<8}"
            )
            print(head.ljust(44), *(f"{time_us:>7}" for time_us in record["us"].values()), flush=True)


if __name__ == "__main__":
    main()
