"""What a checkpoint holds and what of it is to be loaded; refuses one that is not exactly the model's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from llm_engine.api.errors import ConfigError
from llm_engine.models.checkpoint import (
    StoredTensor,
    TensorInfo,
    expected_tensors,
    is_ignorable,
    mtp_copies,
    scale_name,
    scan,
)
from llm_engine.models.spec import ModelSpec

FP8_DTYPE = "F8_E4M3"
_PLAIN_DTYPES = ("F32", "BF16", "F16")
_MAX_NAMED = 4  # how many offenders an error message names


@dataclass(frozen=True, slots=True)
class Survey:
    """A checkpoint that fits its model.

    `copies`: tensors of the draft layer that may repeat one of the main model, which is the value. They are loaded too,
    to see whether they do.
    """

    path: Path
    spec: ModelSpec
    stored: Mapping[str, StoredTensor]
    infos: Mapping[str, TensorInfo]  # what is to be loaded, copies included
    copies: Mapping[str, str]
    has_mtp: bool

    def num_bytes(self, name: str) -> int:
        """As stored, without scales."""
        return self.stored[name].num_bytes


def survey(path: Path, spec: ModelSpec, *, with_mtp: bool) -> Survey:
    """Read the headers of all files. `with_mtp=False` leaves the draft layer out.

    Raises ConfigError, in one line, naming tensors that are missing, unknown, of a wrong shape or an unknown format.
    """
    with_mtp = with_mtp and spec.num_mtp_layers > 0
    stored = scan(path)
    infos = expected_tensors(spec, with_mtp=with_mtp)
    copies = {copy: main for copy, main in mtp_copies(spec).items() if with_mtp and copy in stored}
    infos |= {copy: infos[main] for copy, main in copies.items()}
    _check(path, stored, infos, spec.num_layers + int(with_mtp))
    return Survey(path, spec, stored, infos, copies, with_mtp)


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
    formats = [f"{name} {t.dtype}" for name, t in found.items() if t.dtype not in (*_PLAIN_DTYPES, FP8_DTYPE)]
    if formats:
        raise ConfigError(f"{path}: unsupported format: {_listed(formats)}; expected bf16, fp32 or fp8 e4m3 blocks")


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_MAX_NAMED])
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"{shown}{more}"
