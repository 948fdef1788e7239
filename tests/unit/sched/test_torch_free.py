"""Scheduling policy must run where there is no torch: in simulators and planners."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import llm_engine.sched


def test_importing_every_module_does_not_import_torch() -> None:
    names = [f"llm_engine.sched.{module.name}" for module in pkgutil.iter_modules(llm_engine.sched.__path__)]
    assert len(names) >= 8
    program = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
