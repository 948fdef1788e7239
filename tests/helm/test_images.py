"""Recipes of the images, as far as they can be checked without building: context, steps, user, what the chart calls."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.helm.charts import ROOT, pod_specs, rendered

RECIPES = ("cpu", "cuda", "npu")
_STEP = re.compile(r"^(FROM|RUN|COPY|ENV|ARG|USER|WORKDIR|CMD)\s+(.*)$", re.DOTALL)


def steps(recipe: str) -> list[tuple[str, str]]:
    """Instruction and argument of every step, continuation lines joined."""
    text = (ROOT / "deploy" / "docker" / f"Dockerfile.{recipe}").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    found = []
    for block in re.split(r"(?<!\\)\n", text):
        if block.strip():
            match = _STEP.match(block)
            assert match, f"an unknown instruction: {block}"
            found.append((match[1], match[2]))
    return found


def context() -> list[Path]:
    """Files that a build is given, by .dockerignore."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    wanted = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    unwanted = [pattern for pattern in patterns[1:] if not pattern.startswith("!")]
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    found = []
    for name in tracked.stdout.splitlines():
        path = Path(name)
        parts = [path, *path.parents]
        if path.parts[0] in wanted and not any(_matches(part, pattern) for part in parts for pattern in unwanted):
            found.append(path)
    return [path for path in found if (ROOT / path).is_file()]


def _matches(path: Path, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatch.fnmatch(path.name, pattern[3:]) and path != Path(".")
    return str(path) == pattern


def test_the_context_holds_the_packages_and_nothing_else() -> None:
    files = context()
    assert {path.parts[0] for path in files if len(path.parts) == 1} == {
        *("pyproject.toml", "constraints.txt", "README.md", "LICENSE"),
    }
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {name.rstrip("*") for name in settings["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert {path.parts[0] for path in files if len(path.parts) > 1} == packages
    assert sum((ROOT / path).stat().st_size for path in files) < 64 << 20
    assert not any("docker" in path.parts for path in files)


@pytest.mark.parametrize("command", ["deploy.cli", "deploy.kube", "router", "prefill_worker", "decode_worker"])
def test_the_context_holds_all_that_a_command_needs(command: str, installed: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", command, "--help"],
        cwd=installed,
        env={**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (installed / command.partition(".")[0]).is_dir()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the context."""
    root = tmp_path_factory.mktemp("context")
    for path in context():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, root / path)
    return root


def test_the_context_holds_data_files(installed: Path) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for package, patterns in settings["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            assert list((installed / package.replace(".", "/")).glob(pattern)), f"{package}: no {pattern}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_ends_as_an_ordinary_user(recipe: str) -> None:
    found = steps(recipe)
    last = max(i for i, (instruction, _) in enumerate(found) if instruction == "FROM")
    final = dict(found[last:])
    assert final["USER"] == "1000:1000"
    assert final["WORKDIR"] == "/var/lib/baton"
    spec = pod_specs(rendered("cpu"))["head"]
    assert spec["securityContext"]["runAsUser"] == 1000
    assert spec["containers"][0]["workingDir"] == final["WORKDIR"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_installs_what_the_chart_calls(recipe: str) -> None:
    text = "\n".join(argument for _, argument in steps(recipe))
    for needed in ("ray[default]==2.60.0", "obstore", "bash", "wget"):
        assert needed in text
    assert rendered("cpu")
    extras = {name for group in re.findall(r'"\.\[([^\]]+)\]"', text) for name in group.split(",")}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    declared = settings["project"]["optional-dependencies"]
    assert extras == {"router", recipe, "cluster"}
    assert extras <= declared.keys()
    assert any("ray==2.60.0" in requirement for requirement in declared["cluster"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_step_is_sound(recipe: str) -> None:
    given = {str(path) for path in context()} | {"."}
    for instruction, argument in steps(recipe):
        if instruction == "FROM":
            assert ":latest" not in argument
        elif instruction == "COPY" and "--from=" not in argument:
            *sources, _ = argument.split()
            assert set(sources) <= given
        elif instruction == "RUN":
            checked = subprocess.run(["sh", "-n"], input=argument, text=True, capture_output=True)
            assert checked.returncode == 0, checked.stderr
            assert "apt-get install" not in argument or "rm -rf /var/lib/apt/lists/*" in argument
            assert "pip install" not in argument or "-c constraints.txt" in argument
