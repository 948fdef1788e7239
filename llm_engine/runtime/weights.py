"""Reads a checkpoint: one pass over the shards, dequantised and converted on the way, fingerprinted as stored.

Where a kernel table packs fp8 blocks as stored (`fp8_block`), weights in blocks of that size are passed on as such.

`load_weights` keeps all of it in host memory. `WeightStream` brings tensors to a device while a model is being built:
a model that packs what it asks for and lets go of it never has more than a few of them around.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn, track
from safetensors import safe_open
from torch import Tensor

from llm_engine.api.errors import ConfigError
from llm_engine.models.checkpoint import (
    FINAL_NORM,
    HEAD,
    StoredTensor,
    TensorInfo,
    Weights,
    expected_tensors,
    is_ignorable,
    mtp_copies,
    scale_name,
    scan,
)
from llm_engine.models.spec import ModelSpec
from llm_engine.ops import to_device
from llm_engine.ops.fp8 import Fp8Blocks, Weight, decode_scale, in_full

logger = logging.getLogger(__name__)

_PLAIN_DTYPES = ("F32", "BF16", "F16")
_FP8_DTYPE = "F8_E4M3"
_MAX_NAMED = 4  # how many offenders an error message names
_LAYERS = "model.layers."
_PARTS = (  # of a layer, as they are built
    "shared_head", "embed_tokens", "enorm", "hnorm", "eh_proj", "input_layernorm", "post_attention",
    "self_attn.q_a_proj", "self_attn.kv_a_proj", "self_attn.indexer.wk", "self_attn.q_a", "self_attn.kv_a",
    "self_attn.q_b", "self_attn.kv_b", "self_attn.o", "self_attn", "mlp.gate.", "mlp.shared", "mlp",
)  # fmt: skip
_READERS = 4
_AHEAD_BYTES = 1 << 30  # read before they are asked for


def load_weights(
    path: Path,
    spec: ModelSpec,
    dtype: torch.dtype,
    *,
    fp8_block: tuple[int, int] | None = None,
    with_mtp: bool = True,
    progress: bool = True,
) -> Weights:
    """Load every tensor of the model in `dtype` (fp32 where the model computes in fp32).

    `fp8_block`: of `Ops`; fp8 weights in blocks of that size stay in them. `with_mtp=False` leaves the draft layer out.
    `progress` shows a bar while loading, on terminals only.
    Raises ConfigError, in one line, naming tensors that are missing, unknown, of a wrong shape or an unknown format.
    """
    stored, infos, copies, with_mtp = _survey(path, spec, with_mtp)
    tensors: dict[str, Weight] = {}
    digests: dict[str, str] = {}
    in_file_order = sorted(infos, key=lambda name: (stored[name].file, name))
    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    with _Shards(stored) as shards:
        for name in track(in_file_order, f"loading {path.name}", console=console, transient=True, disable=hidden):
            parts, digests[name] = _stored(shards, spec, name)
            weight = _converted(name, shards, spec, parts, torch.float32 if infos[name].exact else dtype)
            tensors[name] = _kept(weight, fp8_block)
    for copy, main in copies.items():
        if digests[copy] == digests[main]:
            del tensors[copy], digests[copy]
        else:
            logger.warning("%s: %s differs from %s; drafts use their own", path, copy, main)
    return Weights(tensors, _fingerprint(digests), has_mtp=with_mtp)


class WeightStream(Mapping[str, Weight]):
    """The tensors of a checkpoint on a device, each read when it is asked for and not kept here.

    Threads read ahead in the order in which a model is built, hash what they read, and dequantise on the device. Use it
    as a context manager around `build_model`, then ask for the `fingerprint`.
    """

    def __init__(
        self,
        path: Path,
        spec: ModelSpec,
        dtype: torch.dtype,
        device: torch.device,
        *,
        fp8_block: tuple[int, int] | None = None,
        with_mtp: bool = True,
        progress: bool = True,
    ) -> None:
        """As `load_weights`. Raises ConfigError as it does."""
        stored, infos, copies, self.has_mtp = _survey(path, spec, with_mtp)
        self._path, self._spec, self._dtype, self._device = path, spec, dtype, device
        self._copies, self._infos, self._fp8_block = copies, infos, fp8_block
        self._shards = _Shards(stored)
        self._digests: dict[str, str] = {}
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="weights")
        self._waiting = deque(_build_order(infos, spec.num_layers))
        self._coming: dict[str, Future[Weight]] = {}
        self._ahead_bytes = 0
        console = Console(stderr=True)
        columns = (TextColumn("loading {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._progress = Progress(
            *columns, console=console, transient=True, disable=not (progress and console.is_terminal)
        )
        self._bar = self._progress.add_task(path.name, total=sum(map(self._size, infos)))

    @property
    def weights(self) -> Weights:
        """For `build_model`; the fingerprint is not known yet."""
        return Weights(self, "", has_mtp=self.has_mtp)

    def fingerprint(self) -> str:
        """Of the whole content, also of what nobody has asked for."""
        for name in self._infos:
            if name not in self._digests:
                _, self._digests[name] = _stored(self._shards, self._spec, name)
        return _fingerprint({name: self._digests[name] for name in self._infos})

    def __enter__(self) -> WeightStream:
        self._shards.__enter__()
        self._progress.start()
        self._drop_equal_copies()
        self._read_ahead()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._readers.shutdown(cancel_futures=True)
        self._progress.stop()
        self._shards.__exit__(kind, exc, tb)

    def __getitem__(self, name: str) -> Weight:
        if name not in self._infos:
            raise KeyError(name)
        coming = self._coming.pop(name, None)
        if coming is None:  # asked for again, or out of the order
            if name not in self._digests and name in self._waiting:
                self._waiting.remove(name)  # nobody would take it when its turn comes
            return self._read(name)
        tensor = coming.result()
        self._ahead_bytes -= self._size(name)
        self._progress.advance(self._bar, self._size(name))
        self._read_ahead()
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def _drop_equal_copies(self) -> None:
        for copy, main in self._copies.items():
            for name in (copy, main):
                _, self._digests[name] = _stored(self._shards, self._spec, name)
            if self._digests[copy] == self._digests[main]:
                del self._infos[copy], self._digests[copy]
                self._waiting.remove(copy)
            else:
                logger.warning("%s: %s differs from %s; drafts use their own", self._path, copy, main)

    def _read_ahead(self) -> None:
        while self._waiting and self._ahead_bytes < _AHEAD_BYTES:
            name = self._waiting.popleft()
            self._ahead_bytes += self._size(name)
            self._coming[name] = self._readers.submit(self._read, name)

    def _read(self, name: str) -> Weight:
        """In any thread. Streams of devices are those of the thread that builds: work on a device stays in order."""
        if self._device.index is not None:
            torch.accelerator.set_device_index(self._device.index)
        parts, digest = _stored(self._shards, self._spec, name)
        self._digests[name] = digest
        parts = [to_device(part, self._device) for part in parts]
        dtype = torch.float32 if self._infos[name].exact else self._dtype
        return _kept(_converted(name, self._shards, self._spec, parts, dtype), self._fp8_block)

    def _size(self, name: str) -> int:
        return self._shards.stored[name].num_bytes


class _Shards:
    """Open files of a checkpoint; tensors come memory-mapped."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self.stored = stored
        self._lock = threading.Lock()
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def read(self, name: str) -> Tensor:
        file = self.stored[name].file
        with self._lock:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(safe_open(file, framework="pt"))
        tensor: Tensor = self._open[file].get_tensor(name)
        return tensor


