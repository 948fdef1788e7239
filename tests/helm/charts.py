"""The chart, the tools that read it, and what they make of it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.install_tools import DIRECTORY, HELM

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm"
SCHEMAS = Path(os.environ.get("BATON_K8S_SCHEMAS", ROOT.parent / "shared" / "k8s"))
HELMS = tuple(HELM)
VALUES = {"cpu": "values-cpu.yaml", "gpu": "values-gpu-v32.yaml", "ascend": "values-ascend-v32.yaml"}
CASES = list(itertools.product(VALUES, (False, True), (False, True)))
RELEASE, NAMESPACE = "baton", "serving"

_PACKAGES = {"promtool": "prometheus"}

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str


def tool(name: str) -> str:
    """Path of a tool; the test is skipped, naming it, where it is missing. CI has them all."""
    own = DIRECTORY / name
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        how = (
            f"python {Path('tests/helm/install_tools.py')}"
            if name in HELM
            else f"apt-get install {_PACKAGES.get(name, name)}"
        )
        if os.environ.get("CI"):
            pytest.fail(f"{name} is missing: {how}")
        pytest.skip(f"{name} is missing: {how}")
    return found


def schemas(kind: str) -> Path:
    """Directory of schema files; the test is skipped where they are missing."""
    if not (SCHEMAS / kind).is_dir():
        pytest.skip(f"{SCHEMAS / kind} is missing: set BATON_K8S_SCHEMAS to a directory with {kind}/")
    return SCHEMAS / kind


def run(*words: str, env: Mapping[str, str] | None = None, timeout_s: float = 60.0) -> Done:
    """Run a command to its end."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, env={**os.environ, **(env or {})})
    return Done(done.returncode, done.stdout, done.stderr)


def options(hardware: str, monitoring: bool = False, autoscaling: bool = True, *sets: str) -> list[str]:
    """Command-line options of one case."""
    switches = [f"monitoring.enabled={str(monitoring).lower()}", f"autoscaling.enabled={str(autoscaling).lower()}"]
    return ["-f", str(CHART / VALUES[hardware]), *(word for item in (*switches, *sets) for word in ("--set", item))]


def template(helm: str, words: Sequence[str]) -> Done:
    """`helm template` as an upgrade sees it."""
    return run(tool(helm), "template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--is-upgrade", *words)


@cache
def rendered(
    hardware: str, monitoring: bool = False, autoscaling: bool = True, *sets: str, helm: str = HELMS[-1]
) -> tuple[Manifest, ...]:
    """Every object of one case."""
    done = template(helm, options(hardware, monitoring, autoscaling, *sets))
    assert done.code == 0, done.err
    return tuple(doc for doc in yaml.load_all(done.out, yaml.CSafeLoader) if doc)


def refusal(helm: str, *words: str) -> str:
    """What Helm says when it refuses the values."""
    done = template(helm, words)
    assert done.code != 0, "the values were accepted"
    return done.err


def only(docs: Sequence[Manifest], kind: str, name: str | None = None) -> Manifest:
    """The one object of a kind (and name)."""
    found = [doc for doc in docs if doc["kind"] == kind and name in (None, doc["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} objects of kind {kind}"
    return found[0]


def groups(docs: Sequence[Manifest]) -> dict[str, Manifest]:
    """Worker groups of the RayCluster by name."""
    return {group["groupName"]: group for group in only(docs, "RayCluster")["spec"]["workerGroupSpecs"]}


def config_text(docs: Sequence[Manifest]) -> str:
    """Baton's configuration file."""
    text: str = only(docs, "ConfigMap", "baton-config")["data"]["config.toml"]
    return text


def config_tree(docs: Sequence[Manifest]) -> dict[str, Any]:
    return tomllib.loads(config_text(docs))


def pod_specs(docs: Sequence[Manifest]) -> dict[str, Manifest]:
    """Every pod template by the name of its owner; worker groups by pool, the head as `head`."""
    specs: dict[str, Manifest] = {}
    for doc in docs:
        name = doc["metadata"]["name"]
        if doc["kind"] == "Pod":
            specs[name] = doc["spec"]
        elif doc["kind"] in ("Deployment", "Job"):
            specs[name] = doc["spec"]["template"]["spec"]
        elif doc["kind"] == "RayCluster":
            specs["head"] = doc["spec"]["headGroupSpec"]["template"]["spec"]
            specs.update({g["groupName"]: g["template"]["spec"] for g in doc["spec"]["workerGroupSpecs"]})
    return specs


def ray_resource(docs: Sequence[Manifest], pool: str) -> str:
    """The Ray resource that a pool's pods have one of, and its workers take one of."""
    params: str = groups(docs)[pool]["rayStartParams"]["resources"]
    [name] = [name for name in json.loads(params[1:-1].replace("\\", "")) if name.startswith(f"baton_{pool}_")]
    return name
