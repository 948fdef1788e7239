"""Kernels compile for Hopper at the real model's shapes, fit its shared memory and spill next to nothing.

No card is needed: the table runs on tensors without storage, under a driver that compiles and launches nothing. What
would read a value back from the device fails there, so this also shows that no call of the table waits for the device.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_engine import ops_triton

_MAX_SHARED = 227 << 10  # bytes a block may use on sm_90
_MAX_SHARED_BESIDE = 33 << 10
_MAX_SPILL = 512  # bytes a thread
_MAX_HOPPER_SPILL = 128  # outside of loops


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


def compiled(case: str, cache_dir: Path) -> list[dict[str, Any]]:
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache_dir), "TRITON_DEFAULT_FP_FUSION": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.ops_triton.compile_only", *case.split()]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    kernels: list[dict[str, Any]] = json.loads(done.stdout)
    for kernel in kernels:
        assert kernel["shared"] <= _MAX_SHARED, kernel
        assert kernel["spilled"] <= _MAX_SPILL, kernel
    return kernels


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "names"),
    [("attend_pairs", ["_attend_pairs"] * 4), ("experts", ["_expert_product"] * 2)],
)
def test_what_is_made_for_hopper_compiles(case: str, names: list[str], cache_dir: Path) -> None:
    """Products stay asynchronous, and registers where they are, without which it is of no use."""
    kernels = compiled(case, cache_dir)
    assert [kernel["name"] for kernel in kernels] == names
    assert all(kernel["tensor_cores"] and not kernel["one_by_one"] for kernel in kernels)
    assert all(kernel["spilled"] <= _MAX_HOPPER_SPILL for kernel in kernels)


@pytest.mark.slow
def test_copies_for_hopper_fit_beside_products_and_end_when_they_have_landed(cache_dir: Path) -> None:
    """A large product takes nearly all of a processor's registers and leaves room for a warp with few of them."""
    kernels = compiled("copies", cache_dir)
    assert [kernel["name"] for kernel in kernels] == ["copy_tiles"] * 2, "one for each format of pages"
    assert all(kernel["warps"] == 1 and kernel["registers"] <= 32 for kernel in kernels)
    assert all(kernel["shared"] <= _MAX_SHARED_BESIDE for kernel in kernels)
    assert all(kernel["awaits_writes"] for kernel in kernels)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_kernel_compiles(cache_dir: Path) -> None:
    """Each once, of four passes that together launch all of them."""
    kernels = compiled("--once exact/bf16/decode fast/fp8/decode fast/fp8/single fast/fp8/prefill", cache_dir)
    names = {kernel["name"] for kernel in kernels}
    sources = "".join(path.read_text() for path in Path(ops_triton.__file__).parent.glob("*.py"))
    assert names == set(re.findall(r"@(?:gluon_|fp8_)?kernel\ndef (\w+)", sources))
    assert [kernel["fused"] for kernel in kernels if kernel["name"] == "_race"] == [False], "noise of other bits"
    multiply = {kernel["name"] for kernel in kernels if kernel["tensor_cores"]}
    general = {"_product", "_product_fp8", "_up_kernel", "_down_kernel", "_scores", "_attend"}
    assert multiply == general | {"_attend_pairs", "_expert_product"}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize("weights", ["bf16", "fp8"])
@pytest.mark.parametrize("phase", ["decode", "few", "single", "prefill"])
def test_every_launch_compiles(numerics: str, weights: str, phase: str, cache_dir: Path) -> None:
    assert compiled(f"{numerics}/{weights}/{phase}", cache_dir)