def _survey(
    path: Path, spec: ModelSpec, with_mtp: bool
) -> tuple[dict[str, StoredTensor], dict[str, TensorInfo], dict[str, str], bool]:
    """What is stored, what is to be loaded, which of it may repeat another tensor, whether there is a draft layer."""
    with_mtp = with_mtp and spec.num_mtp_layers > 0
    stored = scan(path)
    infos = expected_tensors(spec, with_mtp=with_mtp)
    copies = {copy: main for copy, main in mtp_copies(spec).items() if with_mtp and copy in stored}
    infos |= {copy: infos[main] for copy, main in copies.items()}
    _check(path, stored, infos, spec.num_layers + int(with_mtp))
    return stored, infos, copies, with_mtp


def _build_order(infos: Mapping[str, TensorInfo], num_layers: int) -> list[str]:
    """About the order in which a model asks; where it errs, time is lost and nothing else."""

    def place(name: str) -> tuple[int, int]:
        if not name.startswith(_LAYERS):
            return (num_layers - 1, len(_PARTS)) if name in (FINAL_NORM, HEAD) else (-1, 0)
        layer, _, rest = name.removeprefix(_LAYERS).partition(".")
        return int(layer), next((i for i, part in enumerate(_PARTS) if rest.startswith(part)), len(_PARTS))

    return sorted(infos, key=place)  # stable


def _stored(shards: _Shards, spec: ModelSpec, name: str) -> tuple[list[Tensor], str]:
    """Values, with their scales if they are fp8, as stored, and a digest of the bytes."""
    values = shards.read(name)
    content = xxhash.xxh3_128(_bytes(values))
    parts = [values]
    if shards.stored[name].dtype == _FP8_DTYPE:
        scale_key = scale_name(name, shards.stored)
        if scale_key is None or spec.fp8_block is None:
            needed = "its _scale_inv tensor" if scale_key is None else "weight_block_size in config.json"
            raise ConfigError(f"{shards.stored[name].file}: {name} is fp8 but {needed} is missing")
        parts.append(shards.read(scale_key))
        content.update(_bytes(parts[1]))
    return parts, f"{shards.stored[name].dtype}{content.hexdigest()}"


def _converted(name: str, shards: _Shards, spec: ModelSpec, parts: list[Tensor], dtype: torch.dtype) -> Weight:
    """Stored values, wherever they lie, in the dtype of the compute path or in blocks."""
    values, *scales = parts
    if not scales:
        return values.to(dtype)
    assert spec.fp8_block is not None, "checked when the scales were read"
    try:
        return Fp8Blocks(values, decode_scale(scales[0]), spec.fp8_block, dtype)
    except ValueError as exc:
        scale_key = scale_name(name, shards.stored)
        raise ConfigError(f"{shards.stored[name].file}: {scale_key}: {exc}") from exc


def _kept(weight: Weight, fp8_block: tuple[int, int] | None) -> Weight:
    """Dequantised unless its blocks are of the size that a table packs."""
    return weight if isinstance(weight, Fp8Blocks) and weight.block == fp8_block else in_full(weight)


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
