# SPDX-License-Identifier: BSD-3-Clause
"""Every rule on the arguments of the cache, merge and lower-level functions."""

from __future__ import annotations

import pytest
import torch
from refusals import (
    CALLS,
    Bad,
    bad,
    check,
    f32,
    fp8,
    i32,
    new,
    on,
    pages,
    rotary,
    t,
    type_error,
)

from flash_attn3 import UnsupportedError

INT64 = torch.int64
packed_keys = dict(k=t(11, 2, 16), v=t(11, 2, 16), cu_seqlens_k=i32(3))

LENGTHS = on(
    "flash_attn_with_kvcache",
    [
        bad("cache_seqlens", "-1", "integer", cache_seqlens=-1),
        bad("cache_seqlens", "9", "at most 8, the capacity", cache_seqlens=9),
        type_error("cache_seqlens", "3.0", "an integer or an int32 tensor (b,)", cache_seqlens=3.0),
        type_error("cache_seqlens", "True", "an integer", cache_seqlens=True),
        type_error("cache_seqlens", "[3, 3]", "an integer or an int32 tensor (b,)", cache_seqlens=[3, 3]),
        type_error(
            "cache_seqlens", "int64", "int32. Convert with .to(torch.int32)", cache_seqlens=i32(2).but(dtype=INT64)
        ),
        bad("cache_seqlens", "(3,)", "b=2", cache_seqlens=i32(3)),
        bad("cache_seqlens", "()", "b=2", cache_seqlens=i32()),
        *(bad(name, "(3,)", "b=2", **{name: i32(3)}) for name in ("cache_batch_idx", "cache_leftpad")),
        *(
            type_error(name, "int64", ".to(torch.int32)", **{name: i32(2).but(dtype=INT64)})
            for name in ("cache_batch_idx", "cache_leftpad")
        ),
        type_error("cache_leftpad", "int", "torch.Tensor", cache_leftpad=1),
        type_error("page_table", "list", "torch.Tensor", page_table=[[0, 1]], cache_seqlens=3),
        bad("page_table", "(6,)", "pages", page_table=i32(6), cache_seqlens=3),
        bad("page_table", "(3, 2)", "b=2", page_table=i32(3, 2)),
        bad("cache_seqlens", "13", "at most 12", **pages | dict(cache_seqlens=13)),
        bad("k_cache", "(2, 8, 2, 16)", "batch 3", q=t(3, 3, 4, 16), cache_seqlens=None),
        bad("k_cache", "(8, 2, 16)", "(b, s_k, h_kv, d=16)", k_cache=t(8, 2, 16), cache_seqlens=3),
        bad("k_cache", "()", "(b, s_k, h_kv, d=16)", k_cache=t(), cache_seqlens=3),
        bad("v_cache", "(2, 9, 2, 16)", "s_k=8", v_cache=t(2, 9, 2, 16)),
        bad("q", "(3, 4, 16)", "(b, s_q, h, d)", q=t(3, 4, 16), cache_seqlens=3),
        bad("q", "()", "(b, s_q, h, d)", q=t(), cache_seqlens=3),
        bad("q", "(2, 3, 4, 16)", "(t_q, h, d)", cu_seqlens_q=i32(3), cache_seqlens=3),
        type_error("cu_seqlens_q", "list", "torch.Tensor", q=t(6, 4, 16), cu_seqlens_q=[0, 6], cache_seqlens=3),
        bad("cu_seqlens_q", "(0,)", "at least one element", q=t(6, 4, 16), cu_seqlens_q=i32(0), cache_seqlens=3),
        type_error("q", "NoneType", "torch.Tensor", q=None),
        type_error("k_cache", "NoneType", "torch.Tensor", k_cache=None),
        type_error("k_cache", "NoneType", "torch.Tensor", k_cache=None, cache_seqlens=3),
        type_error("v_cache", "NoneType", "torch.Tensor", v_cache=None),
        type_error("k_cache", "float16", "dtype of q", k_cache=t(2, 8, 2, 16, dtype=torch.float16)),
        type_error("rotary_interleaved", "'yes'", "a bool", rotary_interleaved="yes"),
        type_error("only_qv", "None", "a bool", only_qv=None),
        *(
            bad(
                name,
                "requires grad",
                "no gradient",
                UnsupportedError,
                **{name: CALLS["flash_attn_with_kvcache"][name].but(grad=True)},
            )
            for name in ("q", "k_cache", "v_cache")
        ),
        bad("s_aux", "requires grad", "no gradient", UnsupportedError, s_aux=f32(4, grad=True)),
    ],
)

