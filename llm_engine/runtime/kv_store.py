"""The paged caches of one worker: where every block lies in the arena, and the tensors that view it there.

All planes are views of one flat byte tensor, so that a transfer addresses a block as (offset, length) and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_engine.api.config import KvConfig
from llm_engine.api.errors import ConfigError
from llm_engine.api.handoff import KvLayout, Plane
from llm_engine.models.spec import ModelSpec

_PLANE_ALIGN = 4096  # planes start on a page, so that regions can be registered and mapped on their own
_MIN_BLOCKS = 8
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
        """`arena`: flat uint8, at least `layout.arena_bytes` long, 64-byte aligned. Raises ValueError otherwise."""
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

    @classmethod
    def allocate(cls, layout: KvLayout, dtype: torch.dtype) -> KvStore:
        """A store over private zeroed memory, for workers that hand nothing on."""
        return cls(layout, torch.zeros(layout.arena_bytes, dtype=torch.uint8), dtype)


def plan_layout(spec: ModelSpec, kv: KvConfig, dtype: torch.dtype, *, with_mtp: bool) -> KvLayout:
    """Place the planes of a model's caches one after the other.

    `kv.num_blocks` blocks, or as many as fit `kv.memory_mb` MiB. Raises ConfigError when that is too few.
    """
    planes = list(_planes(spec, kv.block_tokens, dtype.itemsize, with_mtp))
    num_blocks = kv.num_blocks
    if num_blocks is None:
        per_block = sum(layers * size for _, layers, size in planes)
        num_blocks = ((kv.memory_mb << 20) - len(planes) * _PLANE_ALIGN) // per_block
        if num_blocks < _MIN_BLOCKS:
            needed = -(-(_MIN_BLOCKS * per_block + len(planes) * _PLANE_ALIGN) // (1 << 20))
            raise ConfigError(f"kv.memory_mb={kv.memory_mb}: expected at least {needed}, room for {_MIN_BLOCKS} blocks")
    placed, offset = [], 0
    for name, layers, size in planes:
        placed.append(Plane(name=name, num_layers=layers, block_bytes=size, offset=offset))
        offset += -(-layers * num_blocks * size // _PLANE_ALIGN) * _PLANE_ALIGN
    return KvLayout(block_tokens=kv.block_tokens, num_blocks=num_blocks, planes=tuple(placed))


def format_id(spec: ModelSpec, fingerprint: str, layout: KvLayout, dtype: torch.dtype, numerics: str) -> str:
    """Identity of cached values: caches with equal ids may exchange blocks, others never. `num_blocks` is no part."""
    dtype_name = str(dtype).removeprefix("torch.")
    planes = [(plane.name, plane.num_layers, plane.block_bytes) for plane in layout.planes]
    parts = (_ROW_FORMAT, spec.digest(), fingerprint, dtype_name, numerics, layout.block_tokens, planes)
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
    return f"{dtype_name}-{numerics}-b{layout.block_tokens}-{digest}"


def _planes(spec: ModelSpec, block_tokens: int, itemsize: int, with_mtp: bool) -> Iterator[tuple[str, int, int]]:
    """(name, layers, bytes of a block), in the order of the arena."""
    latent = block_tokens * spec.latent_dim * itemsize
    index = 0 if spec.indexer is None else block_tokens * spec.indexer.head_dim * itemsize
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
