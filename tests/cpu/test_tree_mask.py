# SPDX-License-Identifier: BSD-3-Clause
"""`tree_mask`: draft tokens of speculative decoding that see their ancestors, on every backend that runs on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paging import cu, int32
from torch import Tensor

import flash_attn3
from flash_attn3 import env, reference
from flash_attn3.testing import (
    GradCheck,
    bitwise_equal,
    call,
    draft_trees,
    make_inputs,
    packed_bits,
    pairwise,
    poison,
    values,
    with_append,
)

NAN, INF = float("nan"), float("inf")
BF16 = torch.bfloat16
AXES = {
    "layout": ["dense", "cache", "paged"],
    "seqlen_q": [1, 31, 32, 33, 64],
    "heads": [(2, 2), (6, 2), (3, 1)],
    "dtype": [torch.float16, BF16],
    "mask": [{}, {"causal": True}, {"window_size": (40, 9)}, {"attention_chunk": 50}, {"softcap": 5.0}],
    "sink": [False, True],
    "num_splits": [1, 3],
    "page_size": [1, 16],
}


def with_tree(case: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """The case with a random tree for each sequence, and NaN in what it hides from all rows."""
    batch, seqlen_q = case["q"].shape[:2]
    return poison(case | {"tree_mask": packed_bits(draft_trees(batch, seqlen_q, seed))})


def tree_case(choice: dict[str, Any], **sizes: Any) -> dict[str, Any]:
    """Of AXES; in caches the draft tokens may be more than the keys, in which case the first of them are missing."""
    (num_heads, num_heads_kv), layout = choice["heads"], choice["layout"]
    sizes = dict(batch=3, seqlen_k=200, head_dim=32, num_heads=num_heads, num_heads_kv=num_heads_kv) | sizes
    case = make_inputs(layout, **{name: choice[name] for name in ("seqlen_q", "dtype", "sink", "page_size")}, **sizes)
    return with_tree(case | choice["mask"])


def named(choice: dict[str, Any]) -> str:
    return "-".join(str(value).replace(" ", "") for value in choice.values())


@pytest.fixture(params=["cpu", pytest.param("triton", marks=pytest.mark.interpreted)])
def served_by(request: pytest.FixtureRequest) -> str:
    return request.param


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(bitwise_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("choice", pairwise(AXES), ids=named)
def test_features(choice: dict[str, Any], served_by: str) -> None:
    case = tree_case(choice)
    GradCheck(case).check_forward(*call(case, backend=served_by, num_splits=choice["num_splits"]))


def test_the_oracle_by_hand() -> None:
    """A prefix of two keys; of three draft tokens the last two have the first one for a parent."""
    q, k, v = torch.zeros(1, 3, 1, 8), torch.zeros(1, 5, 1, 8), torch.arange(5.0).view(1, 5, 1, 1).expand(-1, -1, -1, 8)
    result = reference.attention(q, k, v, tree_mask=int32(0b001, 0b011, 0b101).view(1, 3, 1))
    assert result.num_keys.tolist() == [[3, 4, 4]]
    torch.testing.assert_close(result.out[0, :, 0, 0], torch.tensor([1.0, 1.5, 1.75], dtype=torch.float64))


def test_one_call_is_pages_of_one_token_and_a_merge(served_by: str) -> None:
    """What engines do without a tree mask: the prefix for all rows, the tree as sequences of one query, and a merge."""
    batch, drafts = 1, 33
    case = make_inputs("paged", batch=batch, seqlen_q=drafts, seqlen_k=180, page_size=1, least_k=drafts, head_dim=32)
    sees = draft_trees(batch, drafts)
    out, lse = call(case | {"tree_mask": packed_bits(sees)}, backend=served_by)
    prefixes = case["seqused_k"] - drafts
    prefix = call(case | {"seqused_k": prefixes}, backend=served_by)
    table = torch.full((batch * drafts, drafts), -1, dtype=torch.int32)
    for n, tree in enumerate(sees):
        for i, row in enumerate(tree):
            ancestors = row.nonzero()[:, 0]
            table[n * drafts + i, : len(ancestors)] = case["page_table"][n, prefixes[n] + ancestors]
    one_each = {"q": case["q"].flatten(0, 1)[:, None], "page_table": table, "seqused_k": sees.sum(-1).flatten().int()}
    tree, tree_lse = call(case | one_each, backend=served_by)
    tree_lse = tree_lse.view(batch, drafts, -1).transpose(1, 2)
    merged, merged_lse = flash_attn3.merge_state(*prefix, tree.view(out.shape), tree_lse, backend=served_by)
    torch.testing.assert_close(lse, merged_lse, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(out, merged, rtol=2**-6, atol=2**-7)
    GradCheck(case | {"tree_mask": packed_bits(sees)}).check_forward(merged, merged_lse, factor=1.5)


def packed_case(new: list[int], rows: int, first: int = 2, **options: Any) -> dict[str, Any]:
    """Packed queries from row `first` on over pages, with the trees of sequences in a mask for `rows` of each."""
    batch = len(new)
    case = make_inputs("paged", batch=batch, seqlen_k=200, head_dim=32, least_k=90)
    case |= {"q": values((first + sum(new) + 3, 4, 32), BF16), "cu_seqlens_q": (cu(new) + first).int()}
    return case | {"tree_mask": packed_bits(draft_trees(batch, rows))} | options


@pytest.mark.parametrize("rows", [40, 70])
def test_ragged_queries(rows: int, served_by: str) -> None:
    """Of 0 to 40 rows; the mask has as many or more for each sequence."""
    case = poison(packed_case([40, 0, 1, 33, 7], rows, causal=True))
    results = call(case, backend=served_by, max_seqlen_q=40)
    GradCheck(case).check_forward(*results)
    assert same(call(case, backend=served_by), results)


@pytest.mark.parametrize("rows", [33, 0])
def test_rows_beyond_the_mask_see_no_draft_tokens(rows: int, served_by: str) -> None:
    """And the next call says so; the other sequences are as they were."""
    case = packed_case([5, 40, 9], rows=40)
    expected = call(case, backend=served_by)
    small = case | {"tree_mask": case["tree_mask"][:, :rows, : -(-rows // 32)].contiguous()}
    results = call(small, backend=served_by)
    with pytest.raises(flash_attn3.FlashAttn3ValueError, match="tree_mask = out of range"):
        flash_attn3.check_errors()
    GradCheck(small).check_forward(*results)
    kept = [*range(7 + 33), *range(47, 56)] if rows else [0, 1]
    assert same((results[0][kept], results[1][:, kept]), (expected[0][kept], expected[1][:, kept]))


def test_what_is_behind_the_tree_moves_no_bit(served_by: str) -> None:
    """Bits of tokens that there are not, rows of the mask that there are not, the trees of other sequences."""
    case = packed_case([40, 3, 33], rows=70)
    expected = call(case, backend=served_by)
    noise = torch.randint(-(2**31), 2**31 - 1, case["tree_mask"].shape).int()
    mask = case["tree_mask"].clone()
    for n, rows in enumerate((40, 3, 33)):
        mask[n, rows:] = noise[n, rows:]
        mask[n, :rows, -(-rows // 32) :] = noise[n, :rows, -(-rows // 32) :]
        mask[n, :rows, rows // 32] |= noise[n, :rows, rows // 32] & -(1 << rows % 32)
    assert same(call(case | {"tree_mask": mask}, backend=served_by), expected)
    mask[1] = noise[1]
    out, lse = call(case | {"tree_mask": mask}, backend=served_by)
    others = [*range(42), *range(45, 78)]
    assert same((out[others], lse[:, others]), (expected[0][others], expected[1][:, others]))
    assert not bitwise_equal(lse, expected[1])


def test_strides_of_the_mask_move_no_bit(served_by: str) -> None:
    case = tree_case({name: axis[0] for name, axis in AXES.items()} | {"seqlen_q": 33})
    mask = torch.stack([case["tree_mask"], torch.zeros_like(case["tree_mask"])], -1)[..., 0]
    assert same(call(case | {"tree_mask": mask}, backend=served_by), call(case, backend=served_by))


def test_equal_masks(served_by: str) -> None:
    """All bits are no mask, a lower triangle is a causal one; with a causal mask, both are."""
    case = make_inputs("cache", batch=2, seqlen_q=40, seqlen_k=150, least_k=70, head_dim=32)
    triangle = {"tree_mask": packed_bits(torch.ones(2, 40, 40).tril().bool())}
    whole = {"tree_mask": torch.full_like(triangle["tree_mask"], -1)}
    plain, causal = (call(case | mask, backend=served_by) for mask in ({}, {"causal": True}))
    assert same(call(case | whole, backend=served_by), plain)
    for tree in (triangle, triangle | {"causal": True}, whole | {"causal": True}):
        assert same(call(case | tree, backend=served_by), causal)


def test_append_then_verify(served_by: str) -> None:
    for ragged in (False, True):
        case = make_inputs("paged", batch=3, seqlen_q=33, seqlen_k=150, least_k=33, head_dim=32)
        case = with_append(case | {"tree_mask": packed_bits(draft_trees(3, 33))}, 33, ragged=ragged)
        check = GradCheck(case)
        check.check_forward(*call(case, backend=served_by))


def test_rows_without_a_bit_and_a_prefix_see_nothing(served_by: str) -> None:
    case = make_inputs("dense", batch=2, seqlen_q=20, seqlen_k=20, head_dim=32)
    sees = draft_trees(2, 20)
    sees[0, 3], sees[1] = False, False
    case = poison(case | {"tree_mask": packed_bits(sees)})
    out, lse = call(case, backend=served_by)
    GradCheck(case).check_forward(out, lse)
    assert bool((lse[1] == -INF).all() and (lse[0, :, 3] == -INF).all())
    assert bitwise_equal(out[1], torch.zeros_like(out[1]))


@pytest.mark.parametrize("poisonous", [NAN, INF, -INF])
@pytest.mark.parametrize("tensor", ["k", "v"])
def test_what_is_not_finite_reaches_only_those_who_see_it(tensor: str, poisonous: float, served_by: str) -> None:
    case = make_inputs("dense", batch=2, seqlen_q=40, seqlen_k=100, head_dim=32)
    sees = draft_trees(2, 40)
    case["tree_mask"] = packed_bits(sees)
    dirty = case | {tensor: case[tensor].clone()}
    token = 4
    dirty[tensor][1, 60 + token, 0, 5] = poisonous
    (out, lse), (clean, clean_lse) = call(dirty, backend=served_by), call(case, backend=served_by)
    touched = torch.zeros(out.shape, dtype=torch.bool)
    touched[1, sees[1, :, token], :2, 5 if tensor == "v" else slice(None)] = (
        True  # heads 0 and 1 share the first KV head
    )
    assert touched.any() and bitwise_equal(out[~touched], clean[~touched])
    exact = reference.attention(**dirty)
    assert torch.equal(out[touched].isnan(), exact.out[touched].isnan())
    untouched = ~touched.any(-1).transpose(1, 2)
    assert bitwise_equal(lse[untouched], clean_lse[untouched])


@pytest.mark.parametrize("only_qv", [False, True])
def test_latent_attention(only_qv: bool, served_by: str) -> None:
    sizes = {"batch": 2, "seqlen_q": 33, "seqlen_k": 100, "num_heads": 2, "num_heads_kv": 1, "head_dim_v": 512}
    case = with_tree(make_inputs("paged", qv=True, least_k=40, **sizes))
    case |= {"q": None, "k": None} if only_qv else {}
    GradCheck(case).check_forward(*call(case, backend=served_by))


def test_compiled_for_any_number_of_draft_tokens() -> None:
    def verify(q: Tensor, k: Tensor, v: Tensor, used: Tensor, mask: Tensor) -> Tensor:
        return flash_attn3.flash_attn_with_kvcache(q, k, v, cache_seqlens=used, tree_mask=mask)

    torch._dynamo.reset()
    compiled = torch.compile(verify, fullgraph=True, dynamic=True, backend="eager")
    k, v = torch.randn(2, 2, 90, 2, 16)
    for drafts in (5, 31, 40):
        arguments = (torch.randn(2, drafts, 4, 16), k, v, int32(90, 70), packed_bits(draft_trees(2, drafts)))
        assert bitwise_equal(compiled(*arguments), verify(*arguments))


@pytest.mark.parametrize("level", [1, 2, 3])
def test_checks_of_contents(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "check_level", level)
    case = packed_case([40, 9], rows=40, first=0)
    case |= {name: case[name].nan_to_num() for name in "kv"}
    call(case, backend="cpu")
    with pytest.raises(
        flash_attn3.FlashAttn3ValueError, match="tree_mask = 33 rows of a sequence; expected at least 40"
    ):
        call(case | {"tree_mask": case["tree_mask"][:, :33].contiguous()}, backend="cpu")
