"""Backend name → kernel table. A backend's package is imported only here, and only when it is chosen."""

from __future__ import annotations

import importlib
from typing import Final, Literal, cast

import torch

from llm_engine.api.errors import ConfigError
from llm_engine.ops.table import Ops

Numerics = Literal["exact", "fast"]

_BACKENDS: Final = {"cpu": "llm_engine.ops_cpu", "triton": "llm_engine.ops_triton"}
_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def load_ops(backend: str, numerics: Numerics = "exact", dtype: str = "fp32", device: int = 0) -> Ops:
    """Build the table of `backend`. Raises ConfigError naming an unknown or unsupported choice.

    `dtype` fp8: weights in fp8 blocks where they allow it, everything else in bf16. `device`: which accelerator, of
    those that this process sees; it becomes the calling thread's current one.
    """
    if backend not in _BACKENDS:
        raise ConfigError(f"engine.backend={backend!r}: expected one of {', '.join(_BACKENDS)}")
    if dtype not in _DTYPES:
        raise ConfigError(f"engine.dtype={dtype!r}: expected one of {', '.join(_DTYPES)}")
    if backend == "cpu" and dtype == "fp8":
        raise ConfigError(f"engine.dtype={dtype!r}: expected one of fp32, bf16 with engine.backend='cpu'")
    if numerics not in ("exact", "fast"):
        raise ConfigError(f"engine.numerics={numerics!r}: expected exact or fast")
    try:
        package = importlib.import_module(_BACKENDS[backend])
    except ModuleNotFoundError as exc:
        raise ConfigError(f"engine.backend={backend}: {exc.name} is not installed; pip install 'baton[cuda]'") from exc
    if backend != "cpu":
        choose_device(device)
    return cast(Ops, package.build(numerics, _DTYPES[dtype]))


def choose_device(index: int) -> None:
    """Make an accelerator the calling thread's current one; nothing where there is none. Raises ConfigError."""
    count = torch.accelerator.device_count()
    if count and index >= count:
        raise ConfigError(f"engine.device={index}: this process sees {count} devices, numbered from 0")
    if count:
        torch.accelerator.set_device_index(index)
