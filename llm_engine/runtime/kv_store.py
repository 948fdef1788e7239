"""The paged caches of one worker: where every block lies in the arena, and the tensors that view it there.

All planes are views of one flat byte tensor, so that a transfer addresses a block as (offset, length) and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_engine.api.config import KvConfig
from llm_engine.api.errors import ConfigError
from llm_engine.api.handoff import KvLayout, Plane
from llm_engine.models.spec import ModelSpec

_PLANE_ALIGN = 4096  # planes start on a page, so that regions can be registered and mapped on their own
_MIN_BLOCKS = 8
_SCALE_GROUP = 128  # values of a latent row that share a scale on fp8 pages
# Part of every format id: how the rotated channels of a latent row are stored. Change it with the layout.
_ROW_FORMAT = "latent‖rope interleaved, index rope half"


@dataclass(frozen=True, slots=True)
class LayerCache:
    """The planes of one layer, [num_blocks, block_tokens, channels]; `index` is None without an indexer."""

    latent: Tensor
    index: Tensor | None


class KvStore:
    """Views of an arena that a model writes to and reads from. Block ids and their owners are the block pool's."""

    def __init__(self, layout: KvLayout, arena: Tensor, dtype: torch.dtype) -> None:
        """`arena`: flat uint8, at least `layout.arena_bytes` long, 64-byte aligned. Raises ValueError otherwise.

        It lies where the model computes. `dtype`: of the planes' values, uint8 for fp8 pages.
        """
        if arena.dtype != torch.uint8 or arena.dim() != 1 or arena.numel() < layout.arena_bytes:
            raise ValueError(
                f"arena must be flat uint8 of at least {layout.arena_bytes} bytes, not {arena.shape} {arena.dtype}"
            )
        if arena.data_ptr() % 64:
            raise ValueError("arena must start at a multiple of 64 bytes")
        self.layout = layout
        self.dtype = dtype
        self.arena = arena
        views = {plane.name: _view(layout, plane, arena, dtype) for plane in layout.planes}
        index = views.get("index")
        self.layers = tuple(
            LayerCache(latent, None if index is None else index[layer]) for layer, latent in enumerate(views["latent"])
        )
        self.mtp: LayerCache | None = None
        if "mtp_latent" in views:
            mtp_index = views.get("mtp_index")
            self.mtp = LayerCache(views["mtp_latent"][0], None if mtp_index is None else mtp_index[0])

    @property
    def block_tokens(self) -> int:
        return self.layout.block_tokens

    @property
    def num_blocks(self) -> int:
        return self.layout.num_blocks

    @property
    def device(self) -> torch.device:
        """Where the planes lie."""
        return self.arena.device

    @classmethod
    def allocate(cls, layout: KvLayout, dtype: torch.dtype, device: torch.device | None = None) -> KvStore:
        """A store over zeroed memory of its own."""
        return cls(layout, torch.zeros(layout.arena_bytes, dtype=torch.uint8, device=device), dtype)


