# SPDX-License-Identifier: BSD-3-Clause
"""The forward, cache and merge kernels of the Triton backend in Triton's interpreter, against the oracle.

A program of a kernel takes some 50 ms there, so each case is a few tiles (of 64 or 128 rows and 64 keys). On a GPU
`tests/gpu/test_triton_features.py` runs the same tests.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn3
from flash_attn3 import env, flash_attn_combine, merge_state, reference
from flash_attn3.testing import (
    GradCheck,
    bitwise_equal,
    call,
    make_inputs,
    poison,
    restrided,
    values,
    with_append,
    with_descales,
)

pytestmark = pytest.mark.interpreted
INF, NAN = float("inf"), float("nan")
BF16, FP16, FP32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
SMALL = {"num_heads": 2, "num_heads_kv": 1}
FEATURES = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (20, 10)},
    "left window": {"window_size": (20, -1)},
    "right window": {"window_size": (-1, 10)},
    "diagonal": {"window_size": (0, 0)},
    "causal window": {"window_size": (70, 30), "causal": True},
    "chunk": {"attention_chunk": 48},
    "causal chunk window": {"attention_chunk": 100, "causal": True, "window_size": (20, -1)},
    "softcap": {"softcap": 2.0},
    "sink": {"s_aux": torch.tensor([0.5, -INF])},
    "causal sink softcap": {"s_aux": torch.tensor([-40.0, 40.0]), "causal": True, "softcap": 3.0},
    "scale": {"softmax_scale": 0.3},
    "no scale": {"softmax_scale": 0.0, "causal": True},
}
DEVICE = "cuda" if torch.cuda.is_available() and not env.triton_interpret() else "cpu"


def attend(case: dict[str, Any], **options: Any) -> list[Tensor]:
    """Results on the CPU; what is appended to a cache is appended to that of the case."""
    arguments = case | options
    moved = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in arguments.items()}
    results = [x.cpu() for x in call(moved, backend="triton")]
    for name in ("k", "v", "out"):
        if isinstance(arguments.get(name), Tensor) and DEVICE == "cuda":
            arguments[name].copy_(moved[name])
    return results


def check(case: dict[str, Any], **options: Any) -> None:
    GradCheck(case).check_forward(*attend(case, return_max_logits=True, **options))


def same(case: dict[str, Any], other: dict[str, Any], **options: Any) -> bool:
    """Whether both give the same bits."""
    pairs = zip(attend(case, **options), attend(other, **options), strict=True)
    return all(bitwise_equal(a, b) for a, b in pairs)


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str) -> None:
    case = make_inputs("dense", batch=1, seqlen_q=70, seqlen_k=150, head_dim=32, **SMALL)
    check(poison(case | FEATURES[feature]))


@pytest.mark.parametrize("layout", ["varlen", "padded", "cache", "paged"])
@pytest.mark.parametrize("feature", ["full", "causal", "window", "causal sink softcap"])
def test_layouts(layout: str, feature: str) -> None:
    case = make_inputs(layout, batch=4, seqlen_q=40, seqlen_k=100, head_dim=16, strided=True, **SMALL)
    check(poison(case | FEATURES[feature]))


SIZES = [(0, 5), (1, 1), (1, 64), (1, 65), (63, 63), (64, 0), (65, 64), (127, 1), (128, 129), (129, 128), (130, 191)]


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), SIZES)
@pytest.mark.parametrize("feature", ["causal", "window"])
def test_sizes(seqlen_q: int, seqlen_k: int, feature: str) -> None:
    sizes = {"batch": 1, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "num_heads": 1, "num_heads_kv": 1, "head_dim": 8}
    check(poison(make_inputs("dense", dtype=FP16, **sizes) | FEATURES[feature]))


@pytest.mark.parametrize("dims", [(8, 8), (40, 40), (96, 96), (128, 128), (192, 128), (256, 256), (64, 256)], ids=str)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_head_dims(dims: tuple[int, int], dtype: torch.dtype) -> None:
    sizes = {"batch": 1, "seqlen_q": 20, "seqlen_k": 70, "head_dim": dims[0], "head_dim_v": dims[1]}
    check(make_inputs("dense", dtype=dtype, strided=True, **sizes, **SMALL) | {"causal": True})


@pytest.mark.parametrize(("num_heads", "num_heads_kv"), [(3, 3), (6, 2), (5, 1), (0, 0)])
def test_heads(num_heads: int, num_heads_kv: int) -> None:
    heads = {"num_heads": num_heads, "num_heads_kv": num_heads_kv}
    case = make_inputs("dense", batch=1, seqlen_k=40, head_dim=16, **heads) | {"causal": True}
    if num_heads:
        check(case)
    else:
        assert attend(case)[0].shape == case["q"].shape


def test_long_rows() -> None:
    case = make_inputs("dense", batch=1, seqlen_q=60, seqlen_k=700, dtype=FP16, distribution="huge", **SMALL)
    check(case | {"causal": True})


def test_rows_of_no_sequence() -> None:
    case = make_inputs("varlen", batch=3, seqlen_q=20, seqlen_k=40, head_dim=16, **SMALL)
    case |= {"q": values((200, 2, 16), BF16), "cu_seqlens_q": int32(70, 75, 75, 90)}
    check(poison(case), max_seqlen_q=15)


# Caches


@pytest.mark.parametrize("page_size", [1, 7, 16, 64, 128])
@pytest.mark.parametrize("leftpad", [False, True])
def test_page_sizes(page_size: int, leftpad: bool) -> None:
    """Pages that hold whole key tiles take a path of their own, unless padding shifts the tiles."""
    case = make_inputs("paged", batch=2, seqlen_q=3, seqlen_k=150, head_dim=16, page_size=page_size, **SMALL)
    if leftpad:
        case = poison(case | {"leftpad_k": torch.minimum(int32(3, 70), case["seqused_k"])})
    check(case | {"causal": True})


@pytest.mark.parametrize("layout", ["dense", "padded", "paged"])
@pytest.mark.parametrize("num_splits", [2, 7, 0])
def test_splits(layout: str, num_splits: int) -> None:
    case = make_inputs(layout, batch=2, seqlen_q=5, seqlen_k=400, head_dim=32, sink=True, page_size=64, **SMALL)
    check(case | {"window_size": (300, 1)}, num_splits=num_splits)


def test_splits_of_fixed_size_do_not_depend_on_the_batch() -> None:
    case = make_inputs("paged", batch=3, seqlen_q=1, seqlen_k=1200, head_dim=16, page_size=64, least_k=1100, **SMALL)
    out, lse = attend(case, num_splits=0, batch_invariant=True)
    rows = {name: case[name][1:2] for name in ("q", "page_table", "seqused_k")}
    alone, alone_lse = attend(case | rows, num_splits=0, batch_invariant=True)
    assert bitwise_equal(out[1:2], alone) and bitwise_equal(lse[1:2], alone_lse)
    check(case, num_splits=0, batch_invariant=True)


APPENDS = [
    ("cache", {"rotary_dim": 16}),
    ("cache", {"rotary_dim": 32, "interleaved": False}),
    ("paged", {"rotary_dim": 8, "ragged": True}),
    ("paged", {}),
]


@pytest.mark.parametrize(("layout", "options"), APPENDS, ids=str)
@pytest.mark.parametrize("cache_dtype", [BF16, E4M3], ids=str)
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_append(layout: str, options: dict[str, Any], cache_dtype: torch.dtype, mask: str) -> None:
    case = make_inputs(layout, batch=3, seqlen_q=5, seqlen_k=90, head_dim=32, dtype=cache_dtype, least_k=4, **SMALL)
    case["q"] = case["q"].to(BF16)
    if cache_dtype == E4M3:
        case = with_descales(case, blocks=True)
    case = with_append(case, 4, **options) | FEATURES[mask]
    judge = GradCheck(case)
    names = ("k", "v", "k_new", "v_new", "seqused_k", "rotary_cos", "rotary_sin", "rotary_seqlens")
    more = ("rotary_interleaved", "kv_batch_idx", "page_table", "cu_seqlens_k_new", "k_descale", "v_descale")
    k, v = reference.append(*map(case.get, names), **{name: case[name] for name in more if name in case})
    judge.check_forward(*attend(case))
    assert bitwise_equal(case["v"], v)
    ulp = 2**-3 if cache_dtype == E4M3 else 2**-7
    torch.testing.assert_close(case["k"].double(), k.double(), rtol=ulp, atol=2**-9, equal_nan=True)
    assert options or bitwise_equal(case["k"], k)


@pytest.mark.parametrize("layout", ["dense", "varlen", "cache", "paged"])
@pytest.mark.parametrize("scales", [None, "heads", "blocks"])
@pytest.mark.parametrize("q_dtype", [E4M3, BF16], ids=str)
def test_fp8(layout: str, scales: str | None, q_dtype: torch.dtype) -> None:
    sizes = {"batch": 2, "seqlen_q": 20, "seqlen_k": 200, "head_dim": 32}
    case = make_inputs(layout, dtype=E4M3, **sizes, **SMALL) | {"causal": True}
    case["q"] = case["q"].to(q_dtype)
    if scales:
        case = with_descales(case, blocks=scales == "blocks")
        case["v_descale"][0] = 0.0
    check(case)


@pytest.mark.parametrize(
    ("layout", "only_qv"), [("dense", False), ("varlen", False), ("paged", False), ("paged", True)]
)
@pytest.mark.parametrize("head_dim_v", [256, 512])
def test_qv(layout: str, only_qv: bool, head_dim_v: int) -> None:
    sizes = {"batch": 2, "seqlen_q": 9, "seqlen_k": 70, "head_dim": 64, "head_dim_v": head_dim_v}
    case = make_inputs(layout, qv=True, sink=True, **sizes, **SMALL) | {"causal": True}
    check(case | ({"q": None, "k": None} if only_qv else {}))


@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("causal", [False, True])
def test_context_parallel(rank: int, causal: bool) -> None:
    total = int32(130, 2, 0)
    case = make_inputs("cache", batch=3, seqlen_q=3, seqlen_k=50, head_dim=16, **SMALL)
    case = {name: x.nan_to_num() if name in "qkv" else x for name, x in case.items() if name != "leftpad_k"}
    case |= {"cp_world_size": 3, "cp_rank": rank, "cp_tot_seqused_k": total, "causal": causal}
    check(poison(case | {"seqused_k": ((total - rank + 2) // 3).int()}))


HOSTILE = [("page_table", -1), ("kv_batch_idx", 10**6), ("seqused_k", -5), ("seqused_k", 2**31 - 1), ("leftpad_k", -1)]


@pytest.mark.parametrize(("name", "content"), HOSTILE)
def test_what_index_tensors_hold_harms_no_other_sequence(name: str, content: int) -> None:
    layout = "paged" if name == "page_table" else "cache"
    case = make_inputs(layout, batch=2, seqlen_q=3, seqlen_k=70, head_dim=16, least_k=20, **SMALL)
    case |= {tensor: case[tensor].nan_to_num() for tensor in "qkv"}
    clean, _ = attend(case)
    dirty = case | {name: case[name].clone()}
    dirty[name][1] = content
    out, lse = attend(dirty)
    with pytest.raises(flash_attn3.FlashAttn3ValueError, match=name):
        flash_attn3.check_errors()
    assert bitwise_equal(out[0], clean[0]) and out.isfinite().all() and not lse.isnan().any()


# Bits


@pytest.mark.parametrize("poisonous", [NAN, INF, -INF])
@pytest.mark.parametrize("tensor", "qkv")
@pytest.mark.parametrize("layout", ["dense", "paged"])
def test_what_is_not_finite_reaches_only_those_who_see_it(tensor: str, poisonous: float, layout: str) -> None:
    case = make_inputs(layout, batch=2, seqlen_q=80, seqlen_k=140, head_dim=16, page_size=16, least_k=140, **SMALL)
    case |= {"causal": True, "window_size": (50, 0)}
    dirty = case | {tensor: case[tensor].clone()}
    row = 40  # of the queries, or of the keys
    if tensor == "q":
        dirty["q"][1, row, 1, 5] = poisonous
    elif layout == "dense":
        dirty[tensor][1, row + 60, 0, 5] = poisonous
    else:
        dirty[tensor][case["page_table"][1, (row + 60) // 16].item(), (row + 60) % 16, 0, 5] = poisonous
    (out, lse), (clean, clean_lse) = attend(dirty), attend(case)
    touched = torch.zeros(out.shape, dtype=torch.bool)
    rows, heads = (row, 1) if tensor == "q" else (slice(row, row + 51), slice(None))
    touched[1, rows, heads, 5 if tensor == "v" else slice(None)] = True
    assert bitwise_equal(out[~touched], clean[~touched])
    if tensor == "v":
        expected = torch.full_like(out[touched], poisonous)
        torch.testing.assert_close(out[touched], expected, equal_nan=True)
        assert bitwise_equal(lse, clean_lse)
    else:
        exact = reference.attention(**dirty)
        assert torch.equal(out[touched].isnan(), exact.out[touched].isnan())
        untouched = ~touched.any(-1).transpose(1, 2)
        assert bitwise_equal(lse[untouched], clean_lse[untouched])


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("layout", ["varlen", "padded", "cache", "paged"])
def test_what_nobody_sees_moves_no_bit(layout: str, value: float) -> None:
    case = make_inputs(layout, batch=3, seqlen_q=20, seqlen_k=90, head_dim=16, **SMALL) | {"window_size": (30, 0)}
    case |= {name: case[name].nan_to_num(1.0) for name in "qkv"}
    assert same(case, poison(case, value))


def test_strides_move_no_bit() -> None:
    case = make_inputs("dense", seqlen_q=40, seqlen_k=70, head_dim=16, **SMALL) | {"causal": True}
    strided = {name: restrided(case[name], seed) for seed, name in enumerate("qkv")}
    assert same(case, case | strided)
    expected, _ = attend(case)
    out = restrided(torch.full_like(expected, NAN))
    attend(case, out=out)
    assert bitwise_equal(out, expected)
    unrounded, _ = attend(case, out=torch.full(expected.shape, NAN))
    assert bitwise_equal(unrounded.to(BF16), expected)


def test_equal_masks_give_equal_bits() -> None:
    case = make_inputs("dense", batch=1, seqlen_q=70, seqlen_k=130, head_dim=16, **SMALL)
    causal = case | {"causal": True}
    assert same(causal, case | {"window_size": (-1, 0)}) and same(causal, case | {"window_size": (129, 0)})
    assert same(case, case | {"window_size": (200, 200)}) and same(case, case | {"attention_chunk": 2**30})


def test_layouts_and_lengths_move_no_bit() -> None:
    """A sequence alone, in a batch of others, under a larger bound, and in pages."""
    case = make_inputs("varlen", batch=3, seqlen_q=90, seqlen_k=140, head_dim=16, seed=2, **SMALL) | {"causal": True}
    out, lse = attend(case)
    assert same(case, case, max_seqlen_q=1000) and same(case, case | {"max_seqlen_q": 90, "max_seqlen_k": 140})
    starts_q, starts_k = case["cu_seqlens_q"].tolist(), case["cu_seqlens_k"].tolist()
    for n in range(3):
        rows, keys = slice(starts_q[n], starts_q[n + 1]), slice(starts_k[n], starts_k[n + 1])
        alone = {"q": case["q"][None, rows], "k": case["k"][None, keys], "v": case["v"][None, keys], "causal": True}
        out_n, lse_n = attend(alone)
        assert bitwise_equal(out[rows], out_n[0]) and bitwise_equal(lse[:, rows], lse_n[0])


# Merging


@pytest.mark.parametrize("num_splits", [1, 3, 40])
@pytest.mark.parametrize("out_dtype", [FP32, FP16, BF16], ids=str)
def test_combine(num_splits: int, out_dtype: torch.dtype) -> None:
    out = values((num_splits, 2, 7, 3, 20), FP32)
    lse = values(out.shape[:-1], FP32, seed=1) * 30
    lse[:, 0, :5], lse[0, 1], out[0, 1] = -INF, -INF, NAN
    lse_strided = lse.transpose(2, 3).contiguous().transpose(2, 3)
    partials = out.to(DEVICE), lse_strided.to(DEVICE)
    merged, merged_lse = (x.cpu() for x in flash_attn_combine(*partials, out_dtype=out_dtype, backend="triton"))
    exact, exact_lse = reference.combine(out, lse)
    tolerance = max(torch.finfo(out_dtype).eps, 1e-5)
    torch.testing.assert_close(merged.double(), exact, rtol=tolerance, atol=1e-5)
    torch.testing.assert_close(merged_lse.double(), exact_lse, rtol=1e-6, atol=1e-5)
    assert bitwise_equal(merged[0, :5], torch.zeros_like(merged[0, :5])) and (merged_lse[0, :5] == -INF).all()


@pytest.mark.parametrize("layout", ["hs", "sh"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_merge_state(layout: str, dtype: torch.dtype) -> None:
    out_a, out_b = (values((2, 5, 3, 16), dtype, seed=i) for i in range(2))
    lse_a, lse_b = (values((2, 3, 5), FP32, seed=i) * 20 for i in range(2, 4))
    lse_b[0], out_b[0] = -INF, NAN
    out_a[0, 0, 0, 0] = -0.0
    given = (lambda x: x.transpose(1, 2).contiguous()) if layout == "sh" else (lambda x: x)

    def merge(*states: Tensor) -> list[Tensor]:
        merged = merge_state(*(x.to(DEVICE) for x in states), lse_layout=layout, backend="triton")
        return [x.cpu() for x in merged]

    out, lse = merge(out_a, given(lse_a), out_b, given(lse_b))
    swapped, _ = merge(out_b, given(lse_b), out_a, given(lse_a))
    exact, exact_lse = reference.merge(out_a, lse_a, out_b, lse_b)
    assert bitwise_equal(out, swapped) and bitwise_equal(out[0], out_a[0])
    assert bitwise_equal(lse[0], given(lse_a)[0])
    torch.testing.assert_close(out.double(), exact, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-5)
    torch.testing.assert_close(lse.double(), given(exact_lse), rtol=1e-6, atol=1e-6)
