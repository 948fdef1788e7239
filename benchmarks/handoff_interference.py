"""What a large matrix product and the copies of a fragmented hand-off take from each other on one card.

Blocks of V3.2's geometry go from card 0 to card 1, or to other memory of card 0 if it is the only one, in groups of
layers as a prefill worker sends them, in turns by: `kernel`, what a hand-off takes here; `stores`, loads and stores,
which any card has; `engine`, the copy engine, which would need runs of blocks. Each alone, and beside bf16 products of
8192³ that begin before the first copy and go on after the last one. `lost_ms`: what one hand-off's bytes added to the
time of the products, as they were right before and after; `lost_share`: of the time that the copies took beside them.
Medians of `--rounds`; what `engine` seems to take is noise.

    python -m benchmarks.handoff_interference --json
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.handoff_rig import BLOCK_TOKENS, FORMATS, MTP_LAYERS, make_layout
from kv_transfer.cuda import driver
from kv_transfer.device import DeviceRegion, Mark
from kv_transfer.device_copies import CellCopies, make_copies
from kv_transfer.layout import CopyPlan

_SIDE = 8192  # of the matrices
_LONGER = 4  # products last so many times as long as the copies alone
_TIMES = 2  # hand-offs in a row
_PREHEAT = 400  # products

Way = Callable[[range], None]
Events = tuple[torch.cuda.Event, torch.cuda.Event]


class Copies:
    """One hand-off's bytes, by several ways."""

    def __init__(self, tokens: int, layers: int, groups: int, kv_format: str) -> None:
        num_blocks = -(-tokens // BLOCK_TOKENS)
        layout = make_layout(layers, num_blocks, kv_format)
        self.num_bytes = layout.arena_bytes
        self._layers = layers + MTP_LAYERS
        bounds = sorted({self._layers * group // groups for group in range(groups + 1)})
        self._groups = [range(*pair) for pair in itertools.pairwise(bounds)]
        words = torch.randint(-(2**62), 2**62, (self.num_bytes // 8,), device="cuda:0")
        self._region = DeviceRegion(words.view(torch.uint8))
        self._target = torch.zeros_like(words, device=f"cuda:{min(1, torch.cuda.device_count() - 1)}")
        self._target[:1].copy_(words[:1])  # torch lets the cards reach each other
        orders = [random.Random(seed).sample(range(num_blocks), num_blocks) for seed in (1, 2)]
        tables = [self._region.table(order) for order in orders]
        plan = CopyPlan(layout, layout)
        kernel, stores = make_copies(self._region, self._target, plan), CellCopies(self._region, self._target, plan)
        self.kernel = type(kernel).__name__
        self.ways: dict[str, Way] = {
            "kernel": lambda layers: kernel(layers, *tables),
            "stores": lambda layers: stores(layers, *tables),
            "engine": self._by_engine,
        }

    def enqueue(self, name: str, after: Mark = None) -> Events:
        """Everything, `_TIMES` over; events before and behind."""
        with self._region.copying(after), _timed() as events:
            for group in self._groups * _TIMES:
                self.ways[name](group)
        return events

    def _by_engine(self, layers: range) -> None:
        stream, size = self._region.stream, self.num_bytes // self._layers
        assert stream is not None
        to, from_ = (memory.data_ptr() + size * layers.start for memory in (self._target, self._region.memory))
        driver().bind(self._region.ordinal)
        driver().copy([(to, from_, size * len(layers))], stream.cuda_stream)


class Products:
    """The same product again and again, on a stream of its own."""

    def __init__(self) -> None:
        self._a, self._b = (torch.randn(_SIDE, _SIDE, dtype=torch.bfloat16, device="cuda:0") for _ in range(2))
        self._out = torch.empty_like(self._a)
        self._stream = torch.cuda.Stream("cuda:0")  # type: ignore[no-untyped-call]

    def enqueue(self, times: int) -> Events:
        """Events before and behind; a product more runs first, while the others and what goes beside are enqueued."""
        with torch.cuda.stream(self._stream):
            torch.mm(self._a, self._b, out=self._out)
            with _timed() as events:
                for _ in range(times):
                    torch.mm(self._a, self._b, out=self._out)
        return events


def measure(copies: Copies, rounds: int) -> dict[str, Any]:
    """Every way alone and beside products."""
    products = Products()
    for name in copies.ways:
        _ms(copies.enqueue(name))
    _ms(products.enqueue(_PREHEAT))
    product_ms = _ms(products.enqueue(20)) / 20
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in copies.ways}
    for _, name in itertools.product(range(rounds), copies.ways):
        alone = _ms(copies.enqueue(name))
        count = round(_LONGER * alone / product_ms)
        # A card that has rested is faster, so that products right before and after, in one go, say how fast it is.
        before, running, after = (products.enqueue(count) for _ in range(3))
        beside = _ms(copies.enqueue(name, running[0]))
        rows[name].append((alone, beside, _ms(running) - (_ms(before) + _ms(after)) / 2))
    report: dict[str, Any] = {"card": torch.cuda.get_device_name(0), "by": copies.kernel, "bytes": copies.num_bytes}
    for name, measured in rows.items():
        alone, beside, lost = (statistics.median(column) / _TIMES for column in zip(*measured, strict=True))
        report[name] = {
            "alone_gb_per_s": round(copies.num_bytes / alone / 1e6, 1),
            "beside_gb_per_s": round(copies.num_bytes / beside / 1e6, 1),
            "lost_ms": round(lost, 2),
            "lost_share": round(lost / beside, 3),
        }
    return {**report, "product_ms": round(product_ms, 3)}


@contextmanager
def _timed() -> Iterator[Events]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    yield begin, end
    end.record()


def _ms(events: Events) -> float:
    torch.cuda.synchronize("cuda:0")
    return float(events[0].elapsed_time(events[1]))


def main() -> int:
    """Print a table, or JSON; 2 without a card."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--layers", type=int, default=61, help="main layers; the MTP layer is added")
    parser.add_argument("--groups", type=int, default=10, help="of layers, each sent as it is ready")
    parser.add_argument("--kv-format", choices=FORMATS, default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("handoff_interference: no card is visible here", file=sys.stderr)
        return 2
    torch.cuda.set_device(0)
    report = measure(Copies(args.tokens, args.layers, args.groups, args.kv_format), args.rounds)
    print(json.dumps(report, indent=2) if args.json else "\n".join(f"{name:<12}{report[name]}" for name in report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
