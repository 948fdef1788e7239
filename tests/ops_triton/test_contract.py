"""What every table promises, tested on this one: the tests are those of the table, the fixtures this package's."""

from __future__ import annotations

import pytest
import torch

from llm_engine.ops import Ops, load_ops
from tests.ops.test_index_topk import (  # noqa: F401
    check_selection,
    test_a_sequence_of_nan_keeps_to_itself,
    test_nothing_to_leave_out,
    test_ties_at_the_last_place,
    test_ties_go_to_the_lowest_position,
)
from tests.ops.test_mla import (  # noqa: F401
    test_dense_attention_matches_the_expanded_form_in_float64,
    test_sparse_attention_sees_the_selection_and_nothing_else,
    test_swapped_rope_layout_is_noticed,
    test_unseen_nan_does_not_leak,
)
from tests.ops.test_moe import (  # noqa: F401
    test_dropped_groups_stay_out_when_all_scores_are_negative,
    test_experts_match_float64,
    test_gate_matches_float64,
    test_nan_logits_do_not_break_the_others,
    test_the_bias_chooses_but_does_not_weigh,
)
from tests.ops.test_products import test_linear_matches_float64, test_mlp_matches_float64  # noqa: F401
from tests.ops.test_rows import (  # noqa: F401
    test_bf16_cache_rows_round_to_nearest_even,
    test_index_keys_are_normed_rotated_and_placed,
    test_latent_rows_are_normed_rotated_and_placed,
    test_norm_of_zeros_is_zero,
    test_norms_match_float64,
)
from tests.ops.test_table import test_an_empty_batch_passes_through  # noqa: F401


@pytest.mark.parametrize("heads", [3])
def test_selection_matches_float64_up_to_rounding(ops: Ops, heads: int) -> None:
    """Rotated queries are rounded to the compute dtype, because products run in it."""
    check_selection(ops, heads, near=1e-4 if ops.dtype == torch.float32 else 0.1)


def test_fp32_weights_keep_their_precision_beside_bf16_rows() -> None:
    ops = load_ops("triton", "exact", "bf16")
    torch.manual_seed(0)
    x, weight = torch.randn(5, 300).bfloat16(), torch.randn(20, 300)
    got = ops.linear(x, ops.pack_linear(weight, fp32=True))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), x.double() @ weight.double().T, atol=2e-3, rtol=1e-5)
    stored = weight.bfloat16().float()
    got = ops.linear(x, ops.pack_linear(stored, fp32=True))
    torch.testing.assert_close(got.double(), x.double() @ stored.double().T, atol=1e-5, rtol=1e-5)
