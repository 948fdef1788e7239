"""Where blocks lie: planes inside one arena, addresses that transfers use, sizes from a memory budget, format ids."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_engine.api.config import KvConfig
from llm_engine.api.errors import ConfigError
from llm_engine.api.handoff import KvLayout
from llm_engine.models.sizes import SIZES, size_config
from llm_engine.models.spec import ModelSpec
from llm_engine.runtime.kv_store import KvStore, format_id, page_dtype, plan_layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPECS = {size: ModelSpec.from_config(size_config(size)) for size in SIZES}


@given(
    size=st.sampled_from(SIZES), dtype=st.sampled_from(sorted(DTYPES)), with_mtp=st.booleans(),
    block_tokens=st.sampled_from([4, 16, 48]), num_blocks=st.integers(8, 21),
)  # fmt: skip
def test_planes_fill_the_arena_without_overlap(
    size: str, dtype: str, with_mtp: bool, block_tokens: int, num_blocks: int
) -> None:
    kv = KvConfig(block_tokens=block_tokens, num_blocks=num_blocks)
    layout = plan_layout(SPECS[size], kv, DTYPES[dtype], with_mtp=with_mtp)
    end = 0
    for plane in layout.planes:
        assert plane.offset >= end
        assert plane.offset % 4096 == 0
        end = plane.address(plane.num_layers - 1, num_blocks - 1, num_blocks) + plane.block_bytes
    assert layout.arena_bytes == end
    names = {plane.name for plane in layout.planes}
    sparse = "v3" not in size and size != "bench"
    mtp = with_mtp and size != "bench"
    assert names == {"latent", *(["index"] * sparse), *(["mtp_latent"] * mtp), *(["mtp_index"] * (mtp and sparse))}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_a_block_of_a_view_lies_where_its_address_says(dtype: torch.dtype) -> None:
    layout = plan_layout(SPECS["nano"], KvConfig(num_blocks=9), dtype, with_mtp=True)
    store = KvStore.allocate(layout, dtype)
    assert store.mtp is not None
    caches = {"": store.layers, "mtp_": (store.mtp,)}
    for prefix, layers in caches.items():
        for number, cache in enumerate(layers):
            for name, view in (("latent", cache.latent), ("index", cache.index)):
                assert view is not None
                assert view.shape[:2] == (9, 16)
                plane = next(plane for plane in layout.planes if plane.name == prefix + name)
                at = plane.address(number, 5, 9)
                store.arena.zero_()
                view[5] = 1.0
                assert view[5].data_ptr() == store.arena.data_ptr() + at
                touched = store.arena.nonzero().flatten()
                assert at <= int(touched.min())
                assert int(touched.max()) < at + plane.block_bytes
                assert view[5].nbytes == plane.block_bytes
    assert (store.layers[0].latent.shape[2], store.mtp.latent.shape[2]) == (40, 40)


def test_an_arena_that_does_not_fit_is_refused() -> None:
    layout = plan_layout(SPECS["nano"], KvConfig(num_blocks=8), torch.float32, with_mtp=False)
    with pytest.raises(ValueError, match=f"at least {layout.arena_bytes} bytes"):
        KvStore(layout, torch.zeros(layout.arena_bytes - 1, dtype=torch.uint8), torch.float32)
    with pytest.raises(ValueError, match="uint8"):
        KvStore(layout, torch.zeros(layout.arena_bytes), torch.float32)
    with pytest.raises(ValueError, match="64 bytes"):
        KvStore(layout, torch.zeros(layout.arena_bytes + 64, dtype=torch.uint8)[1:], torch.float32)


@given(memory_mb=st.integers(1, 64), size=st.sampled_from(SIZES))
def test_blocks_from_a_memory_budget(memory_mb: int, size: str) -> None:
    def blocks(mb: int) -> KvLayout:
        return plan_layout(SPECS[size], KvConfig(memory_mb=mb), torch.float32, with_mtp=True)

    try:
        layout = blocks(memory_mb)
    except ConfigError as exc:
        needed = int(str(exc).split("at least ")[1].split(",")[0])
        assert memory_mb < needed
        assert blocks(needed).num_blocks >= 8
    else:
        slack = layout.bytes_per_block() + 4096 * len(layout.planes)
        assert (memory_mb << 20) - slack <= layout.arena_bytes <= memory_mb << 20


def test_format_id_tells_apart_what_must_not_mix() -> None:
    def identify(fingerprint: str = "w", dtype: str = "fp32", numerics: str = "exact", **change: Any) -> str:
        spec = dataclasses.replace(SPECS["nano"], **change.pop("spec", {}))
        with_mtp = change.pop("with_mtp", True)
        layout = plan_layout(spec, KvConfig(**({"num_blocks": 8} | change)), DTYPES[dtype], with_mtp=with_mtp)
        return format_id(spec, fingerprint, layout, DTYPES[dtype], numerics)

    assert identify(num_blocks=8) == identify(num_blocks=100)
    ids = {
        identify(),
        identify(fingerprint="x"),
        identify(dtype="bf16"),
        identify(numerics="fast"),
        identify(block_tokens=32),
        identify(with_mtp=False),
        identify(spec={"indexer": None}),
        identify(spec={"rms_norm_eps": 1e-5}),
    }
    assert len(ids) == 8


def test_format_id_tells_pages_apart_and_kernels_where_bits_are_promised() -> None:
    layouts = {
        pages: plan_layout(SPECS["tiny"], KvConfig(num_blocks=8), pages, with_mtp=True)
        for pages in (torch.bfloat16, torch.uint8)
    }

    def identify(pages: torch.dtype, numerics: str, kernels: str) -> str:
        return format_id(SPECS["tiny"], "w", layouts[pages], pages, numerics, kernels)

    plain, fp8 = torch.bfloat16, torch.uint8
    assert identify(plain, "fast", "a") == identify(plain, "fast", "b")
    ids = {
        identify(plain, "exact", "a"), identify(plain, "exact", "b"), identify(plain, "fast", "a"),
        identify(fp8, "exact", "a"), identify(fp8, "fast", "a"),
    }  # fmt: skip
    assert len(ids) == 5
    assert identify(fp8, "fast", "a").startswith("fp8-fast-b16-")


def test_fp8_pages_have_the_sizes_of_the_released_model() -> None:
    """Latent rows of 512 values, 4 scales and 64 rotated channels in bf16; index rows of 128 values and a scale."""
    kv = KvConfig(block_tokens=64, num_blocks=8)
    layout = plan_layout(SPECS["tiny-gpu"], kv, torch.uint8, with_mtp=True)
    sizes = {plane.name: plane.block_bytes for plane in layout.planes}
    assert sizes == {"latent": 64 * 656, "index": 64 * 132, "mtp_latent": 64 * 656, "mtp_index": 64 * 132}
    store = KvStore.allocate(layout, torch.uint8)
    assert store.layers[0].latent.shape == (8, 64, 656)
    assert store.layers[0].index is not None
    assert store.layers[0].index.shape == (8, 64, 132)


@pytest.mark.parametrize(
    ("backend", "dtype", "size", "message"),
    [
        ("cpu", torch.bfloat16, "tiny", "kv.format=fp8: the pages of engine.backend=cpu hold values as computed"),
        ("triton", torch.float32, "tiny", "kv.format=fp8: needs engine.dtype bf16 or fp8 .* not float32 and 512"),
        ("triton", torch.bfloat16, "nano", "kv.format=fp8: .* a kv_lora_rank of 128, .* not bfloat16 and 32"),
    ],
)
def test_fp8_pages_are_refused_where_there_are_none(backend: str, dtype: torch.dtype, size: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        page_dtype(SPECS[size], KvConfig(format="fp8"), backend, dtype)
    assert page_dtype(SPECS[size], KvConfig(), backend, dtype) == dtype
    assert page_dtype(SPECS["tiny"], KvConfig(format="fp8"), "triton", torch.bfloat16) == torch.uint8
