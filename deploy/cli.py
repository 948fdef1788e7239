"""The `baton` command.

Exit codes: 0 done; 1 failed; 2 wrong usage or configuration; 3 no cluster is running; 4 not ready or not done in time.
Errors are one line on stderr. Heavy imports happen in the command that needs them, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_RUNNING = 3
EXIT_NOT_READY = 4

_EPILOG = """exit codes:
  0  done
  1  failed
  2  wrong usage or configuration
  3  no cluster is running in the run directory
  4  not ready, or not done within the given time
"""
_POOLS = ("prefill", "decode", "aggregated")
_ROLES = (*_POOLS, "router")
_BENCHMARKS = ("engine", "handoff", "replay", "serve")

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def parser() -> argparse.ArgumentParser:
    """Every command and option. A test freezes the list: new settings belong in the configuration file."""
    root = argparse.ArgumentParser(
        prog="baton",
        description="Serve DeepSeek V3.2 with prefill and decode apart.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = root.add_subparsers(metavar="COMMAND", required=True)

    up = _add(commands, "up", "bring a cluster up on this machine", "up")
    up.add_argument("--config", type=Path, metavar="FILE", help="configuration (TOML; default: Baton-nano on this CPU)")
    up.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE", help="override one setting"
    )
    up.add_argument("--detach", action="store_true", help="return when the cluster is ready and leave it running")
    _run_dir(up)

    down = _add(commands, "down", "stop the cluster of this run directory", "down")
    down.add_argument("--timeout", type=_seconds, default=60.0, metavar="S", help="kill it after so long (default: 60)")
    _run_dir(down)

    status = _add(commands, "status", "show pools, workers and addresses", "status")
    status.add_argument("--json", action="store_true", help="print JSON")
    _run_dir(status)

    scale = _add(commands, "scale", "change the size of a pool", "scale")
    scale.add_argument("pool", choices=_POOLS, metavar="POOL", help=f"one of {', '.join(_POOLS)}")
    scale.add_argument("replicas", type=_count, metavar="N", help="workers wanted")
    _waiting(scale)
    _run_dir(scale)

    drain = _add(commands, "drain", "replace a worker once its requests are finished or handed over", "drain")
    drain.add_argument("worker", metavar="WORKER", help="its name, as `baton status` shows it")
    _waiting(drain)
    _run_dir(drain)

    rollout = _add(commands, "rollout", "replace every worker by a new one, one at a time", "rollout")
    rollout.add_argument("--config", type=Path, metavar="FILE", help="configuration of the new workers (TOML)")
    rollout.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE", help="override one setting"
    )
    _waiting(rollout)
    _run_dir(rollout)

    preflight = _add(commands, "preflight", "check that this host can run a worker or a router", "preflight")
    preflight.add_argument(
        "--config", type=Path, metavar="FILE", help="configuration (TOML; default: Baton-nano on this CPU)"
    )
    preflight.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="SECTION.KEY=VALUE", help="override one setting"
    )
    preflight.add_argument(
        "--role", choices=_ROLES, default="decode", help="what is to run here (default: %(default)s)"
    )

    _model(_add(commands, "model", "make or inspect a checkpoint"))
    _bench(_add(commands, "bench", "measure a running cluster"))
    commands.add_parser("eval", help="score a running Baton-nano by skill (see `baton eval --help`)")
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["bench"] and len(words) > 1 and words[1] in _BENCHMARKS:
        return _benchmark(words[1], words[2:])
    if words[:1] == ["eval"]:
        return _benchmark("accuracy", words[1:])
    args = parser().parse_args(words)
    try:
        code: int = getattr(importlib.import_module("deploy.commands"), args.run)(args)
    except KeyboardInterrupt:
        return 130
    except Exception as exc:
        code = _explain(exc)
    return code


def _model(model: argparse.ArgumentParser) -> None:
    actions = model.add_subparsers(metavar="ACTION", required=True)
    make = _add(actions, "make", "write a checkpoint of test size from a seed", "model_make")
    make.add_argument("size", choices=("nano", "tiny", "tiny-gpu"), metavar="SIZE", help="nano, tiny or tiny-gpu")
    make.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    make.add_argument("--seed", type=int, default=0, metavar="N", help="weights follow from it (default: 0)")
    make.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the stored weights (default: fp32)")
    make.add_argument("--fp8", action="store_true", help="store linear weights as blocks of fp8")
    make.add_argument("--random", action="store_true", help="random weights instead of a predictable next token")
    inspect = _add(actions, "inspect", "show what a checkpoint holds", "model_inspect")
    inspect.add_argument("dir", type=Path, metavar="DIR", help="directory of the checkpoint")
    inspect.add_argument("--json", action="store_true", help="print JSON")


def _bench(bench: argparse.ArgumentParser) -> None:
    kinds = bench.add_subparsers(metavar="KIND", required=True)
    kinds.add_parser(
        "engine", help="time a slice of the model on this machine's card (see `baton bench engine --help`)"
    )
    kinds.add_parser("handoff", help="speed of the hand-off on this host (see `baton bench handoff --help`)")
    kinds.add_parser("replay", help="replay the arrivals and prefixes of a trace (see `baton bench replay --help`)")
    kinds.add_parser("serve", help="keep a number of streams running (see `baton bench serve --help`)")


def _benchmark(kind: str, argv: list[str]) -> int:
    """Benchmarks read their own options. They are found by name: they are a separate, optional part."""
    try:
        module = importlib.import_module(f"benchmarks.{kind}")
    except ModuleNotFoundError as exc:
        print(f"baton {kind}: {exc}; install Baton with its `bench` extra", file=sys.stderr)
        return EXIT_FAILED
    code: int = module.main(argv)
    return code


def _explain(exc: Exception) -> int:
    """One line on stderr and the exit code for an error of Baton; any other error is a bug and keeps its traceback."""
    from deploy.control import ControlTimeout
    from deploy.rundir import NotRunning
    from llm_engine.api.errors import ConfigError, ServingError

    if not isinstance(exc, ServingError):
        raise exc
    print(f"baton: {exc}", file=sys.stderr)
    codes = {ConfigError: EXIT_USAGE, NotRunning: EXIT_NOT_RUNNING, ControlTimeout: EXIT_NOT_READY}
    return next((code for kind, code in codes.items() if isinstance(exc, kind)), EXIT_FAILED)


def _add(commands: Commands, name: str, summary: str, run: str = "") -> argparse.ArgumentParser:
    """A command; `run` names the function of deploy.commands that carries it out."""
    command = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(run=run)
    return command


def _run_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--run-dir",
        type=Path,
        default=Path(".baton/run"),
        metavar="DIR",
        help="the cluster's directory (default: %(default)s)",
    )


def _waiting(command: argparse.ArgumentParser) -> None:
    command.add_argument("--timeout", type=_seconds, default=120.0, metavar="S", help="longest wait (default: 120)")
    command.add_argument("--no-wait", action="store_true", help="return at once")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0 and at most 86400 seconds")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 1024:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 to 1024")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
