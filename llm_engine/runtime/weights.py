"""Reads a checkpoint: one pass over the shards, dequantised and converted on the way, fingerprinted as stored."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from torch import Tensor

from llm_engine.api.errors import ConfigError
from llm_engine.models.checkpoint import (
    StoredTensor,
    TensorInfo,
    Weights,
    expected_tensors,
    is_ignorable,
    mtp_copies,
    scale_name,
    scan,
)
from llm_engine.models.fp8 import dequantise_blocks
from llm_engine.models.spec import ModelSpec

logger = logging.getLogger(__name__)

_PLAIN_DTYPES = ("F32", "BF16", "F16")
_FP8_DTYPE = "F8_E4M3"
_MAX_NAMED = 4  # how many offenders an error message names


def load_weights(
    path: Path, spec: ModelSpec, dtype: torch.dtype, *, with_mtp: bool = True, progress: bool = True
) -> Weights:
    """Load every tensor of the model in `dtype` (fp32 where the model computes in fp32).

    `with_mtp=False` leaves the draft layer out. `progress` shows a bar while loading, on terminals only.
    Raises ConfigError, in one line, naming tensors that are missing, unknown, of a wrong shape or an unknown format.
    """
    with_mtp = with_mtp and spec.num_mtp_layers > 0
    stored = scan(path)
    infos = expected_tensors(spec, with_mtp=with_mtp)
    copies = {copy: main for copy, main in mtp_copies(spec).items() if with_mtp and copy in stored}
    infos |= {copy: infos[main] for copy, main in copies.items()}
    _check(path, stored, infos, spec.num_layers + int(with_mtp))
    tensors: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    in_file_order = sorted(infos, key=lambda name: (stored[name].file, name))
    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    with _Shards(stored) as shards:
        for name in track(in_file_order, f"loading {path.name}", console=console, transient=True, disable=hidden):
            tensors[name], digests[name] = _load(shards, spec, name, torch.float32 if infos[name].exact else dtype)
    for copy, main in copies.items():
        if digests[copy] == digests[main]:
            del tensors[copy], digests[copy]
        else:
            logger.warning("%s: %s differs from %s; drafts use their own", path, copy, main)
    return Weights(tensors, _fingerprint(digests), has_mtp=with_mtp)


class _Shards:
    """Open files of a checkpoint; tensors come memory-mapped."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self.stored = stored
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def read(self, name: str) -> Tensor:
        file = self.stored[name].file
        if file not in self._open:
            self._open[file] = self._stack.enter_context(safe_open(file, framework="pt"))
        tensor: Tensor = self._open[file].get_tensor(name)
        return tensor


def _load(shards: _Shards, spec: ModelSpec, name: str, dtype: torch.dtype) -> tuple[Tensor, str]:
    """One tensor in `dtype`, and a digest of its stored bytes (scales included)."""
    values = shards.read(name)
    content = xxhash.xxh3_128(_bytes(values))
    if shards.stored[name].dtype == _FP8_DTYPE:
        scale_key = scale_name(name, shards.stored)
        if scale_key is None or spec.fp8_block is None:
            needed = "its _scale_inv tensor" if scale_key is None else "weight_block_size in config.json"
            raise ConfigError(f"{shards.stored[name].file}: {name} is fp8 but {needed} is missing")
        scale = shards.read(scale_key)
        content.update(_bytes(scale))
        try:
            values = dequantise_blocks(values, scale, spec.fp8_block)
        except ValueError as exc:
            raise ConfigError(f"{shards.stored[name].file}: {scale_key}: {exc}") from exc
    return values.to(dtype), f"{shards.stored[name].dtype}{content.hexdigest()}"


def _check(path: Path, stored: Mapping[str, StoredTensor], infos: Mapping[str, TensorInfo], num_layers: int) -> None:
    """Raise ConfigError unless the files hold exactly the model's tensors, in shapes and formats that can be read."""
    missing = [name for name in infos if name not in stored]
    if missing:
        raise ConfigError(f"{path}: {_listed(missing)} missing; config.json describes another model, or files are lost")
    scales = {scale_name(name, stored) for name in infos}
    known = scales | set(infos)
    unknown = [name for name in stored if name not in known and not is_ignorable(name, num_layers)]
    if unknown:
        raise ConfigError(f"{path}: {_listed(unknown)} unknown; the checkpoint is of a kind that is not supported")
    found = {name: stored[name] for name in infos}
    wrong = [f"{name} {t.shape} not {infos[name].shape}" for name, t in found.items() if t.shape != infos[name].shape]
    if wrong:
        raise ConfigError(f"{path}: wrong shape: {_listed(wrong)}")
    formats = [f"{name} {t.dtype}" for name, t in found.items() if t.dtype not in (*_PLAIN_DTYPES, _FP8_DTYPE)]
    if formats:
        raise ConfigError(f"{path}: unsupported format: {_listed(formats)}; expected bf16, fp32 or fp8 e4m3 blocks")


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_MAX_NAMED])
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"{shown}{more}"


def _fingerprint(digests: Mapping[str, str]) -> str:
    """One hash over the contents of all tensors; renaming, reordering or resharding files does not change it."""
    whole = xxhash.xxh3_128()
    for name in sorted(digests):
        whole.update(f"{name}={digests[name]};".encode())
    return whole.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().view(torch.uint8).numpy()
