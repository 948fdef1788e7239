"""The options of `benchmarks.handoff`, and whether this machine can do what they ask for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.handoff_report import modes
from benchmarks.handoff_rig import BLOCK_TOKENS, FORMATS

_MEMORY_SHARE = 0.6  # of what is available, for both pools together


def parse(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """The options; `words` are the arguments as they were given."""
    parser = argparse.ArgumentParser(
        prog="baton bench handoff", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--transport", choices=("shm", "tcp", "mooncake", "cuda_ipc"), default="shm")
    parser.add_argument("--device", type=int, default=0, help="card of the writer, with cuda_ipc (default 0)")
    parser.add_argument("--receiver-device", type=int, default=-1, help="of the receiver (default: the last)")
    parser.add_argument("--tokens", type=int, default=4096, help="context of one hand-off (default %(default)s)")
    parser.add_argument("--geometry", choices=("v3.2",), default="v3.2", help="pages and planes of this model")
    parser.add_argument("--layers", type=int, default=61, help="main layers; fewer fit more tokens into memory")
    parser.add_argument("--kv-format", choices=tuple(FORMATS), default="bf16")
    parser.add_argument("--checksum", choices=("auto", "full", "sampled", "count"), default="auto")
    parser.add_argument("--compute-ms-per-layer", type=float, default=0.0, help="simulated (default: 0)")
    parser.add_argument(
        "--ready-at",
        type=float,
        default=1.0,
        help="when in a layer's compute its cache rows are stored: Baton's model stores them before attention "
        "(default %(default)s: at its end)",
    )
    parser.add_argument("--chunk-tokens", type=int, help="chunked prefill (default: one chunk)")
    parser.add_argument("--mode", choices=("all", *modes(BLOCK_TOKENS, 1)), default="bulk")
    parser.add_argument("--repeat", type=int, default=5, help="rounds of every mode; small ones run 20 times as often")
    parser.add_argument(
        "--versus", choices=("shm", "tcp", "mooncake"), help="the same over another transport, in turns"
    )
    parser.add_argument("--trace", type=Path, help="write the timeline of one more hand-off: FILE, and FILE's .svg")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.add_argument("--receiver", action="store_true", help=argparse.SUPPRESS)
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    args.words = words
    if min(args.tokens, args.layers, args.repeat) < 1 or args.compute_ms_per_layer < 0:
        parser.error("--tokens, --layers and --repeat must be positive, --compute-ms-per-layer not negative")
    if not 0 <= args.ready_at <= 1:
        parser.error("--ready-at is a share of a layer's compute: expected 0 to 1")
    return args


def cannot(args: argparse.Namespace, arena_bytes: int) -> str:
    """Why this machine can't run them with two pools of `arena_bytes`, or ""."""
    if args.transport == "cuda_ipc" and (reason := _no_card()):
        return reason
    available = _available_bytes(args)
    if args.receiver or 2 * arena_bytes <= _MEMORY_SHARE * available:
        return ""
    return f"two pools need {2 * arena_bytes / 1e9:.1f} GB of {available / 1e9:.1f} GB: lower --tokens or --layers"


def _no_card() -> str:
    import torch

    return "" if torch.cuda.is_available() else "cuda_ipc needs a card, torch sees none"


def _available_bytes(args: argparse.Namespace) -> int:
    """Where the pools go; a card's memory may be shared by both."""
    if args.transport == "cuda_ipc":
        import torch

        return int(torch.cuda.mem_get_info(args.device)[0])
    import psutil

    return int(psutil.virtual_memory().available)