TREE = on(
    "flash_attn_with_kvcache",
    [
        type_error("tree_mask", "list", "torch.Tensor", tree_mask=[[[1], [3], [5]]] * 2),
        *(
            type_error(
                "tree_mask", str(dtype), "dtype int32. Pack 32 draft tokens", tree_mask=i32(2, 3, 1).but(dtype=dtype)
            )
            for dtype in (INT64, torch.bool, torch.uint8, torch.float32)
        ),
        bad("tree_mask", "(2, 3)", "(b=2, s_q=3, ceil(s_q / 32)=1)", tree_mask=i32(2, 3)),
        bad("tree_mask", "(2, 3, 3)", "(b=2, s_q=3, ceil(s_q / 32)=1)", tree_mask=i32(2, 3, 3)),
        bad("tree_mask", "(1, 3, 1)", "b=2", tree_mask=i32(1, 3, 1)),
        bad("tree_mask", "(2, 4, 1)", "s_q=3", tree_mask=i32(2, 4, 1)),
        bad("tree_mask", "(2, 33, 1)", "ceil(s_q / 32)=2", tree_mask=i32(2, 33, 1), q=t(2, 33, 4, 16)),
        bad(
            "tree_mask",
            "(2, 33, 1)",
            "(b=2, s_q, ceil(s_q / 32)=2)",
            tree_mask=i32(2, 33, 1),
            q=t(9, 4, 16),
            cu_seqlens_q=i32(3),
        ),
        bad("tree_mask", "()", "(b=2, s_q, ceil(s_q / 32))", tree_mask=i32(), q=t(9, 4, 16), cu_seqlens_q=i32(3)),
        bad(
            "tree_mask",
            "a tensor",
            "None with context parallelism",
            UnsupportedError,
            tree_mask=i32(2, 3, 1),
            cp_world_size=2,
            cp_tot_seqused_k=i32(2),
        ),
    ],
)

APPEND = on(
    "flash_attn_with_kvcache",
    [
        bad("v", "None", "both k and v", v=None),
        bad("k", "None", "both k and v", k=None),
        bad("cache_seqlens", "None", "number of valid slots", cache_seqlens=None),
        bad("cache_seqlens", "6 + 3 new", "at most 8", cache_seqlens=6),
        type_error("k", "list", "torch.Tensor", k=[1.0]),
        type_error("v", "int", "torch.Tensor", v=1),
        bad("k", "()", "(b, s_new, h_kv, d)", k=t()),
        bad("k", "(6, 2, 16)", "cu_seqlens_k_new", k=t(6, 2, 16), v=t(6, 2, 16)),
        bad("k", "(3, 3, 2, 16)", "b=2", k=t(3, 3, 2, 16), v=t(3, 3, 2, 16)),
        bad("k", "(2, 3, 4, 16)", "h_kv=2", k=t(2, 3, 4, 16)),
        bad("k", "(2, 3, 2, 24)", "d=16", k=t(2, 3, 2, 24)),
        bad("v", "(2, 4, 2, 16)", "s_new=3", v=t(2, 4, 2, 16)),
        bad("v", "(2, 3, 2, 24)", "dv=16", v=t(2, 3, 2, 24)),
        type_error("k", "float16", "bfloat16", k=t(2, 3, 2, 16, dtype=torch.float16)),
        type_error("k", "float8_e4m3fn", "bfloat16", k=fp8(2, 3, 2, 16)),
        type_error("v", "float32", "bfloat16", v=f32(2, 3, 2, 16)),
        bad("k", "(2, 3, 2, 16)", "(t_new, h_kv, d)", cu_seqlens_k_new=i32(3)),
        bad("cu_seqlens_k_new", "(2,)", "b + 1=3", k=t(6, 2, 16), v=t(6, 2, 16), cu_seqlens_k_new=i32(2)),
        type_error("cu_seqlens_k_new", "list", "Tensor", k=t(6, 2, 16), v=t(6, 2, 16), cu_seqlens_k_new=[0, 3, 6]),
        bad("v", "(5, 2, 16)", "t_new=6", k=t(6, 2, 16), v=t(5, 2, 16), cu_seqlens_k_new=i32(3)),
        bad("k_cache", "strides", "last stride 1", k_cache=t(2, 8, 16, 2, view=lambda x: x.mT)),
        bad("v_cache", "strides", "last stride 1", v_cache=t(2, 8, 2, 32, view=lambda x: x[..., ::2])),
        bad("k_cache", "strides", "without overlap", k_cache=t(1, 8, 2, 16, view=lambda x: x.expand(2, 8, 2, 16))),
        bad("k", "requires grad", "no gradient", UnsupportedError, k=t(2, 3, 2, 16, grad=True)),
        type_error("return_softmax_lse", "'yes'", "a bool", return_softmax_lse="yes"),
        type_error("return_max_logits", "'yes'", "a bool", return_max_logits="yes"),
        bad("backend", "'numpy'", "hopper", backend="numpy"),
        bad("out", "(2, 3, 2, 16)", "h=4", out=t(2, 3, 2, 16)),
    ],
    new,
)

