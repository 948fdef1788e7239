"""The command line of a worker: one line and an exit code for everything that can be wrong before it serves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_engine.api.config import SECRET_ENV

SECRET = "s" * 32


def run(module: str, *args: str, secret: str | None = SECRET) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != SECRET_ENV}
    if secret is not None:
        env[SECRET_ENV] = secret
    command = [sys.executable, "-m", module, *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("module", ["prefill_worker", "decode_worker"])
def test_help_lists_the_options(module: str) -> None:
    result = run(module, "--help")
    assert result.returncode == 0
    options = {word for word in result.stdout.replace("]", " ").replace("[", " ").split() if word.startswith("--")}
    expected = {"--help", "--config", "--name", "--set", "--log-level"}
    assert options == expected | ({"--role"} if module == "decode_worker" else set())


@pytest.mark.parametrize(
    ("toml", "args", "secret", "message"),
    [
        ("", [], SECRET, "model: field required"),
        ('model.path = "x"\nengine.treads = 2', [], SECRET, "engine.treads: extra inputs are not permitted"),
        ('model.path = "x"', ["--set", "kv.block_tokens=3"], SECRET, "kv.block_tokens=3"),
        ('model.path = "x"', ["--set", "nonsense"], SECRET, "override 'nonsense': expected section.key=value"),
        ('model.path = "x"', [], None, f"{SECRET_ENV}: set it to the same random string"),
        ('model.path = "x"', [], "short", f"{SECRET_ENV}: set it to the same random string"),
        ('model.path = "/no/such/dir"', [], SECRET, "model.path=/no/such/dir: not a directory"),
    ],
    ids=["no-model", "unknown-key", "bad-override", "no-override", "no-secret", "short-secret", "no-checkpoint"],
)
def test_a_bad_start_is_one_line_and_exit_code_2(
    toml: str, args: list[str], secret: str | None, message: str, tmp_path: Path
) -> None:
    config = write(tmp_path / "baton.toml", toml)
    result = run("prefill_worker", "--config", config, "--log-level", "warning", *args, secret=secret)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("python -m prefill_worker: ")
    assert result.stdout == ""


def test_a_secret_is_not_in_the_log(tmp_path: Path) -> None:
    config = write(tmp_path / "baton.toml", 'model.path = "/no/such/dir"')
    result = run("decode_worker", "--config", config, "--log-level", "debug", secret="hunter2-hunter2-hunter2")
    assert result.returncode == 2
    assert "model.path" in result.stderr
    assert "hunter2" not in result.stderr
