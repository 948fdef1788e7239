"""Compile what passes of the real model launch: `python -m tests.ops_triton.compile_only [--once] exact/bf16/decode …`.

Prints a JSON list with what the assembler says of every kernel: registers, bytes spilled, shared memory. With `--once`
a kernel is compiled for its first launch only. `attend_pairs`, `experts` or `copies` as a case: what is made for
Hopper alone.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from llm_engine.ops import ForwardBatch, GateConfig, Ops
from llm_engine.ops_triton import build_on

META = torch.device("meta")
BLOCK_TOKENS, HIDDEN, TOPK = 64, 7168, 2048
PHASES = {"decode": (16, 2), "few": (4, 2), "single": (1, 1), "prefill": (1, 4096)}  # sequences, rows of each


class CompileOnly:
    """A driver for a card that is not there."""

    compiled: list[Any]

    def __init__(self) -> None:
        self.utils = self
        self.compiled = []

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, *_args: Any) -> tuple[int, ...]:
        return 0, 0, 0, 0, 1024

    def launcher_cls(self, _source: Any, _metadata: Any) -> Any:
        return lambda *_args, **_kwargs: None

    def watch(self, *, once: bool) -> None:
        """Keep every kernel that is compiled from now on; `once`: let its first form stand for all."""
        compile_kernel = triton.runtime.jit.JITFunction._do_compile

        def keep(function: Any, *args: Any, **kwargs: Any) -> Any:
            known = [kernel for kernel in self.compiled if kernel.metadata.name == function.__name__]
            if once and known:
                return known[0]
            kernel = compile_kernel(function, *args, **kwargs)
            self.compiled.append(kernel)
            return kernel

        triton.runtime.jit.JITFunction._do_compile = keep


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def batch(num_seqs: int, rows: int, context: int) -> ForwardBatch:
    """`rows` rows of each of some sequences."""
    total = num_seqs * rows
    return ForwardBatch(
        token_ids_R=tensor(total, dtype=torch.int64),
        positions_R=tensor(total, dtype=torch.int64),
        slots_N=tensor(total, dtype=torch.int64),
        block_tables_SB=tensor(num_seqs, context // BLOCK_TOKENS, dtype=torch.int32),
        row_starts=tuple(range(0, total + 1, rows)),
        context_lens=(context,) * num_seqs,
    )


def run_layer(ops: Ops, step: ForwardBatch, *, fp8_pages: bool) -> None:
    """Attention, experts and a dense MLP of the real model."""
    fp32 = torch.float32
    x, norm = tensor(len(step.token_ids_R), HIDDEN), tensor(HIDDEN)
    angles = tensor(163840, 32, dtype=fp32)
    plan = ops.plan(step, block_tokens=BLOCK_TOKENS, cos_TJ=angles, sin_TJ=angles)
    x, _ = ops.add_rms_norm(ops.rms_norm(x, norm, 1e-6), x, norm, 1e-6)
    query, kv, key = ops.linear(x, ops.pack_linear(tensor(2240, HIDDEN))).split([1536, 576, 128], dim=-1)
    widths, dtype = ((656, 132), torch.uint8) if fp8_pages else ((576, 128), torch.bfloat16)
    latent, index = (tensor(2000, BLOCK_TOKENS, width, dtype=dtype) for width in widths)
    ops.write_latent(latent, kv, tensor(512), 1e-6, plan)
    ops.write_index_keys(index, key, tensor(128, dtype=fp32), tensor(128, dtype=fp32), 1e-6, plan)
    assert ops.enter is not None
    key_norm = tensor(128, dtype=fp32), tensor(128, dtype=fp32)
    query = ops.enter(query, tensor(1536), latent, kv, tensor(512), index, key, key_norm, 1e-6, 1e-6, plan)
    index_query = ops.linear(query, ops.pack_linear(tensor(8192, 1536))).view(-1, 64, 128)
    weights = ops.linear(x, ops.pack_linear(tensor(64, HIDDEN, dtype=fp32), fp32=True))
    sel = ops.index_topk(index_query, weights, index, plan, TOPK)
    heads = ops.linear(query, ops.pack_linear(tensor(24576, 1536))).view(-1, 128, 192)
    kv_b = ops.pack_kv_b(tensor(128, 128, 512), tensor(128, 128, 512))
    for selection in (sel, None):
        attended = ops.mla_attend(heads, latent, plan, selection, kv_b, 0.135)
    ops.linear(attended, ops.pack_linear(tensor(HIDDEN, 16384)))
    logits = ops.linear(x, ops.pack_linear(tensor(256, HIDDEN, dtype=fp32), fp32=True))
    config = GateConfig(top_k=8, num_groups=8, top_groups=4, scale=2.5)
    ids, shares = ops.gate(logits, tensor(256, dtype=fp32), config)
    shared = ops.pack_mlp(tensor(4096, HIDDEN), tensor(HIDDEN, 2048))
    experts = [(tensor(4096, HIDDEN), tensor(HIDDEN, 2048))] * 256
    ops.moe(x, ids, shares, ops.pack_experts(experts, 256, shared=shared))
    ops.mlp(x, ops.pack_mlp(tensor(36864, HIDDEN), tensor(HIDDEN, 18432)))
    logits = ops.linear(x[:8], ops.pack_linear(tensor(129280, HIDDEN), fp32=True))
    assert ops.race is not None
    ops.race(logits, tensor(8, dtype=fp32), tensor(8, dtype=torch.int64))


def run_attend_pairs() -> None:
    """Over keys side by side and over fp8 pages, each with whole rows and with parts, chosen keys and all of them."""
    from llm_engine.ops_triton.attend_hopper import attend_pairs

    rows, int32, fp32 = 8, torch.int32, torch.float32
    latent, angles = tensor(rows, 128, 512), tensor(rows, 32, dtype=fp32)
    sel, of_row, starts = tensor(rows, TOPK, dtype=int32), tensor(rows, dtype=int32), tensor(1, dtype=int32)
    keys, pages = tensor(4096, 576), tensor(64, BLOCK_TOKENS, 656, dtype=torch.uint8)
    sums, parts, table = tensor(2, rows, 128, 512, dtype=fp32), tensor(2, rows, 128, 2, dtype=fp32), starts[None]
    for out, rest in ((latent, None), (sums, parts)):
        row = (latent, tensor(rows, 128, 192), angles, angles)
        some, others = (sel, None) if rest is None else (None, sel)
        attend_pairs(*row, keys, some, of_row, of_row, starts, out, rest, 64, 0.2, 0)
        attend_pairs(*row, pages, others, of_row, of_row, table, out, rest, 64, 0.2, BLOCK_TOKENS)


def run_experts() -> None:
    """Up and down products of many rows."""
    from llm_engine.ops_triton.deal import Deal
    from llm_engine.ops_triton.experts_hopper import experts
    from llm_engine.ops_triton.quant import Fp8Rows, Fp8Weight

    fp8, fp32, int32 = torch.float8_e4m3fn, torch.float32, torch.int32
    dealt = Deal(tensor(8192, 8, dtype=int32), tensor(768 * 128, dtype=int32), tensor(768, dtype=int32), 128)
    gate_up = Fp8Weight(tensor(256, 4096, HIDDEN, dtype=fp8), tensor(256, 32, 56, dtype=fp32))
    down = Fp8Weight(tensor(256, HIDDEN, 2048, dtype=fp8), tensor(256, 56, 16, dtype=fp32))
    experts(Fp8Rows(tensor(8192, HIDDEN, dtype=fp8), tensor(56, 8192, dtype=fp32)), dealt, gate_up, down)


def run_copies() -> None:
    """Of scattered blocks to a peer, for both formats of pages."""
    from benchmarks.handoff_rig import make_layout
    from kv_transfer.device import DeviceRegion
    from kv_transfer.device_hopper import TileCopies, row_bytes
    from kv_transfer.layout import CopyPlan

    for kv_format in ("bf16", "fp8"):
        layout = make_layout(2, 4, kv_format)
        region, plan = DeviceRegion(torch.zeros(layout.arena_bytes, dtype=torch.uint8)), CopyPlan(layout, layout)
        copies = TileCopies(region, region.words, plan, row_bytes(region, region.words, plan))
        for layers, blocks in ((range(3), range(4)), (range(1, 2), range(1))):
            copies(layers, region.table(blocks), region.table(blocks))


ALONE = {"attend_pairs": run_attend_pairs, "experts": run_experts, "copies": run_copies}


def report(kernel: Any) -> dict[str, Any]:
    """What the assembler says."""
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = next(assembler / name for name in ("ptxas-blackwell", "ptxas") if (assembler / name).exists())
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as source:
        source.write(kernel.asm["ptx"])
        source.flush()
        command = [str(tool), "-v", "--gpu-name", "sm_90a", source.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    numbers = [re.search(pattern, said) for pattern in (r"(\d+) bytes spill stores", r"Used (\d+) registers")]
    spilled, registers = (int(found.group(1)) for found in numbers if found)
    return {
        "name": kernel.metadata.name,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "registers": registers,
        "spilled": spilled,
        "tensor_cores": "mma" in kernel.asm["ptx"],
        "fused": "fma.rn.f32" in kernel.asm["ptx"],
        "awaits_writes": re.search(r"cp\.async\.bulk\.wait_group\s+0;", kernel.asm["ptx"]) is not None,
        "one_by_one": "wgmma.mma_async instructions are serialized" in said,
    }


def main(cases: list[str], *, once: bool) -> None:
    card = CompileOnly()
    driver.set_active(card)
    card.watch(once=once)
    for case in cases:
        if case in ALONE:
            ALONE[case]()
            continue
        numerics, weights, phase = case.split("/")
        ops = build_on(META, numerics, torch.bfloat16, fp8=weights == "fp8")  # type: ignore[arg-type]
        step = batch(*PHASES[phase], 65536)
        run_layer(ops, step, fp8_pages=weights == "fp8")
    json.dump([report(kernel) for kernel in card.compiled], sys.stdout, indent=1)


if __name__ == "__main__":
    words = sys.argv[1:]
    main([word for word in words if word != "--once"], once="--once" in words)