ROTARY = on(
    "flash_attn_with_kvcache",
    [
        bad("rotary_sin", "None", "both rotary_cos and rotary_sin", rotary_sin=None),
        bad("rotary_cos", "None", "both rotary_cos and rotary_sin", rotary_cos=None),
        bad("rotary_cos", "()", "s_ro", rotary_cos=f32()),
        bad("rotary_cos", "(32,)", "s_ro", rotary_cos=f32(32)),
        bad("rotary_sin", "(16, 8)", "s_ro=32", rotary_sin=f32(16, 8)),
        bad("rotary_sin", "(32, 4)", "rotary_dim / 2=8", rotary_sin=f32(32, 4)),
        bad("rotary_cos", "(32, 16)", "rotary_dim <= d = 16", rotary_cos=f32(32, 16), rotary_sin=f32(32, 16)),
        bad("rotary_cos", "(32, 0)", "0 < rotary_dim", rotary_cos=f32(32, 0), rotary_sin=f32(32, 0)),
        bad("rotary_cos", "(0, 8)", "s_ro >= 1", rotary_cos=f32(0, 8), rotary_sin=f32(0, 8)),
        type_error("rotary_cos", "float16", "bfloat16, float32", rotary_cos=t(32, 8, dtype=torch.float16)),
        type_error("rotary_sin", "bfloat16", "dtype of rotary_cos", rotary_sin=t(32, 8)),
        type_error("rotary_cos", "list", "torch.Tensor", rotary_cos=[1.0]),
        bad("rotary_cos", "requires grad", "no gradient", UnsupportedError, rotary_cos=f32(32, 8, grad=True)),
        bad("rotary_seqlens", "(3,)", "b=2", rotary_seqlens=i32(3)),
        type_error("rotary_seqlens", "int64", "int32", rotary_seqlens=i32(2).but(dtype=INT64)),
        bad("rotary_cos", "without k", "None, or k and v", k=None, v=None),
        bad("rotary_seqlens", "without rotary_cos", "tables", rotary_cos=None, rotary_sin=None, rotary_seqlens=i32(2)),
    ],
    new | rotary,
)

ONLY_QV = on(
    "flash_attn_with_kvcache",
    [
        type_error("qv", "NoneType", "torch.Tensor", qv=None),
        bad("v_cache", "(2, 8, 2, 256)", "qv of shape (2, 3, 4, 128)", qv=t(2, 3, 4, 128)),
        bad("only_qv", "True", "k and v None", UnsupportedError, k=t(2, 3, 2, 16), v=t(2, 3, 2, 256)),
        bad("qv", "dv = 128", "256 <= dv <= 512", qv=t(2, 3, 4, 128), v_cache=t(2, 8, 2, 128)),
        bad("qv", "float8_e4m3fn", "float16, bfloat16", qv=fp8(2, 3, 4, 256), v_cache=fp8(2, 8, 2, 256)),
        bad("qv", "requires grad", "no gradient", UnsupportedError, qv=t(2, 3, 4, 256, grad=True)),
        bad("out", "(2, 3, 4, 16)", "dv=256", out=t(2, 3, 4, 16)),
    ],
    dict(only_qv=True, q=None, k_cache=None, qv=t(2, 3, 4, 256), v_cache=t(2, 8, 2, 256)),
)

