"""Triton's interpreter, made faithful and fast enough to test with.

It truncates where hardware rounds to nearest even, multiplies the bits of bf16, and prepares the language anew for
every call of a helper function, which takes most of its time. Here torch converts and multiplies, and the
language is prepared once a launch for every module that helpers come from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {
    tl.float32: (torch.float32, np.uint32),
    tl.float16: (torch.float16, np.uint16),
    tl.bfloat16: (torch.bfloat16, np.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, np.uint8),
}
_launch = interpreter.GridExecutor.__call__
_prepared: set[int] = set()


def _convert_float(values: Any, from_dtype: Any, to_dtype: Any, _rounding_mode: Any) -> Any:
    target, bits = _TORCH[to_dtype]
    unsigned = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[target.itemsize]
    return _as_torch(values, from_dtype).to(target).view(unsigned).numpy().view(bits)


def _as_torch(values: Any, dtype: Any) -> torch.Tensor:
    """The interpreter's array as a tensor of the dtype it stands for."""
    source, bits = _TORCH[dtype]
    return torch.from_numpy(np.ascontiguousarray(values).view(bits)).view(source)


def _dot(_builder: Any, a: Any, b: Any, acc: Any, _precision: Any, _imprecise: Any) -> Any:
    wide_a, wide_b = (_as_torch(x.data, x.dtype.scalar).float() for x in (a, b))
    return interpreter.TensorHandle((wide_a @ wide_b).numpy() + acc.data, acc.dtype.scalar)


def _multiply(_builder: Any, a: Any, b: Any) -> Any:
    dtype = a.dtype.scalar
    if dtype != tl.bfloat16:
        return interpreter.TensorHandle(np.multiply(a.data, b.data), dtype)
    product = _as_torch(a.data, dtype) * _as_torch(b.data, dtype)
    return interpreter.TensorHandle(product.view(torch.uint16).numpy(), dtype)


def _launch_afresh(self: Any, *args: Any, **kwargs: Any) -> None:
    _prepared.clear()
    _launch(self, *args, **kwargs)


def _call_helper(self: Any, *args: Any, **kwargs: Any) -> Any:
    module = id(self.fn.__globals__)
    if module not in _prepared:
        interpreter._patch_lang(self.fn)
        _prepared.add(module)
    return self.rewrite()(*args, **kwargs)


def install() -> None:
    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter.InterpreterBuilder.create_fmul = _multiply
    interpreter.GridExecutor.__call__ = _launch_afresh
    interpreter.InterpretedFunction.__call__ = _call_helper
