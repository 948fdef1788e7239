"""The command line is frozen here: a new setting belongs in the configuration file."""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from deploy import cli

SURFACE = {
    "baton": [],
    "baton up": ["--config", "--set", "--detach", "--run-dir"],
    "baton down": ["--timeout", "--run-dir"],
    "baton status": ["--json", "--run-dir"],
    "baton scale": ["POOL", "N", "--timeout", "--no-wait", "--run-dir"],
    "baton drain": ["WORKER", "--timeout", "--no-wait", "--run-dir"],
    "baton rollout": ["--config", "--set", "--timeout", "--no-wait", "--run-dir"],
    "baton preflight": ["--config", "--set", "--role"],
    "baton model": [],
    "baton model make": ["SIZE", "--out", "--seed", "--dtype", "--fp8", "--random"],
    "baton model inspect": ["DIR", "--json"],
    "baton bench": [],
    "baton bench engine": [],
    "baton bench handoff": [],
    "baton bench replay": [],
    "baton bench serve": [],
    "baton eval": [],
}


def options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    actions = [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]
    nested = [a for a in actions if isinstance(a, argparse._SubParsersAction)]
    names = [a.option_strings[-1] if a.option_strings else str(a.metavar) for a in actions if a not in nested]
    yield parser.prog, names
    for action in nested:
        for child in action.choices.values():
            yield from options(child)


class Done(NamedTuple):
    code: int
    out: str
    err: str


Baton = Callable[..., Done]


@pytest.fixture
def baton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Baton:
    """Runs one command in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Done:
        try:
            code = cli.main(words)
        except SystemExit as ended:
            code = int(ended.code or 0)
        return Done(code, *capsys.readouterr())

    return run


def test_every_option_is_known() -> None:
    assert dict(options(cli.parser())) == SURFACE


@pytest.mark.parametrize("command", [*SURFACE, *(f"baton bench {kind}" for kind in cli._BENCHMARKS)])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split()[1:], "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {command}")
    assert all(option in text for option in SURFACE[command])


@pytest.mark.parametrize("heavy", ["torch", "ray", "fastapi", "pydantic"])
def test_help_imports_nothing_heavy(heavy: str) -> None:
    code = f"import sys, deploy.cli; deploy.cli.parser().format_help(); sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "COMMAND"),
        (["frobnicate"], 2, "invalid choice"),
        (["up", "--conf", "x.toml"], 2, "unrecognized arguments"),
        (["scale", "decode"], 2, "required: N"),
        (["scale", "decoder", "2"], 2, "choose from"),
        (["scale", "decode", "-1"], 2, "N"),
        (["scale", "decode", "1025"], 2, "expected 0 to 1024"),
        (["drain", "decode-0", "--timeout", "0"], 2, "expected more than 0"),
        (["model", "make", "huge", "--out", "x"], 2, "invalid choice"),
        (["model", "inspect", "missing"], 2, "missing"),
        (["up", "--config", "missing.toml"], 2, "missing.toml: No such file"),
        (["up", "--set", "router.prot=1"], 2, "router.prot"),
        (["up", "--set", "router.port=seventy"], 2, "router.port"),
        (["up", "--set", "router"], 2, "expected section.key=value"),
        (["status"], 3, "no cluster is running"),
        (["scale", "decode", "2"], 3, "no cluster is running"),
        (["drain", "decode-0"], 3, "no cluster is running"),
        (["rollout"], 3, "no cluster is running"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(words: list[str], code: int, said: str, baton: Baton) -> None:
    done = baton(*words)
    assert done.code == code, done.err
    assert said in done.err
    assert "Traceback" not in done.err
    lines = [line for line in done.err.splitlines() if not line.startswith(("usage:", " "))]
    assert len(lines) == 1, done.err
    assert done.out == ""


def test_a_configuration_error_starts_nothing(baton: Baton, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[model]\npath = '.'\n[kv]\nblock_tokens = 1\n", encoding="utf-8")
    for detach in ([], ["--detach"]):
        done = baton("up", "--config", "bad.toml", *detach)
        assert done.code == 2
        assert "kv.block_tokens=1" in done.err
    assert not (tmp_path / ".baton").exists()


def test_a_taken_port_is_reported_before_anything_starts(baton: Baton, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = baton("up", "--set", f"model.path={tmp_path}", "--set", f"router.port={port}")
    assert done.code == 2
    assert f"router.port={port}: Address already in use" in done.err
    assert not (tmp_path / ".baton" / "run" / "secret").exists()


def test_the_process_ends_with_the_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deploy.cli", "status", "--run-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1)


def test_down_without_a_cluster_is_fine(baton: Baton) -> None:
    done = baton("down")
    assert (done.code, done.err) == (0, "")
    assert "no cluster is running" in done.out


def test_a_made_checkpoint_can_be_inspected(baton: Baton) -> None:
    made = baton("model", "make", "nano", "--out", "m", "--seed", "3", "--dtype", "bf16")
    assert (made.code, made.out.strip()) == (0, "m"), made.err
    shown = baton("model", "inspect", "m", "--json")
    assert shown.code == 0, shown.err
    facts = json.loads(shown.out)
    plain = baton("model", "inspect", "m")
    assert [line.split()[0] for line in plain.out.splitlines() if line] == list(facts)
