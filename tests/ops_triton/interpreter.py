"""Triton's interpreter, made faithful and fast enough to test with.

It truncates where hardware rounds to nearest even, multiplies the bits of bf16, and prepares the language anew for
every call of a helper function, which takes most of its time. Here torch converts, numpy multiplies in fp32, and the
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
    (source, bits), (target, target_bits) = _TORCH[from_dtype], _TORCH[to_dtype]
    tensor = torch.from_numpy(np.ascontiguousarray(values).view(bits)).view(source)
    return tensor.to(target).view(_unsigned(target)).numpy().view(target_bits).reshape(values.shape)


def _unsigned(dtype: torch.dtype) -> torch.dtype:
    return {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[dtype.itemsize]


def _dot(_builder: Any, a: Any, b: Any, acc: Any, _precision: Any, _imprecise: Any) -> Any:
    wide = [
        _convert_float(x.data, x.dtype.scalar, tl.float32, None).view(np.float32)
        if x.dtype.scalar != tl.float32
        else x.data
        for x in (a, b)
    ]
    return interpreter.TensorHandle(np.matmul(*wide) + acc.data, acc.dtype.scalar)


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
    interpreter.GridExecutor.__call__ = _launch_afresh
    interpreter.InterpretedFunction.__call__ = _call_helper