FORWARD = on(
    "_flash_attn_forward",
    [
        bad("window_size_left", "-2", "integer", window_size_left=-2),
        type_error("window_size_right", "1.0", "integer", window_size_right=1.0),
        bad("window_size", "(1, 1)", "one of window_size", window_size=(1, 1), window_size_left=2),
        bad("rotary_cos", "without k", "None", **rotary),
        bad("seqlens_rotary", "without k", "None", seqlens_rotary=i32(2)),
        bad("out_", "(2, 5, 4, 8)", "dv=16", out_=t(2, 5, 4, 8)),
        bad("v_new", "None", "both k and v", k_new=t(2, 1, 2, 16)),
        bad("k_new", "(2, 1, 2, 8)", "d=16", k_new=t(2, 1, 2, 8), v_new=t(2, 1, 2, 16), seqused_k=i32(2)),
        bad("seqused_k", "None", "number of valid slots", k_new=t(2, 1, 2, 16), v_new=t(2, 1, 2, 16)),
        bad("kv_batch_idx", "(3,)", "b=2", kv_batch_idx=i32(3)),
        bad(
            "leftpad_k", "requires grad", "no gradient", UnsupportedError, leftpad_k=i32(2), q=t(2, 5, 4, 16, grad=True)
        ),
        bad("kv_batch_idx", "cu_seqlens_k", "one of the two", kv_batch_idx=i32(2), **packed_keys),
        bad(
            "cu_seqlens_k",
            "new keys",
            "None",
            k_new=t(2, 1, 2, 16),
            v_new=t(2, 1, 2, 16),
            seqused_k=i32(2),
            **packed_keys,
        ),
    ],
)

BACKWARD = on(
    "_flash_attn_backward",
    [
        *(type_error(name, "NoneType", "torch.Tensor", **{name: None}) for name in ("dout", "out", "softmax_lse")),
        bad("dout", "(2, 4, 5, 16)", "s=5", dout=t(2, 4, 5, 16)),
        bad("out", "(2, 5, 4, 8)", "d=16", out=t(2, 5, 4, 8)),
        bad("softmax_lse", "(2, 5, 4)", "h=4", softmax_lse=f32(2, 5, 4)),
        type_error("softmax_lse", "bfloat16", "float32", softmax_lse=t(2, 4, 5)),
        bad("dlse", "(2, 4, 6)", "s=5", dlse=f32(2, 4, 6)),
        bad("dq", "(2, 5, 2, 16)", "q of shape (2, 5, 4, 16)", dq=t(2, 5, 2, 16)),
        bad("dk", "(2, 7, 4, 16)", "k of shape", dk=t(2, 7, 4, 16)),
        type_error("dv", "float16", "", dv=t(2, 7, 2, 16, dtype=torch.float16)),
        bad("dk", "strides", "last stride 1", dk=t(2, 7, 16, 2, view=lambda x: x.mT)),
        bad("dv", "strides", "without overlap", dv=t(1, 7, 2, 16, view=lambda x: x.expand(2, 7, 2, 16))),
        bad("s_aux", "None", "the sink (h,)", dsink=f32(4)),
        type_error("dsink", "bfloat16", "float32", s_aux=f32(4), dsink=t(4)),
        type_error("is_causal", "'yes'", "a bool", is_causal="yes"),
        type_error("sequed_q", "list", "torch.Tensor", sequed_q=[1, 2]),
        bad("sequed_k", "(3,)", "b=2", sequed_k=i32(3)),
        bad(
            "k",
            "float8_e4m3fn",
            "e4m3 has no backward",
            UnsupportedError,
            **{name: fp8(*x.shape) for name, x in CALLS["_flash_attn_backward"].items() if name in "qkv"},
        ),
    ],
)

