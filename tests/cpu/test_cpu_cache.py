# SPDX-License-Identifier: BSD-3-Clause
"""The cpu backend on caches: append, rotary embedding, pages, padding, fp8, qv, context parallel; states merged."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import flash_attn3
from flash_attn3 import flash_attn_combine, flash_attn_with_kvcache, merge_state, quantize_fp8, reference
from flash_attn3.testing import GradCheck, bitwise_equal, call, make_inputs, poison, values

FP8 = torch.float8_e4m3fn
INF = float("inf")
attend = partial(call, backend="cpu")
MASKS = {"full": {}, "causal": {"causal": True}, "window": {"window_size": (40, 3)}}
CACHES = ("k", "v", "k_new", "v_new")


def int32(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def check(case: dict, **options) -> None:
    """Against the oracle, on copies of the caches; appended caches as the oracle has them."""
    copies = {name: case[name].clone() for name in CACHES if case.get(name) is not None}
    GradCheck(case).check_forward(*attend(case | copies | options))


def rotary_tables(length: int, rotary_dim: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    angles = torch.outer(torch.arange(length), 100.0 ** -(torch.arange(rotary_dim // 2) / rotary_dim))
    return {"rotary_cos": angles.cos().to(dtype), "rotary_sin": angles.sin().to(dtype)}


def appending(layout: str, dtype: torch.dtype, seqlen_new: int = 3, **sizes: int) -> dict:
    """A case that appends `seqlen_new` keys to sequences of different lengths, one of them empty."""
    case = make_inputs(layout, batch=3, seqlen_q=seqlen_new, seqlen_k=300, dtype=dtype, **sizes)
    case["seqused_k"] = int32(300 - seqlen_new, 130, 0)
    if "leftpad_k" in case:
        case["leftpad_k"] = int32(5, 130, 0)
    if "page_table" in case:
        num_pages, page_size = case["k"].shape[:2]
        width = case["page_table"].shape[1]
        case["page_table"] = torch.randperm(num_pages)[: 3 * width].view(3, width).int()
        used = -(-(case["seqused_k"] + seqlen_new) // page_size)
        case["page_table"][torch.arange(width) >= used[:, None]] = -1
    case |= {name: values(case[name].shape, dtype, seed=i) for i, name in enumerate("qkv")}
    case |= {f"{x}_new": values((3, seqlen_new, *case[x].shape[-2:]), dtype, seed=5 + i) for i, x in enumerate("kv")}
    return case


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", ["cache", "paged"])
@pytest.mark.parametrize("seqlen_q", [1, 5, 140])
def test_cache(layout: str, mask: str, dtype: torch.dtype, seqlen_q: int) -> None:
    check(make_inputs(layout, batch=4, seqlen_q=seqlen_q, seqlen_k=300, dtype=dtype, seed=3) | MASKS[mask])


@pytest.mark.parametrize("page_size", [1, 7, 64, 256])
def test_pages_of_any_size_and_order_give_the_bits_of_one_piece(page_size: int) -> None:
    case = make_inputs("paged", batch=3, seqlen_q=5, seqlen_k=600, page_size=page_size, strided=True, sink=True)
    case |= {"causal": True, "softcap": 9.0}
    check(case)
    pages = case["page_table"].clamp(0, len(case["k"]) - 1).long()
    piece = {name: case[name][pages].flatten(1, 2) for name in "kv"}
    whole = attend({name: x for name, x in case.items() if name != "page_table"} | piece)
    assert all(bitwise_equal(a, b) for a, b in zip(attend(case), whole, strict=True))


def test_shared_pages_and_repeated_rows() -> None:
    case = make_inputs("paged", batch=3, dtype=torch.float32, page_size=8)
    case |= {"page_table": case["page_table"][:1].expand(3, -1), "seqused_k": case["seqused_k"].amax().expand(3)}
    case |= {name: case[name].nan_to_num() for name in "qkv"}
    check(case | {"page_table": case["page_table"].clamp(0, len(case["k"]) - 1)})
    rows = make_inputs("cache", batch=3, dtype=torch.float32) | {"kv_batch_idx": int32(2, 2, 0)}
    check(rows | {name: rows[name].nan_to_num() for name in "qkv"})


@pytest.mark.parametrize("layout", ["cache", "paged"])
@pytest.mark.parametrize("mask", MASKS)
def test_ragged_queries(layout: str, mask: str) -> None:
    case = make_inputs(layout, batch=4, seqlen_k=300, dtype=torch.bfloat16)
    case |= {name: case[name].nan_to_num() for name in "kv"}
    case |= {"q": values((90, 4, 64), torch.bfloat16), "cu_seqlens_q": int32(2, 2, 3, 30, 88)}
    case |= {} if layout == "paged" else {"leftpad_k": torch.minimum(int32(1, 0, 7, 50), case["seqused_k"])}
    case = poison(case | MASKS[mask])
    arguments = {"seqused_k": "cache_seqlens", "kv_batch_idx": "cache_batch_idx", "leftpad_k": "cache_leftpad"}
    arguments |= {"k": "k_cache", "v": "v_cache"}
    renamed = {arguments.get(name, name): x for name, x in case.items()}
    GradCheck(case).check_forward(*flash_attn_with_kvcache(**renamed, return_softmax_lse=True, backend="cpu"))


@pytest.mark.parametrize("layout", ["cache", "paged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seqlen_new", [0, 1, 40])
def test_append_writes_its_slots_bit_for_bit_and_no_others(layout: str, dtype: torch.dtype, seqlen_new: int) -> None:
    case = appending(layout, dtype, seqlen_new)
    before = {name: case[name].clone() for name in CACHES}
    new = [case["k_new"], case["v_new"], case["seqused_k"]]
    k, v = reference.append(
        case["k"], case["v"], *new, kv_batch_idx=case.get("kv_batch_idx"), page_table=case.get("page_table")
    )
    attend(case)
    assert bitwise_equal(case["k"], k) and bitwise_equal(case["v"], v)
    assert all(bitwise_equal(case[name], before[name]) for name in ("k_new", "v_new"))
    check(case | before)


@pytest.mark.parametrize("rotary_dim", [2, 32, 64])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("layout", ["cache", "paged"])
@pytest.mark.parametrize("mask", MASKS)
def test_rotary(layout: str, mask: str, interleaved: bool, rotary_dim: int) -> None:
    case = appending(layout, torch.float32) | MASKS[mask]
    check(case | rotary_tables(310, rotary_dim, torch.float32) | {"rotary_interleaved": interleaved})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rotary_rounds_once(dtype: torch.dtype) -> None:
    case = appending("cache", dtype) | rotary_tables(310, 48, dtype) | {"rotary_seqlens": int32(9, 300, 0)}
    tables = [case[name] for name in ("rotary_cos", "rotary_sin", "rotary_seqlens")]
    exact = [case[name].double() for name in ("k", "v", "k_new", "v_new")]
    k, _ = reference.append(*exact, case["seqused_k"], *tables, kv_batch_idx=case["kv_batch_idx"])
    q = case["q"].clone()
    check(case)
    attend(case)
    assert bitwise_equal(case["q"], q)
    ulp = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    torch.testing.assert_close(case["k"].double(), k, rtol=ulp, atol=1e-6)


def test_ragged_append() -> None:
    case = appending("paged", torch.bfloat16, 4) | rotary_tables(310, 64, torch.bfloat16)
    case |= {"cu_seqlens_k_new": int32(1, 5, 5, 8), "k_new": case["k_new"].flatten(0, 1)[:9]}
    check(case | {"v_new": case["v_new"].flatten(0, 1)[:9], "causal": True})


@pytest.mark.parametrize("only_qv", [False, True])
@pytest.mark.parametrize("layout", ["cache", "paged"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_qv(layout: str, dtype: torch.dtype, only_qv: bool) -> None:
    sizes = {"batch": 3, "seqlen_q": 4, "seqlen_k": 300, "num_heads": 16, "num_heads_kv": 1, "head_dim_v": 512}
    case = make_inputs(layout, dtype=dtype, qv=True, **sizes) | {"causal": True}
    check(case | ({"q": None, "k": None} if only_qv else {}))


def scales(case: dict, blocks: bool) -> dict:
    """Descales of those of q, k, v that are e4m3, per head or per 128 rows, some of them 0."""
    batch, capacity = len(case["q"]), case["k"].shape[1]
    if "page_table" in case:
        capacity *= case["page_table"].shape[1]
    num_rows = {"q": case["q"].shape[1], "k": capacity, "v": capacity}
    for name in "qkv":
        if case[name].dtype == FP8:
            shape = (batch, case[name].shape[2], -(-num_rows[name] // 128)) if blocks else (batch, case["k"].shape[2])
            case = case | {f"{name}_descale": torch.rand(shape) + 0.2}
            case[f"{name}_descale"][0] = 0.0
    return case


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("layout", ["dense", "cache", "paged"])
@pytest.mark.parametrize("q_dtype", [FP8, torch.bfloat16, torch.float16], ids=str)
def test_fp8(layout: str, q_dtype: torch.dtype, blocks: bool) -> None:
    """Blocks of 128 keys count from slot 0 of the cache, left padding included."""
    case = make_inputs(layout, batch=4, seqlen_q=150, seqlen_k=300, dtype=torch.bfloat16, seed=1)
    if "leftpad_k" in case:
        case["leftpad_k"] = torch.minimum(int32(3, 127, 128, 200), case["seqused_k"])
    case |= {name: case[name].nan_to_num().to(FP8 if name != "q" else q_dtype) for name in "qkv"}
    check(scales(poison(case | {"causal": True}), blocks))


@pytest.mark.parametrize("given", [FP8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("layout", ["cache", "paged"])
def test_append_into_an_fp8_cache(layout: str, blocks: bool, given: torch.dtype) -> None:
    case = appending(layout, torch.bfloat16)
    case |= {name: case[name].to(FP8) for name in "kv"} | {name: case[name].to(given) for name in ("k_new", "v_new")}
    case["k_new"][0] = 1e3
    case = scales(case | {"q": case["q"].to(given)}, blocks)
    case |= {name: case[name].clamp_min(0.1) for name in ("k_descale", "v_descale")}
    check(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("causal", [False, True])
def test_context_parallel(causal: bool, rank: int, dtype: torch.dtype) -> None:
    total = int32(130, 5, 0, 600)
    case = make_inputs("cache", batch=4, seqlen_q=3, seqlen_k=200, dtype=dtype) | {"causal": causal}
    case = {name: x.nan_to_num() if name in "qkv" else x for name, x in case.items() if name != "leftpad_k"}
    context = {"cp_world_size": 3, "cp_rank": rank, "cp_tot_seqused_k": total}
    case |= {"seqused_k": ((total - rank + 2) // 3).int()} | context
    names = {"k": "k_cache", "v": "v_cache", "seqused_k": "cache_seqlens", "kv_batch_idx": "cache_batch_idx"}
    arguments = {names.get(name, name): x for name, x in poison(case).items()}
    GradCheck(case).check_forward(*flash_attn_with_kvcache(**arguments, return_softmax_lse=True))


# Contents of index tensors

HOSTILE = [
    ("page_table", 2**30),
    ("page_table", -1),
    ("kv_batch_idx", -1),
    ("kv_batch_idx", 10**6),
    ("seqused_k", -5),
    ("seqused_k", 2**31 - 1),
    ("leftpad_k", -1),
    ("leftpad_k", 2**31 - 1),
]


@pytest.mark.parametrize("name, content", HOSTILE)
def test_clamps_are_noted_and_leave_other_sequences_alone(name: str, content: int) -> None:
    case = make_inputs("paged" if name == "page_table" else "cache", batch=3, dtype=torch.float32, seqlen_k=40)
    case |= {x: case[x].nan_to_num() for x in "qkv"} | {"seqused_k": int32(40, 40, 40)}
    if name == "page_table":
        case[name] = torch.arange(9, dtype=torch.int32).view(3, 3).expand(3, 3).contiguous()
    hostile = case | {name: case[name].clone()}
    hostile[name][1] = content
    out, lse = attend(hostile)
    with pytest.raises(flash_attn3.FlashAttn3ValueError, match=name):
        flash_attn3.check_errors()
    clean, clean_lse = attend(case)
    others = torch.tensor([0, 2])
    assert bitwise_equal(out[others], clean[others]) and bitwise_equal(lse[others], clean_lse[others])
    assert out.isfinite().all() and not lse.isnan().any()
    if name == "kv_batch_idx":
        assert (out[1] == 0).all() and (lse[1] == -INF).all()


@pytest.mark.parametrize("name", ["kv_batch_idx", "page_table", "seqused_k", "rotary_seqlens"])
def test_appends_out_of_range_are_dropped(name: str) -> None:
    case = appending("paged" if name == "page_table" else "cache", torch.float32)
    case |= rotary_tables(310, 64, torch.float32) | {"rotary_seqlens": case["seqused_k"].clone()}
    before = case["v"].clone()
    case[name] = torch.full_like(case[name], {"seqused_k": case["k"].shape[1]}.get(name, 10**6))
    attend(case)
    with pytest.raises(flash_attn3.FlashAttn3ValueError, match=name):
        flash_attn3.check_errors()
    assert bitwise_equal(case["v"], before) == (name != "rotary_seqlens")


# Merging


@pytest.mark.parametrize("num_splits", [1, 2, 7])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_combine(num_splits: int, out_dtype: torch.dtype) -> None:
    out = values((num_splits, 2, 37, 3, 20), torch.float32)
    lse = values(out.shape[:-1], torch.float32, seed=1) * 30
    lse[:, 0, :5], lse[0, 1], out[0, 1] = -INF, -INF, torch.nan
    merged, merged_lse = flash_attn_combine(out, lse.transpose(2, 3).contiguous().transpose(2, 3), out_dtype=out_dtype)
    exact, exact_lse = reference.combine(out, lse)
    tolerance = max(torch.finfo(out_dtype).eps, 1e-5)
    torch.testing.assert_close(merged.double(), exact, rtol=tolerance, atol=1e-5)
    torch.testing.assert_close(merged_lse.double(), exact_lse, rtol=1e-6, atol=1e-5)
    assert bitwise_equal(merged[0, :5], torch.zeros_like(merged[0, :5])) and (merged_lse[0, :5] == -INF).all()


@pytest.mark.parametrize("layout", ["hs", "sh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_state(layout: str, dtype: torch.dtype) -> None:
    out_a, out_b = (values((2, 5, 3, 16), dtype, seed=i) for i in range(2))
    lse_a, lse_b = (values((2, 3, 5), torch.float32, seed=i) * 20 for i in range(2, 4))
    lse_b[0], out_b[0] = -INF, torch.nan
    out_a[0, 0, 0, 0] = -0.0
    given = (lambda x: x.transpose(1, 2).contiguous()) if layout == "sh" else (lambda x: x)
    out, lse = merge_state(out_a, given(lse_a), out_b, given(lse_b), lse_layout=layout)
    swapped, _ = merge_state(out_b, given(lse_b), out_a, given(lse_a), lse_layout=layout)
    exact, exact_lse = reference.merge(out_a, lse_a, out_b, lse_b)
    assert bitwise_equal(out, swapped) and bitwise_equal(out[0], out_a[0])
    assert bitwise_equal(lse[0], given(lse_a)[0])
    torch.testing.assert_close(out.double(), exact, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-5)
    torch.testing.assert_close(lse.double(), given(exact_lse), rtol=1e-6, atol=1e-6)


def test_scales_from_quantisation_reproduce_the_tensor() -> None:
    """A whole round: quantised by blocks, attended, near the result of what was quantised."""
    q, k, v = (values((2, 300, 2, 64), torch.bfloat16, seed=i) for i in range(3))
    quantised = [quantize_fp8(x, block=128) for x in (q, k, v)]
    case = dict(zip("qkv", (x for x, _ in quantised), strict=True))
    case |= dict(zip(("q_descale", "k_descale", "v_descale"), (scale for _, scale in quantised), strict=True))
    out, _ = attend(case)
    exact = reference.attention(q, k, v).out
    assert ((out - exact).square().mean() / exact.square().mean()).sqrt() < 0.06
