# SPDX-License-Identifier: BSD-3-Clause
"""Every rule on the arguments of the attention functions: what breaks it is refused by name, and nothing changes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from refusals import CALLS, KINDS, Bad, bad, check, dense, f32, fp8, function, i32, make, on, t, type_error, wherever
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_attn3 import UnsupportedError

NAN, INF = math.nan, math.inf
HALVES = "float16, bfloat16"


def sparse(x: torch.Tensor) -> torch.Tensor:
    where = torch.zeros(x.ndim, 0, dtype=torch.int64, device=x.device)
    return torch.sparse_coo_tensor(where, x.new_zeros(0), x.shape)


SCALARS = wherever(
    [
        *(bad("softmax_scale", str(x), "finite number >= 0", softmax_scale=x) for x in (-1.0, NAN, INF, 1e39, -1e-3)),
        bad("softmax_scale", "inf", "finite number >= 0", softmax_scale=10**400),
        type_error("softmax_scale", "'1'", "finite number", softmax_scale="1"),
        type_error("softmax_scale", "True", "finite number", softmax_scale=True),
        type_error("softmax_scale", "1j", "finite number", softmax_scale=1j),
        type_error("softmax_scale", "a torch.float32 tensor", "finite number", softmax_scale=f32()),
        type_error("softmax_scale", "[1.0]", "finite number", softmax_scale=[1.0]),
        *(bad("softcap", str(x), "finite number >= 0", softcap=x) for x in (-1.0, NAN, INF)),
        type_error("softcap", "None", "finite number", softcap=None),
        *(type_error("causal", repr(x), "a bool", causal=x) for x in (None, "yes", 1.0, [True])),
        *(bad("causal", repr(x), "a bool, 0 or 1", causal=x) for x in (2, -1)),
        type_error("causal", "tensor", "a bool", causal=t()),
        type_error("causal", "array", "a bool", causal=np.array([0, 1])),
        *(bad("window_size", repr(x), "a pair (left, right)", window_size=x) for x in ((), (1,), (1, 2, 3), [4])),
        *(type_error("window_size", repr(x), "a pair (left, right)", window_size=x) for x in (5, "ab", {1, 2})),
        type_error("window_size", "", "a pair (left, right)", window_size=i32(2)),
        *(bad("window_size", "-2", "integer", window_size=x) for x in ((-2, 0), (0, -2), [3, -2])),
        *(type_error("window_size", "1.0", "integer", window_size=x) for x in ((1.0, 0), (0, 1.0))),
        type_error("window_size", "True", "integer", window_size=(True, 0)),
        bad("attention_chunk", "-1", "integer", attention_chunk=-1),
        bad("attention_chunk", str(2**70), "integer", attention_chunk=2**70),
        type_error("attention_chunk", "4.0", "integer", attention_chunk=4.0),
        *(bad("num_splits", str(x), "[0, 256]", num_splits=x) for x in (-1, 257, 2**70)),
        *(type_error("num_splits", repr(x), "[0, 256]", num_splits=x) for x in (1.0, True, None, "2")),
        type_error("num_splits", "tensor", "[0, 256]", num_splits=i32()),
        type_error("num_splits", "array", "[0, 256]", num_splits=np.array([1, 2])),
        bad("pack_gqa", "3", "a bool", pack_gqa=3),
        type_error("pack_gqa", "'auto'", "a bool", pack_gqa="auto"),
        bad("sm_margin", "-1", "integer", sm_margin=-1),
        bad("sm_margin", str(2**70), "integer", sm_margin=2**70),
        type_error("sm_margin", "0.5", "integer", sm_margin=0.5),
        type_error("deterministic", "None", "a bool", deterministic=None),
        type_error("batch_invariant", "'1'", "a bool", batch_invariant="1"),
        *(
            type_error(name, "'no'", "a bool", **{name: "no"})
            for name in ("return_attn_probs", "return_softmax_lse", "return_max_logits")
        ),
        bad("backend", "'reference'", "hopper, triton, cpu", backend="reference"),
        bad("backend", "'cuda'", "hopper, triton, cpu", backend="cuda"),
        bad("backend", "'hopper'", "a backend that serves", UnsupportedError, backend="hopper"),
        *(bad("max_seqlen_q", str(x), "integer", max_seqlen_q=x) for x in (-1, 2**70)),
        *(type_error("max_seqlen_q", str(x), "integer", max_seqlen_q=x) for x in (5.0, "5")),
        type_error("max_seqlen_q", "(2,)", "0-dim integer tensor", max_seqlen_q=i32(2)),
        type_error("max_seqlen_k", "float32", "0-dim integer tensor", max_seqlen_k=f32()),
    ]
)

TENSORS = [
    *(
        row
        for name in ("q", "k", "v")
        for row in on(
            "flash_attn_func",
            [
                type_error(name, "NoneType", "torch.Tensor", **{name: None}),
                type_error(name, "ndarray", "torch.Tensor", **{name: np.ones((2, 5, 4, 16))}),
                type_error(name, "list", "torch.Tensor", **{name: [1.0]}),
                type_error(name, "sparse", "dense", **{name: t(2, 5, 4, 16, view=sparse)}),
                *(
                    type_error(name, str(dtype), HALVES, **{name: dense[name].but(dtype=dtype)})
                    for dtype in (torch.float64, torch.float8_e5m2, torch.int32, torch.bool, torch.complex64)
                ),
            ],
        )
    ),
    *on(
        "flash_attn_func",
        [
            type_error("k", "torch.float16", "torch.bfloat16", k=t(2, 7, 2, 16, dtype=torch.float16)),
            type_error("v", "torch.float16", "torch.bfloat16", v=t(2, 7, 2, 16, dtype=torch.float16)),
            type_error("k", "torch.float32", "torch.bfloat16", k=f32(2, 7, 2, 16)),
            type_error("k", "torch.bfloat16", "float8_e4m3fn", q=fp8(2, 5, 4, 16)),
            type_error("k", "float8_e4m3fn", "float32", q=f32(2, 5, 4, 16), k=fp8(2, 7, 2, 16), v=fp8(2, 7, 2, 16)),
            type_error("v", "torch.bfloat16", "float8_e4m3fn", k=fp8(2, 7, 2, 16)),
            bad("q", "(5, 4, 16)", "(b, s_q, h, d)", q=t(5, 4, 16)),
            bad("q", "()", "(b, s_q, h, d)", q=t()),
            bad("k", "(7, 2, 16)", "(b, s_k, h_kv, d=16)", k=t(7, 2, 16)),
            bad("k", "(2, 7, 2, 24)", "q of shape (2, 5, 4, 16)", k=t(2, 7, 2, 24)),
            bad("k", "(3, 7, 2, 16)", "batch 2", k=t(3, 7, 2, 16), v=t(3, 7, 2, 16)),
            bad("k", "(1, 7, 2, 16)", "batch 2", k=t(1, 7, 2, 16), v=t(1, 7, 2, 16)),
            bad("v", "(2, 8, 2, 16)", "k of shape (2, 7, 2, 16)", v=t(2, 8, 2, 16)),
            bad("v", "(2, 7, 4, 16)", "k of shape (2, 7, 2, 16)", v=t(2, 7, 4, 16)),
            bad("v", "(1, 7, 2, 16)", "k of shape (2, 7, 2, 16)", v=t(1, 7, 2, 16)),
            bad("v", "(2, 7, 2, 16, 1)", "dv", v=t(2, 7, 2, 16, 1)),
            bad(
                "q", "5 heads", "multiple of the h_kv = 7", q=t(2, 4, 5, 16), k=t(2, 4, 7, 16), v=t(2, 4, 7, 16)
            ),  # (b, h, s, d)
            bad("q", "4 heads", "h_kv = 3", k=t(2, 7, 3, 16), v=t(2, 7, 3, 16)),
            bad("q", "4 heads", "h_kv >= 1", k=t(2, 7, 0, 16), v=t(2, 7, 0, 16)),
        ],
    ),
]


def head_dims(d: int, dv: int, dtype: torch.dtype = torch.bfloat16) -> dict:
    return dict(q=t(2, 5, 4, d, dtype=dtype), k=t(2, 7, 2, d, dtype=dtype), v=t(2, 7, 2, dv, dtype=dtype))


E4M3 = torch.float8_e4m3fn
HEAD_DIMS = on(
    "flash_attn_func",
    [
        *(bad("q", f"d = {d}", "a positive multiple of 8", **head_dims(d, 16)) for d in (0, 4, 12, 17)),
        *(bad("v", f"dv = {dv}", "a positive multiple of 8", **head_dims(16, dv)) for dv in (0, 4, 20)),
        bad("q", "d = 24", "a positive multiple of 16", **head_dims(24, 24, E4M3)),
        bad("v", "dv = 40", "a positive multiple of 16", **head_dims(32, 40, E4M3)),
        *(
            bad("v", f"({d}, {dv})", "d == dv <= 256, or 128 < d <= 192 with 96 < dv <= 128", **head_dims(d, dv))
            for d, dv in ((264, 264), (128, 64), (192, 96), (192, 136), (64, 520), (72, 256), (200, 128))
        ),
        bad("v", "(64, 512) of torch.float8_e4m3fn", "fp16, bf16", **head_dims(64, 512, E4M3)),
    ],
)

fp8_dense = dict(q=fp8(2, 5, 4, 16), k=fp8(2, 7, 2, 16), v=fp8(2, 7, 2, 16))
with_qv = dict(q=t(2, 5, 4, 64), k=t(2, 7, 2, 64), v=t(2, 7, 2, 256), qv=t(2, 5, 4, 256))
OPTIONAL_TENSORS = [
    *on(
        "flash_attn_func",
        [
            *(bad("s_aux", str(shape), "h=4", s_aux=f32(*shape)) for shape in ((2,), (1,), (4, 1), (2, 4), (), (0,))),
            type_error("s_aux", "float64", "float32, float16, bfloat16", s_aux=t(4, dtype=torch.float64)),
            type_error("s_aux", "float", "torch.Tensor", s_aux=1.0),
            type_error("s_aux", "list", "torch.Tensor", s_aux=[0.0] * 4),
            *(bad(name, "a tensor", "None, for", **{name: f32(2, 2)}) for name in ("q_descale", "k_descale")),
            bad("v_descale", "a tensor", "torch.bfloat16 and not float8_e4m3fn", v_descale=f32(2, 2)),
        ],
    ),
    *on(
        "flash_attn_func",
        [
            *(
                bad(name, str(shape), "(b=2, h_kv=2)", **{name: f32(*shape)})
                for name in ("q_descale", "k_descale", "v_descale")
                for shape in ((2, 4), (1, 2), (2,), (), (2, 1), (2, 2, 1, 1))
            ),
            bad("q_descale", "(2, 2, 1)", "heads=4", q_descale=f32(2, 2, 1)),
            bad("k_descale", "(2, 4, 1)", "heads=2", k_descale=f32(2, 4, 1)),
            bad("q_descale", "(2, 4, 0)", "1 blocks of 128", q_descale=f32(2, 4, 0)),
            bad(
                "k_descale", "(2, 2, 1)", "2 blocks", k_descale=f32(2, 2, 1), k=fp8(2, 129, 2, 16), v=fp8(2, 129, 2, 16)
            ),
            type_error("k_descale", "torch.bfloat16", "dtype float32", k_descale=t(2, 2)),
            type_error("k_descale", "float", "torch.Tensor", k_descale=1.0),
            bad("v_descale", "requires grad", "no gradient", UnsupportedError, v_descale=f32(2, 2, grad=True)),
        ],
        fp8_dense,
    ),
    *on(
        "flash_attn_func",
        [
            bad("qv", "(2, 5, 4, 264)", "dv=256", qv=t(2, 5, 4, 264)),
            bad("qv", "(2, 5, 2, 256)", "h=4", qv=t(2, 5, 2, 256)),
            bad("qv", "(2, 5, 256)", "dv=256", qv=t(2, 5, 256)),
            bad("qv", "()", "dv=256", qv=t()),
            type_error("qv", "float16", "one 16-bit dtype", qv=t(2, 5, 4, 256, dtype=torch.float16)),
            type_error("qv", "float32", HALVES, qv=f32(2, 5, 4, 256)),
            type_error("qv", "float8_e4m3fn", "", k=fp8(2, 7, 2, 64), v=fp8(2, 7, 2, 256)),
            bad("qv", "(64, 128)", "256 <= dv <= 512", v=t(2, 7, 2, 128), qv=t(2, 5, 4, 128)),
            bad("qv", "(256, 256)", "d <= 64", q=t(2, 5, 4, 256), k=t(2, 7, 2, 256)),
            bad("qv", "requires grad", "no gradient", UnsupportedError, qv=t(2, 5, 4, 256, grad=True)),
            bad("qv", "requires grad", "no gradient", UnsupportedError, q=t(2, 5, 4, 64, grad=True)),
        ],
        with_qv,
    ),
]

OUT = on(
    "flash_attn_func",
    [
        bad("out", "(2, 5, 4, 24)", "dv=16", out=t(2, 5, 4, 24)),
        bad("out", "(10, 4, 16)", "b=2", out=t(10, 4, 16)),
        bad("out", "()", "b=2", out=t()),
        type_error("out", "float16", "bfloat16, float32", out=t(2, 5, 4, 16, dtype=torch.float16)),
        type_error("out", "float64", "bfloat16, float32", out=t(2, 5, 4, 16, dtype=torch.float64)),
        type_error("out", "bool", "torch.Tensor", out=True),
        bad("out", "strides", "last stride 1", out=t(2, 5, 16, 4, view=lambda x: x.transpose(2, 3))),
        bad("out", "strides", "without overlap", out=t(1, 5, 4, 16, view=lambda x: x.expand(2, 5, 4, 16))),
        bad(
            "out", "strides", "without overlap", out=t(400, view=lambda x: x.as_strided((2, 5, 4, 16), (64, 16, 16, 1)))
        ),
        bad("out", "requires grad", "no out=", out=t(2, 5, 4, 16, grad=True)),
        bad("out", "requires grad", "no out=", out=t(2, 5, 4, 16), q=t(2, 5, 4, 16, grad=True)),
        bad("out", "requires grad", "no out=", out=t(2, 5, 4, 16), s_aux=f32(4, grad=True)),
    ],
)

VARLEN = on(
    "flash_attn_varlen_func",
    [
        *(
            type_error(
                name,
                "torch.int64",
                "dtype int32. Convert with .to(torch.int32)",
                **{name: i32(n).but(dtype=torch.int64)},
            )
            for name, n in (("cu_seqlens_q", 3), ("cu_seqlens_k", 3), ("seqused_q", 2), ("seqused_k", 2))
        ),
        *(
            type_error(name, "list", "torch.Tensor", **{name: [0, 3, 9]})
            for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "scheduler_metadata", "cp_tot_seqused_k")
        ),
        type_error("seqused_k", "[3, 3]", "an integer or an int32 tensor (b,)", seqused_k=[3, 3]),
        type_error("page_table", "list", "torch.Tensor", page_table=[[0], [1]], seqused_k=i32(2)),
        *(bad(name, "(0,)", "at least one element", **{name: i32(0)}) for name in ("cu_seqlens_q", "cu_seqlens_k")),
        *(bad(name, "(3, 1)", "(b + 1,)", **{name: i32(3, 1)}) for name in ("cu_seqlens_q", "cu_seqlens_k")),
        bad("cu_seqlens_k", "(4,)", "b + 1=3", cu_seqlens_k=i32(4)),
        bad("cu_seqlens_q", "()", "(b + 1,)", cu_seqlens_q=i32()),
        *(bad(name, "(3,)", "b=2", **{name: i32(3)}) for name in ("seqused_q", "seqused_k")),
        bad("seqused_k", "()", "b=2", seqused_k=i32()),
        bad("q", "(9, 4, 16)", "(b, s_q, h, d)", cu_seqlens_q=None),
        bad("q", "(2, 5, 4, 16)", "(t_q, h, d)", q=t(2, 5, 4, 16)),
        bad("k", "(2, 7, 2, 16)", "(t_k, h_kv, d=16)", k=t(2, 7, 2, 16), v=t(2, 7, 2, 16)),
        bad("k", "(3, 7, 2, 16)", "batch 2", cu_seqlens_k=None, k=t(3, 7, 2, 16), v=t(3, 7, 2, 16)),
        bad("v", "(12, 2, 16)", "t_k=11", v=t(12, 2, 16)),
        bad("s_aux", "(2,)", "h=4", s_aux=f32(2)),
        bad("out", "(2, 5, 4, 16)", "t_q=9", out=t(2, 5, 4, 16)),
        bad("scheduler_metadata", "(2, 2)", "(n,)", scheduler_metadata=i32(2, 2)),
        type_error("scheduler_metadata", "int64", "int32", scheduler_metadata=i32(9).but(dtype=torch.int64)),
    ],
) + on(
    "flash_attn_varlen_func",
    [
        bad("seqused_k", "None", "lengths", seqused_k=None),
        bad("cu_seqlens_k", "page_table", "one of the two", cu_seqlens_k=i32(3)),
        bad("page_table", "(3, 2)", "b=2", page_table=i32(3, 2)),
        bad("page_table", "(6,)", "pages", page_table=i32(6)),
        type_error("page_table", "int64", "int32", page_table=i32(2, 3).but(dtype=torch.int64)),
        bad("k", "(6, 0, 2, 16)", "page_size >= 1", k=t(6, 0, 2, 16), v=t(6, 0, 2, 16)),
        bad("k", "(24, 2, 16)", "num_pages, page_size", k=t(24, 2, 16), v=t(24, 2, 16)),
        bad("v", "(6, 8, 2, 16)", "page_size=4", v=t(6, 8, 2, 16)),
        bad("page_table", "requires grad", "no gradient", UnsupportedError, q=t(9, 4, 16, grad=True)),
        bad("page_table", "requires grad", "no gradient", UnsupportedError, s_aux=f32(4, grad=True)),
    ],
    dict(k=t(6, 4, 2, 16), v=t(6, 4, 2, 16), page_table=i32(2, 3), seqused_k=i32(2), cu_seqlens_k=None),
)

CONTEXT_PARALLEL = on(
    "flash_attn_varlen_func",
    [
        bad("cp_world_size", "0", "integer", cp_world_size=0),
        type_error("cp_world_size", "2.0", "integer", cp_world_size=2.0),
        bad("cp_rank", "2", "[0, 1]", cp_rank=2),
        bad("cp_rank", "-1", "[0, 1]", cp_rank=-1),
        bad("cp_rank", "1", "[0, 0]", cp_world_size=1, cp_rank=1),
        bad("cp_tot_seqused_k", "None", "keys over all ranks", cp_tot_seqused_k=None),
        bad("cp_tot_seqused_k", "(3,)", "b=2", cp_tot_seqused_k=i32(3)),
        *(
            bad("cp_world_size", "2", "no window", UnsupportedError, **options)
            for options in (dict(window_size=(3, -1)), dict(window_size=(-1, 0)), dict(attention_chunk=4))
        ),
        bad("cp_world_size", "requires grad", "no gradient", UnsupportedError, k=t(11, 2, 16, grad=True)),
    ],
    dict(cp_world_size=2, cp_tot_seqused_k=i32(2)),
)

PACKED = [
    *on(
        "flash_attn_qkvpacked_func",
        [
            bad("qkv", "(2, 5, 2, 4, 16)", "3=3", qkv=t(2, 5, 2, 4, 16)),
            bad("qkv", "(2, 5, 12, 16)", "(b, s, 3=3, h, d)", qkv=t(2, 5, 12, 16)),
            bad("qkv", "(2, 5, 3, 4, 16)", "h + 2 * h_kv", num_heads_q=4),
            type_error("qkv", "float64", HALVES, qkv=t(2, 5, 3, 4, 16, dtype=torch.float64)),
            type_error("qkv", "NoneType", "torch.Tensor", qkv=None),
            bad("qkv", "d = 12", "multiple of 8", qkv=t(2, 5, 3, 4, 12)),
            bad("qkv", "(264, 264)", "d == dv <= 256", qkv=t(2, 5, 3, 4, 264)),
            bad("s_aux", "(3,)", "h=4", s_aux=f32(3)),
        ],
    ),
    *on(
        "flash_attn_qkvpacked_func",
        [
            *(bad("num_heads_q", str(h), "h + 2 * h_kv = 8", num_heads_q=h) for h in (3, 10)),
            bad("num_heads_q", "-1", "integer", num_heads_q=-1),
            type_error("num_heads_q", "4.0", "integer", num_heads_q=4.0),
            bad("qkv", "8 heads", "h_kv >= 1", num_heads_q=8),
            bad("qkv", "2 heads", "h_kv = 3", num_heads_q=2),
        ],
        dict(qkv=t(2, 5, 8, 16)),
    ),
    *on(
        "flash_attn_kvpacked_func",
        [
            bad("kv", "(2, 7, 3, 2, 16)", "2=2", kv=t(2, 7, 3, 2, 16)),
            bad("kv", "(7, 2, 2, 16)", "(b, s_k, 2=2, h_kv, d)", kv=t(7, 2, 2, 16)),
            bad("kv", "(3, 7, 2, 16)", "batch 2", kv=t(3, 7, 2, 2, 16)),
            bad("kv", "(2, 7, 2, 24)", "d=16", kv=t(2, 7, 2, 2, 24)),
            type_error("kv", "float16", "dtype of q", kv=t(2, 7, 2, 2, 16, dtype=torch.float16)),
            type_error("q", "int", "torch.Tensor", q=1),
            bad("q", "4 heads", "h_kv = 3", kv=t(2, 7, 2, 3, 16)),
        ],
    ),
]


@pytest.mark.parametrize("row", SCALARS, ids=lambda row: row.id)
def test_scalars(row: Bad) -> None:
    check(row)


@pytest.mark.parametrize("row", TENSORS + HEAD_DIMS, ids=lambda row: row.id)
def test_queries_keys_values(row: Bad) -> None:
    check(row)


@pytest.mark.parametrize("row", OPTIONAL_TENSORS + OUT, ids=lambda row: row.id)
def test_optional_tensors(row: Bad) -> None:
    check(row)


@pytest.mark.parametrize("row", VARLEN + CONTEXT_PARALLEL + PACKED, ids=lambda row: row.id)
def test_layouts(row: Bad) -> None:
    check(row)


@pytest.mark.parametrize("fn", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_unchanged_call_is_accepted(fn: str, kind: str) -> None:
    with FakeTensorMode() if kind == "fake" else torch.no_grad():
        function(fn)(**make(CALLS[fn], kind))


@pytest.mark.parametrize("fn", CALLS)
def test_unknown_keyword_is_a_plain_type_error(fn: str) -> None:
    with pytest.raises(TypeError, match=f"{fn}.* got an unexpected keyword argument 'dropout_p'") as caught:
        function(fn)(**make(CALLS[fn], "meta"), dropout_p=0.0)
    assert caught.type is TypeError
