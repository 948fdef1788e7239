"""The files of a checkpoint: tensors as stored, what identifies them, and what the compute path takes of them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from llm_engine.api.errors import ConfigError
from llm_engine.models.checkpoint import scale_name
from llm_engine.ops.fp8 import Fp8Blocks, Weight, decode_scale
from llm_engine.runtime.weight_survey import FP8_DTYPE, Survey


class Shards:
    """Reads the tensors of a surveyed checkpoint, memory-mapped, from any thread. Use it as a context manager.

    `dtype`: of the compute path; what the model computes in fp32 is in fp32 nevertheless. `fp8_block`: fp8 weights in
    blocks of that size stay in them.
    """

    def __init__(self, survey: Survey, dtype: torch.dtype, fp8_block: tuple[int, int] | None) -> None:
        self._survey = survey
        self._dtype = dtype
        self._fp8_block = fp8_block
        self._lock = threading.Lock()
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def read(self, name: str) -> tuple[list[Tensor], str]:
        """Values, with their scales if they are fp8, as stored; and a digest of the bytes.

        Raises ConfigError when a weight is in fp8 and its scales, or the size of its blocks, are nowhere.
        """
        stored, spec = self._survey.stored, self._survey.spec
        values = self._tensor(name)
        content = xxhash.xxh3_128(_bytes(values))
        parts = [values]
        if stored[name].dtype == FP8_DTYPE:
            scale_key = scale_name(name, stored)
            if scale_key is None or spec.fp8_block is None:
                needed = "its _scale_inv tensor" if scale_key is None else "weight_block_size in config.json"
                raise ConfigError(f"{stored[name].file}: {name} is fp8 but {needed} is missing")
            parts.append(self._tensor(scale_key))
            content.update(_bytes(parts[1]))
        return parts, f"{stored[name].dtype}{content.hexdigest()}"

    def weight(self, name: str, parts: list[Tensor]) -> Weight:
        """What the compute path takes of the parts that `read` gave, wherever they lie by now.

        Raises ConfigError when the scales do not fit the values.
        """
        stored, spec = self._survey.stored, self._survey.spec
        dtype = torch.float32 if self._survey.infos[name].exact else self._dtype
        values, *scales = parts
        if not scales:
            return values.to(dtype)
        assert spec.fp8_block is not None, "checked when the scales were read"
        try:
            blocks = Fp8Blocks(values, decode_scale(scales[0]), spec.fp8_block, dtype)
        except ValueError as exc:
            raise ConfigError(f"{stored[name].file}: {scale_name(name, stored)}: {exc}") from exc
        return blocks if blocks.block == self._fp8_block else blocks.dequantised()

    def _tensor(self, name: str) -> Tensor:
        file = self._survey.stored[name].file
        with self._lock:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(safe_open(file, framework="pt"))
        tensor: Tensor = self._open[file].get_tensor(name)
        return tensor


def fingerprint_of(digests: Mapping[str, str]) -> str:
    """One hash over the contents of all tensors; renaming, reordering or resharding files does not change it."""
    whole = xxhash.xxh3_128()
    for name in sorted(digests):
        whole.update(f"{name}={digests[name]};".encode())
    return whole.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().view(torch.uint8).numpy()
