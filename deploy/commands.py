"""What the commands of `baton` do. Each takes the parsed options and returns an exit code; errors are ServingErrors."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

import llm_engine
from deploy import supervisor
from deploy.actors import last_line
from deploy.cli import EXIT_FAILED, EXIT_NOT_READY, EXIT_OK
from deploy.control import ClusterStatus, DrainWorker, RollOut, ScalePool
from deploy.report import banner, table
from deploy.rundir import RunDir
from llm_engine.api.config import Resolved, load
from llm_engine.api.errors import ConfigError

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "cpu-nano.toml"
SHIPPED_MODEL = Path(llm_engine.__file__).parent / "checkpoints" / "baton-nano"
_POLL_S = 0.2


def up(args: argparse.Namespace) -> int:
    """Foreground: run the cluster. Detached: start that as a process of its own and wait until it is ready."""
    resolved = _load(args.config, args.overrides)
    run_dir = RunDir(args.run_dir)
    if args.detach:
        return _detach(args, resolved, run_dir)
    supervisor.up(resolved, run_dir)
    return EXIT_OK


def down(args: argparse.Namespace) -> int:
    """Stopping what does not run is fine: scripts may call it twice."""
    run_dir = RunDir(args.run_dir)
    stopped = supervisor.down(run_dir, args.timeout)
    print("stopped" if stopped else f"no cluster is running in {run_dir.path}")
    return EXIT_OK


def status(args: argparse.Namespace) -> int:
    """Exit code 4 while the cluster is not ready."""
    current = supervisor.status(RunDir(args.run_dir))
    print(msgspec.json.format(msgspec.json.encode(current)).decode() if args.json else table(current))
    return EXIT_OK if current.ready else EXIT_NOT_READY


def scale(args: argparse.Namespace) -> int:
    """Write the desired size; wait until the pool has it."""

    def reached(current: ClusterStatus) -> bool:
        members = [worker for worker in current.workers if worker.role == args.pool]
        return len(members) == args.replicas and all(worker.state == "ready" for worker in members)

    run_dir = RunDir(args.run_dir)
    with supervisor.connect(run_dir) as client:
        client.ask(ScalePool(pool=args.pool, replicas=args.replicas))
    return _wait(args, run_dir, reached, f"{args.pool}: {args.replicas} ready")


def drain(args: argparse.Namespace) -> int:
    """Take a worker out; wait until it has stopped. Its pool gets a fresh one under another name."""
    run_dir = RunDir(args.run_dir)
    with supervisor.connect(run_dir) as client:
        client.ask(DrainWorker(worker=args.worker))
    return _wait(args, run_dir, lambda now: all(w.name != args.worker for w in now.workers), f"{args.worker}: drained")


def rollout(args: argparse.Namespace) -> int:
    """Without a configuration, the new workers get the one of the old ones: for new code or new weights."""

    def replaced(current: ClusterStatus) -> bool:
        return current.ready and all(w.state == "ready" and w.revision == revision for w in current.workers)

    run_dir = RunDir(args.run_dir)
    with supervisor.connect(run_dir) as client:
        config = ""
        if args.config is not None or args.overrides:
            config = _load(args.config or run_dir.config, args.overrides).config.model_dump_json()
        revision = client.ask(RollOut(config=config)).revision
    return _wait(args, run_dir, replaced, f"every worker is of revision {revision}")


def preflight(args: argparse.Namespace) -> int:
    """One line per check; exit code 2 if one fails that a worker needs."""
    from deploy.preflight import run

    return run(_load(args.config, args.overrides).config, args.role, print)


def model_make(args: argparse.Namespace) -> int:
    """Write a synthetic checkpoint."""
    from llm_engine.models.synthetic import make_checkpoint

    try:
        path = make_checkpoint(
            args.size, args.out, seed=args.seed, dtype=args.dtype, fp8=args.fp8, planted=not args.random
        )
    except OSError as exc:
        raise ConfigError(f"--out {args.out}: {exc.strerror or exc}") from exc
    print(path)
    return EXIT_OK


def model_inspect(args: argparse.Namespace) -> int:
    """Describe a checkpoint."""
    from llm_engine.models.checkpoint import inspect_checkpoint

    facts = inspect_checkpoint(args.dir)
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        width = max(len(key) for key in facts)
        print("\n".join(f"{key.ljust(width)}  {value}" for key, value in facts.items()))
    return EXIT_OK


def _load(path: Path | None, overrides: list[str]) -> Resolved:
    """The configuration with absolute paths: processes elsewhere must find the same files."""
    if path is None:
        path, overrides = DEFAULT_CONFIG, [f"model.path={json.dumps(str(SHIPPED_MODEL))}", *overrides]
    resolved = load(path, overrides)
    model = resolved.config.model.model_copy(update={"path": resolved.config.model.path.absolute()})
    return Resolved(resolved.config.model_copy(update={"model": model}), resolved.sources)


def _detach(args: argparse.Namespace, resolved: Resolved, run_dir: RunDir) -> int:
    started = time.monotonic()
    run_dir.logs.mkdir(parents=True, exist_ok=True)
    log = run_dir.logs / "up.log"
    command = [sys.executable, "-m", "deploy.cli", "up", "--run-dir", str(run_dir.path)]
    command += ["--config", str(args.config.absolute())] if args.config else []
    command += [word for override in args.overrides for word in ("--set", override)]
    with log.open("wb") as sink:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
    while child.poll() is None:
        record = run_dir.cluster()
        if record is not None and record.supervisor.pid == child.pid and record.ready:
            print(banner(supervisor.status(run_dir), resolved.config, run_dir.path, time.monotonic() - started))
            print("Stop it with `baton down`.")
            return EXIT_OK
        time.sleep(_POLL_S)
    print(last_line(log), file=sys.stderr)
    return child.returncode or EXIT_FAILED


def _wait(args: argparse.Namespace, run_dir: RunDir, reached: Callable[[ClusterStatus], bool], done: str) -> int:
    if args.no_wait:
        return EXIT_OK
    deadline = time.monotonic() + args.timeout
    while time.monotonic() < deadline:
        if reached(supervisor.status(run_dir)):
            print(done)
            return EXIT_OK
        time.sleep(_POLL_S)
    print(f"baton: not done within {args.timeout:g} s; it goes on: see `baton status`", file=sys.stderr)
    return EXIT_NOT_READY
