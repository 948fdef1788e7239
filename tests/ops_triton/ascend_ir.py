"""Lower what passes of the real model launch to Ascend's linalg dialect: `python -m tests.ops_triton.ascend_ir`.

For an environment with triton-ascend in place of triton: its front end runs without CANN, up to the step that makes a
binary. Prints, for every kernel, "lowered" or how far it came and what stopped it. Fails when a kernel that is not in
`REFUSED` is not lowered, or one that is there now is.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from llm_engine.ops_triton import build_on
from tests.ops_triton.compile_only import META, CompileOnly, batch, run_layer

REFUSED = {  # by triton-ascend 3.2.0 for the 910B, which has no fp8
    "_product_fp8",
    "_quantise_rows",
    "_swiglu",
    "_unpack",
    "_write_latent_fp8",
    "_enter",
    "_attend",
    "_choose",
    "_choose_chunk",
    "_write_latent",
}
_CASES = ((False, 16, 2), (False, 1, 4096), (True, 16, 2), (True, 1, 4096))  # fp8, sequences, rows of each


class Ascend(CompileOnly):
    """A driver for an NPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("npu", "Ascend910B3", 0)


class Lowering:
    """Stands for `triton.compile`: notes how far each kernel comes, the first time that it is launched."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def __call__(self, source: Any, target: Any = None, options: dict[str, Any] | None = None) -> Any:
        name = source.fn.__name__
        if name not in self.found:
            self.found[name] = self._outcome(source, target, options)
        return _Launched()

    def _outcome(self, source: Any, target: Any, options: dict[str, Any] | None) -> str:
        reached: list[str] = []
        backend = triton.compiler.make_backend(target)
        stages: dict[str, Any] = {}
        parsed = backend.parse_options(dict(options or {}))
        backend.add_stages(stages, parsed)
        try:
            from triton._C.libtriton import ir

            context = ir.context()
            ir.load_dialects(context)
            backend.load_dialects(context)
            functions, modules = backend.get_codegen_implementation(), backend.get_module_map()
            module = source.make_ir(parsed, functions, modules, context)
            metadata = {"target": target, **parsed.__dict__}
            for stage in ("ttir", "ttadapter"):
                module = stages[stage](module, metadata)
                reached.append(stage)
        except subprocess.CalledProcessError:
            return f"after {reached[-1]}: refused by triton-adapter-opt"
        except Exception as exc:
            last = str(exc).strip().splitlines()[-1].strip() if str(exc).strip() else repr(exc)
            return f"after {reached[-1] if reached else 'nothing'}: {last[:200]}"
        return "lowered"


class _Launched:
    """A kernel whose launch does nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *_args: Any) -> None:
        return None

    def run(self, *_args: Any) -> None:
        return None

    def _init_handles(self) -> None:
        return None


def main() -> int:
    """Lower everything; 1 if what is lowered is not what is expected."""
    driver.set_active(Ascend())
    lowering = Lowering()
    triton.compiler.compile = lowering
    for fp8, num_seqs, rows in _CASES:
        ops = build_on(META, "exact" if not fp8 else "fast", torch.bfloat16, fp8=fp8)
        run_layer(ops, batch(num_seqs, rows, 65536), fp8_pages=fp8)
    json.dump(lowering.found, sys.stdout, indent=1)
    print()
    refused = {name for name, outcome in lowering.found.items() if outcome != "lowered"}
    unexpected = {
        "no longer lowered": refused - REFUSED,
        "lowered, to be taken from REFUSED": REFUSED & lowering.found.keys() - refused,
    }
    for what, names in unexpected.items():
        if names:
            print(f"{what}: {', '.join(sorted(names))}", file=sys.stderr)
    return int(any(unexpected.values()))


if __name__ == "__main__":
    raise SystemExit(main())