MERGE = [
    *on(
        "flash_attn_combine",
        [
            type_error("out_partial", "bfloat16", "float32", out_partial=t(3, 2, 5, 4, 16)),
            bad("out_partial", "(2, 5, 4, 16)", "(S, b, s, h, d)", out_partial=f32(2, 5, 4, 16)),
            *(
                bad(
                    "out_partial",
                    f"({n}, 2, 5, 4, 8)",
                    "1 <= S <= 256",
                    out_partial=f32(n, 2, 5, 4, 8),
                    lse_partial=f32(n, 2, 5, 4),
                )
                for n in (0, 257)
            ),
            bad("lse_partial", "(3, 2, 4, 5)", "s=5", lse_partial=f32(3, 2, 4, 5)),
            type_error("lse_partial", "NoneType", "torch.Tensor", lse_partial=None),
            type_error("lse_partial", "float64", "float32", lse_partial=f32(3, 2, 5, 4).but(dtype=torch.float64)),
            type_error("out_dtype", "float64", "float16", out_dtype=torch.float64),
            type_error("out_dtype", "bf16", "float16", out_dtype="bf16"),
            type_error("out", "float16", "bfloat16", out=t(2, 5, 4, 16, dtype=torch.float16), out_dtype=torch.bfloat16),
            bad("out", "(5, 4, 16)", "shape", out=f32(5, 4, 16)),
            bad("out", "strides", "without overlap", out=f32(1, 5, 4, 16, view=lambda x: x.expand(2, 5, 4, 16))),
            bad("out", "requires grad", "no out=", out=f32(2, 5, 4, 16, grad=True)),
            bad(
                "lse_partial", "requires grad", "no gradient", UnsupportedError, lse_partial=f32(3, 2, 5, 4, grad=True)
            ),
            bad("backend", "'gpu'", "hopper, triton, cpu", backend="gpu"),
            bad("backend", "'hopper'", "a backend that serves", UnsupportedError, backend="hopper"),
        ],
    ),
    *on(
        "merge_state",
        [
            type_error("out_a", "float64", "float32, float16, bfloat16", out_a=t(2, 5, 4, 16, dtype=torch.float64)),
            bad("out_a", "(4, 16)", "(..., s, h, d)", out_a=t(4, 16)),
            bad("out_b", "(2, 5, 2, 16)", "out_a of shape (2, 5, 4, 16)", out_b=t(2, 5, 2, 16)),
            bad("lse_a", "(2, 5, 4)", "layout hs", lse_a=f32(2, 5, 4)),
            bad("lse_a", "(2, 4, 5)", "layout sh", lse_layout="sh"),
            type_error("lse_b", "bfloat16", "float32", lse_b=t(2, 4, 5)),
            bad("lse_layout", "'bhs'", "'hs' or 'sh'", lse_layout="bhs"),
            bad("out", "(2, 5, 4, 8)", "size=16", out=t(2, 5, 4, 8)),
            bad("lse_out", "(2, 5, 4)", "size=4", lse_out=f32(2, 5, 4)),
            type_error("lse_out", "bfloat16", "float32", lse_out=t(2, 4, 5)),
            bad("out", "requires grad", "no out=", out=t(2, 5, 4, 16), lse_a=f32(2, 4, 5, grad=True)),
            bad("out", "requires grad", "no out=", out=t(2, 5, 4, 16, grad=True)),
        ],
    ),
]

METADATA = on(
    "get_scheduler_metadata",
    [
        bad("batch_size", "-1", "integer", batch_size=-1),
        type_error("batch_size", "2.0", "integer", batch_size=2.0),
        bad("cache_seqlens", "(2,)", "b=3", batch_size=3),
        type_error("cache_seqlens", "int64", "int32", cache_seqlens=i32(2).but(dtype=INT64)),
        type_error("cache_seqlens", "int", "torch.Tensor", cache_seqlens=7),
        bad("num_heads_q", "5", "num_heads_kv = 2", num_heads_q=5),
        bad("num_heads_q", "4", ">= 1", num_heads_kv=0),
        *(bad("headdim", str(d), "", headdim=d) for d in (0, 12, 520)),
        bad("headdim", "72", "multiple of 16", headdim=72, qkv_dtype=torch.float8_e4m3fn),
        type_error("qkv_dtype", "int32", "bfloat16", qkv_dtype=torch.int32),
        bad("page_size", "0", "integer", page_size=0),
        bad("num_splits", "257", "[0, 256]", num_splits=257),
        bad("window_size", "-2", "integer", window_size=(-2, 0)),
        type_error("attention_chunk", "''", "integer", attention_chunk=""),
        type_error("causal", "None", "a bool", causal=None),
        type_error("has_softcap", "30.0", "a bool", has_softcap=30.0),
        bad("cu_seqlens_q", "(2,)", "(3=3,)", cu_seqlens_q=i32(2)),
        bad("cache_leftpad", "(3,)", "2", cache_leftpad=i32(3)),
        bad("backend", "'x'", "hopper", backend="x"),
    ],
)


@pytest.mark.parametrize("row", LENGTHS + TREE + APPEND + ROTARY + ONLY_QV, ids=lambda row: row.id)
def test_kvcache(row: Bad) -> None:
    check(row)


@pytest.mark.parametrize("row", FORWARD + BACKWARD, ids=lambda row: row.id)
def test_lower_level_functions(row: Bad) -> None:
    check(row)


@pytest.mark.parametrize("row", MERGE + METADATA, ids=lambda row: row.id)
def test_merge_and_metadata(row: Bad) -> None:
    check(row)
