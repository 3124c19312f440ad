# SPDX-License-Identifier: BSD-3-Clause
"""Draft trees on the simulator: the tests of tests/cpu/test_tree_mask.py, and what only kernels can get wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import POLICIES, attend, check, inputs, named
from test_fwd_paged import packed, paged, same
from test_splits import small_splits  # noqa: F401
from test_tree_mask import (  # noqa: F401
    test_append_then_verify,
    test_equal_masks,
    test_features,
    test_latent_attention,
    test_one_call_is_pages_of_one_token_and_a_merge,
    test_ragged_queries,
    test_rows_beyond_the_mask_see_no_draft_tokens,
    test_rows_without_a_bit_and_a_prefix_see_nothing,
    test_strides_of_the_mask_move_no_bit,
    test_what_is_behind_the_tree_moves_no_bit,
    test_what_is_not_finite_reaches_only_those_who_see_it,
    with_tree,
)

import flash_attn3
from flash_attn3.testing import bitwise_equal, draft_trees, make_inputs, packed_bits, pairwise, poison

AXES = {
    "shape": ["bf16_d64_v64", "fp16_d128_v128", "bf16_d192_v128", "fp16_d256_v256"],
    "sizes": [
        (1, 300),
        (33, 257),
        (64, 190),
        (130, 140),
    ],  # queries, keys; of a tree that wide rows of 3 words and more
    "heads": [(2, 2), (6, 2), (8, 1)],
    "page_size": [None, 1, 16],
    "num_splits": [1, 3],
    "mask": [{}, {"causal": True}, {"window_size": (60, -1)}],
}


@pytest.fixture
def served_by(simulator) -> str:
    return "hopper"


def of_tree(shape: str, seqlen_q: int, seqlen_k: int, page_size: int | None = None, **sizes: Any) -> dict[str, Any]:
    """A tree for each sequence of a cache, some of which have less keys than queries."""
    case = inputs(shape, batch=3, seqlen_q=seqlen_q, seqlen_k=seqlen_k, **sizes)
    case["seqused_k"] = torch.tensor([seqlen_k, seqlen_q + 3, max(seqlen_q - 5, 1)], dtype=torch.int32)
    return with_tree(case if page_size is None else paged(case, page_size))


@pytest.mark.parametrize("choice", pairwise(AXES), ids=named)
def test_kernels(choice: dict[str, Any], simulator, launched: list[str]) -> None:
    num_heads, num_heads_kv = choice["heads"]
    case = of_tree(
        choice["shape"], *choice["sizes"], choice["page_size"], num_heads=num_heads, num_heads_kv=num_heads_kv
    )
    check(poison(case | choice["mask"]), num_splits=choice["num_splits"])
    assert [name.split("_")[0] for name in launched] == ["fwd"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("page_size", [1, 16])
def test_policies(page_size: int, policy: str, simulator) -> None:
    """A ragged batch with more tiles than CTAs, blocks in front of each tree, and NaN in what it hides."""
    case = of_tree("bf16_d128_v128", 70, 410, page_size, num_heads=4, num_heads_kv=2)
    case = packed(case | {"seqused_k": torch.tensor([410, 257, 33]).int()}, [70, 0, 41])
    case = poison(case)
    simulator.configure("sms=3")
    expected = check(case)
    simulator.configure(f"{policy},sms=3")
    assert same(attend(case), expected)


@pytest.mark.parametrize("seqlen_q", [5, 16, 60])
def test_batch_invariance(seqlen_q: int, small_splits, simulator) -> None:  # noqa: F811
    """Alone each sequence gives the same bits as in the batch; sequences of up to 16 rows are split."""
    sizes = dict(seqlen_q=seqlen_q, seqlen_k=400, num_heads=4, num_heads_kv=1, head_dim=64)
    case = make_inputs("dense", batch=4, dtype=torch.bfloat16, **sizes)
    case["tree_mask"] = packed_bits(draft_trees(4, seqlen_q))
    case["seqused_k"] = torch.tensor([400, 64, 131, 260]).int()
    options = dict(num_splits=0, batch_invariant=True)
    out, lse = check(poison(case), **options)
    for n in range(4):
        alone = {name: x[n : n + 1] for name, x in case.items()}
        results = attend(alone, **options)
        assert bitwise_equal(results[0][0], out[n]) and bitwise_equal(results[1][0], lse[n]), n
    assert bitwise_equal(lse, attend(case)[1]) == (seqlen_q > 16)


def test_any_length_is_memory_safe(simulator) -> None:
    """The simulator refuses an access outside of the tensors, the mask among them."""
    simulator.configure("races=0")  # of sequences that overlap
    case = packed(of_tree("bf16_d64_v64", 40, 150), [40, 40, 40])
    for lengths in ([0, 120, 120, 120], [-5, 2**31 - 1, 7, 130], [100, 20, 90, 60]):
        broken = case | {"cu_seqlens_q": torch.tensor(lengths).int()}
        attend(broken)
        with pytest.raises(flash_attn3.FlashAttn3ValueError, match=r"cu_seqlens_q|tree_mask"):
            flash_attn3.check_errors()


@pytest.mark.parametrize("score", ["q and qv", "qv"])
def test_latent_attention_in_pages_and_splits(score: str, simulator) -> None:
    case = make_inputs("cache", dtype=torch.bfloat16, batch=2, seqlen_q=9, seqlen_k=300, least_k=150, num_heads=8,
                       num_heads_kv=1, head_dim_v=512, qv=True)  # fmt: skip
    case = with_tree(case)
    expected = check(case | ({"q": None, "k": None} if score == "qv" else {}), num_splits=1)
    check(case | ({"q": None, "k": None} if score == "qv" else {}), num_splits=2)
    assert not bool(expected[0].isnan().any())
