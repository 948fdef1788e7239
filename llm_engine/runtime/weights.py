"""Reads a checkpoint: one pass over the shards, dequantised and converted on the way, fingerprinted as stored.

Where a kernel table packs fp8 blocks as stored (`fp8_block`), weights in blocks of that size are passed on as such.

`load_weights` keeps all of it in host memory. `WeightStream` brings tensors to a device while a model is being built:
a model that packs what it asks for and lets go of it never has more than a few of them around.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn, track

from llm_engine.models.checkpoint import FINAL_NORM, HEAD, Weights
from llm_engine.models.spec import ModelSpec
from llm_engine.ops import to_device
from llm_engine.ops.fp8 import Weight
from llm_engine.runtime.shards import Shards, fingerprint_of
from llm_engine.runtime.weight_survey import Survey, survey

logger = logging.getLogger(__name__)

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
    found = survey(path, spec, with_mtp=with_mtp)
    tensors: dict[str, Weight] = {}
    digests: dict[str, str] = {}
    in_file_order = sorted(found.infos, key=lambda name: (found.stored[name].file, name))
    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    with Shards(found, dtype, fp8_block) as shards:
        for name in track(in_file_order, f"loading {path.name}", console=console, transient=True, disable=hidden):
            parts, digests[name] = shards.read(name)
            tensors[name] = shards.weight(name, parts)
    for copy in _equal_copies(found, digests):
        del tensors[copy], digests[copy]
    return Weights(tensors, fingerprint_of(digests), has_mtp=found.has_mtp)


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
        self._survey = survey(path, spec, with_mtp=with_mtp)
        self._device = device
        self._shards = Shards(self._survey, dtype, fp8_block)
        self._names = dict.fromkeys(self._survey.infos)  # less the copies that repeat their tensor
        self._digests: dict[str, str] = {}
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="weights")
        self._waiting = deque(_build_order(self._names, spec.num_layers))
        self._coming: dict[str, Future[Weight]] = {}
        self._ahead_bytes = 0
        console = Console(stderr=True)
        columns = (TextColumn("loading {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._progress = Progress(
            *columns, console=console, transient=True, disable=not (progress and console.is_terminal)
        )
        self._bar = self._progress.add_task(path.name, total=sum(map(self._survey.num_bytes, self._names)))

    @property
    def weights(self) -> Weights:
        """For `build_model`; the fingerprint is not known yet."""
        return Weights(self, "", has_mtp=self._survey.has_mtp)

    def fingerprint(self) -> str:
        """Of the whole content, also of what nobody has asked for."""
        for name in self._names:
            if name not in self._digests:
                _, self._digests[name] = self._shards.read(name)
        return fingerprint_of({name: self._digests[name] for name in self._names})

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
        if name not in self._names:
            raise KeyError(name)
        coming = self._coming.pop(name, None)
        if coming is None:  # asked for again, or out of the order
            if name not in self._digests and name in self._waiting:
                self._waiting.remove(name)  # nobody would take it when its turn comes
            return self._read(name)
        weight = coming.result()
        num_bytes = self._survey.num_bytes(name)
        self._ahead_bytes -= num_bytes
        self._progress.advance(self._bar, num_bytes)
        self._read_ahead()
        return weight

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _drop_equal_copies(self) -> None:
        for name in (name for pair in self._survey.copies.items() for name in pair):
            _, self._digests[name] = self._shards.read(name)
        for copy in _equal_copies(self._survey, self._digests):
            del self._names[copy], self._digests[copy]
            self._waiting.remove(copy)

    def _read_ahead(self) -> None:
        while self._waiting and self._ahead_bytes < _AHEAD_BYTES:
            name = self._waiting.popleft()
            self._ahead_bytes += self._survey.num_bytes(name)
            self._coming[name] = self._readers.submit(self._read, name)

    def _read(self, name: str) -> Weight:
        """In any thread. Streams of devices are those of the thread that builds: work on a device stays in order."""
        if self._device.index is not None:
            torch.accelerator.set_device_index(self._device.index)
        parts, self._digests[name] = self._shards.read(name)
        return self._shards.weight(name, [to_device(part, self._device) for part in parts])


def _build_order(names: Iterable[str], num_layers: int) -> list[str]:
    """About the order in which a model asks; where it errs, time is lost and nothing else."""

    def place(name: str) -> tuple[int, int]:
        if not name.startswith(_LAYERS):
            return (num_layers - 1, len(_PARTS)) if name in (FINAL_NORM, HEAD) else (-1, 0)
        layer, _, rest = name.removeprefix(_LAYERS).partition(".")
        return int(layer), next((i for i, part in enumerate(_PARTS) if rest.startswith(part)), len(_PARTS))

    return sorted(names, key=place)  # stable


def _equal_copies(found: Survey, digests: Mapping[str, str]) -> list[str]:
    """The copies that repeat their tensor, so that nobody needs them. Says which do not."""
    equal = []
    for copy, main in found.copies.items():
        if digests[copy] == digests[main]:
            equal.append(copy)
        else:
            logger.warning("%s: %s differs from %s; drafts use their own", found.path, copy, main)
    return equal