def page_dtype(spec: ModelSpec, kv: KvConfig, backend: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the planes' values under `kv.format`: the compute dtype, or uint8 for fp8 pages.

    Raises ConfigError where the backend or the model's widths do not have such pages.
    """
    if kv.format == "auto":
        return dtype
    if backend == "cpu":
        raise ConfigError("kv.format=fp8: the pages of engine.backend=cpu hold values as computed; set kv.format=auto")
    groups, rest = divmod(spec.kv_lora_rank, _SCALE_GROUP)
    if dtype != torch.bfloat16 or rest or groups & (groups - 1):
        raise ConfigError(
            f"kv.format=fp8: needs engine.dtype bf16 or fp8 and a kv_lora_rank of 128, 256, 512, …, "
            f"not {dtype_name(dtype)} and {spec.kv_lora_rank}; set kv.format=auto"
        )
    return torch.uint8


def plan_layout(
    spec: ModelSpec, kv: KvConfig, dtype: torch.dtype, *, with_mtp: bool, num_bytes: int | None = None
) -> KvLayout:
    """Place the planes of a model's caches one after the other. `dtype`: of their values, uint8 for fp8 pages.

    `kv.num_blocks` blocks, or as many as fit `num_bytes` (None: `kv.host_mb`). Raises ConfigError when that is too few.
    """
    planes = list(_planes(spec, kv.block_tokens, dtype, with_mtp))
    num_blocks = kv.num_blocks
    if num_blocks is None:
        room = kv.host_mb << 20 if num_bytes is None else num_bytes
        per_block = sum(layers * size for _, layers, size in planes)
        num_blocks = (room - len(planes) * _PLANE_ALIGN) // per_block
        if num_blocks < _MIN_BLOCKS:
            needed = -(-(_MIN_BLOCKS * per_block + len(planes) * _PLANE_ALIGN) // (1 << 20))
            raise ConfigError(
                f"kv.memory_mb={max(room, 0) >> 20}: expected at least {needed}, room for {_MIN_BLOCKS} blocks"
            )
    return place_planes(planes, kv.block_tokens, num_blocks)


def place_planes(planes: Sequence[tuple[str, int, int]], block_tokens: int, num_blocks: int) -> KvLayout:
    """Planes given as (name, layers, bytes of a block), each of which begins on a page."""
    placed, offset = [], 0
    for name, layers, size in planes:
        placed.append(Plane(name=name, num_layers=layers, block_bytes=size, offset=offset))
        offset += -(-layers * num_blocks * size // _PLANE_ALIGN) * _PLANE_ALIGN
    return KvLayout(block_tokens=block_tokens, num_blocks=num_blocks, planes=tuple(placed))


def format_id(
    spec: ModelSpec, fingerprint: str, layout: KvLayout, dtype: torch.dtype, numerics: str, kernels: str = ""
) -> str:
    """Identity of cached values: caches with equal ids may exchange blocks, others never. `num_blocks` is no part.

    `dtype`: of the pages. `kernels`: the table that computes them, which is part of it where tokens are promised to
    the last bit: two tables round differently.
    """
    pages = "fp8" if dtype == torch.uint8 else dtype_name(dtype)
    planes = [(plane.name, plane.num_layers, plane.block_bytes) for plane in layout.planes]
    computed = kernels if numerics == "exact" else numerics
    parts = (_ROW_FORMAT, spec.digest(), fingerprint, pages, numerics, computed, layout.block_tokens, planes)
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
    return f"{pages}-{numerics}-b{layout.block_tokens}-{digest}"


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`, `bfloat16`, …"""
    return str(dtype).removeprefix("torch.")


def _planes(spec: ModelSpec, block_tokens: int, dtype: torch.dtype, with_mtp: bool) -> Iterator[tuple[str, int, int]]:
    """(name, layers, bytes of a block), in the order of the arena."""
    latent, index = spec.latent_dim * dtype.itemsize, 0
    if spec.indexer is not None:
        index = spec.indexer.head_dim * dtype.itemsize
    if dtype == torch.uint8:  # fp8 pages: e4m3 values, an fp32 scale for every 128 of them, the rotated part in bf16
        latent = spec.kv_lora_rank + 4 * (spec.kv_lora_rank // _SCALE_GROUP) + 2 * spec.rope.dim
        index += 4 if index else 0
    latent, index = block_tokens * latent, block_tokens * index
    groups = [("", spec.num_layers)]
    if with_mtp and spec.num_mtp_layers:
        groups.append(("mtp_", spec.num_mtp_layers))
    for prefix, layers in groups:
        yield f"{prefix}latent", layers, latent
        if index:
            yield f"{prefix}index", layers, index


def _view(layout: KvLayout, plane: Plane, arena: Tensor, dtype: torch.dtype) -> Tensor:
    """[layers, blocks, block_tokens, channels] over the plane's part of the arena."""
    size = plane.num_layers * layout.num_blocks * plane.block_bytes
    values = arena[plane.offset : plane.offset + size].view(dtype)
    return values.view(plane.num_layers, layout.num_blocks, layout.block_tokens, -1)
