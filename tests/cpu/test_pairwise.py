# SPDX-License-Identifier: BSD-3-Clause
"""Each pair of values of two features, in as few calls as that takes, forward and backward against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn3 import reference
from flash_attn3.testing import GradCheck, bitwise_equal, call, make_inputs, pairwise, with_append, with_descales

E4M3 = torch.float8_e4m3fn
MASKS = [
    {},
    {"causal": True},
    {"window_size": (30, 0)},
    {"window_size": (17, 25)},
    {"window_size": (-1, 9)},
    {"window_size": (40, 40), "causal": True},
    {"attention_chunk": 32},
    {"attention_chunk": 21, "causal": True},
    {"window_size": (70, 3), "attention_chunk": 64},
]
SCORES = [
    {},
    {"softcap": 5.0},
    {"softmax_scale": 0.25},
    {"softcap": 30.0, "softmax_scale": 0.3},
    {"softmax_scale": 0.0},
]
SIZES = {
    "seqlens": [(1, 1), (33, 65), (128, 128), (257, 130), (31, 513), (130, 1030), (5, 0), (0, 5)],
    "heads": [(4, 4), (4, 2), (6, 1), (3, 3)],
    "head_dims": [(64, 64), (128, 128), (192, 128), (256, 256), (40, 40), (8, 8), (64, 256), (32, 96)],
    "strided": [False, True],
}
AXES = SIZES | {
    "layout": ["dense", "varlen", "padded"],
    "batch": [1, 3],
    "dtype": [torch.bfloat16, torch.float16, torch.float32],
    "distribution": ["normal", "paper", "huge", "constant"],
    "mask": MASKS,
    "scores": SCORES,
    "sink": [False, True],
}
CACHES = [("cache", 0), ("paged", 1), ("paged", 16), ("paged", 24)]
CACHE_AXES = SIZES | {
    "cache": CACHES,
    "dtype": [torch.bfloat16, torch.float16, torch.float32],
    "mask": MASKS,
    "scores": SCORES,
    "sink": [False, True],
    "num_splits": [1, 0, 3],
    "distribution": ["normal", "huge"],
}
FP8_AXES = {
    "seqlens": [(1, 1), (33, 65), (130, 128), (257, 520)],
    "heads": [(4, 4), (4, 2), (6, 1)],
    "head_dims": [(64, 64), (128, 128), (192, 128), (64, 256), (16, 16)],
    "strided": [False, True],
    "layout": [("dense", 0), ("varlen", 0), ("padded", 0), *CACHES],
    "q_dtype": [E4M3, torch.bfloat16, torch.float16],
    "scales": [None, "heads", "blocks"],
    "mask": MASKS,
    "scores": SCORES[:-1],
    "sink": [False, True],
    "num_splits": [1, 3],
}
APPEND_AXES = {
    "seqlens": [(1, 70), (4, 40), (9, 130), (130, 300)],
    "seqlen_new": [1, 4, 9],
    "ragged": [False, True],
    "heads": [(4, 4), (4, 2), (6, 1)],
    "head_dims": [(64, 64), (128, 128), (192, 128), (64, 256)],
    "cache": CACHES,
    "dtype": [torch.bfloat16, torch.float16, torch.float32],
    "kv_dtype": [None, None, E4M3],
    "rotary_dim": [0, 16, 64],
    "interleaved": [True, False],
    "mask": [{}, {"causal": True}, {"window_size": (11, 2)}, {"attention_chunk": 32, "causal": True}],
    "strided": [False, True],
}


def named(choice: dict[str, Any]) -> str:
    return "-".join(str(value).replace(" ", "").replace("torch.", "") for value in choice.values())


def drawn(choice: dict[str, Any], layout: str, **more: Any) -> dict[str, Any]:
    (d, dv), (seqlen_q, seqlen_k), (h, h_kv) = choice["head_dims"], choice["seqlens"], choice["heads"]
    same = {name: choice[name] for name in ("dtype", "batch", "distribution", "sink", "strided") if name in choice}
    sizes = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "num_heads": h, "num_heads_kv": h_kv}
    case = make_inputs(layout, head_dim=d, head_dim_v=dv, **sizes, **same | more)
    return case | choice["mask"] | choice.get("scores", {})


@pytest.mark.parametrize("choice", pairwise(AXES), ids=named)
def test_forward_and_backward(choice: dict[str, Any], backend: str) -> None:
    case = drawn(choice, choice["layout"])
    GradCheck(case, distribution=choice["distribution"]).check(lambda case: call(case, backend=backend))


@pytest.mark.parametrize("choice", pairwise(CACHE_AXES), ids=named)
def test_cache(choice: dict[str, Any], backend: str) -> None:
    layout, page_size = choice["cache"]
    case = drawn(choice, layout, page_size=page_size, batch=3)
    results = call(case, backend=backend, num_splits=choice["num_splits"], return_max_logits=True)
    GradCheck(case, distribution=choice["distribution"]).check_forward(*results)


@pytest.mark.parametrize("choice", pairwise(FP8_AXES), ids=named)
def test_fp8(choice: dict[str, Any], backend: str) -> None:
    layout, page_size = choice["layout"]
    case = drawn(choice, layout, page_size=page_size, dtype=E4M3)
    case["q"] = case["q"].to(choice["q_dtype"])
    if choice["scales"]:
        case = with_descales(case, blocks=choice["scales"] == "blocks")
    GradCheck(case).check_forward(*call(case, backend=backend, num_splits=choice["num_splits"]))


@pytest.mark.parametrize("seqlens", [(1, 1), (17, 130), (3, 600)], ids=str)
@pytest.mark.parametrize("head_dims", [(64, 512), (32, 256)], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (40, 3), "softcap": 7.0}], ids=str)
@pytest.mark.parametrize(
    ("layout", "only_qv"), [("dense", False), ("varlen", False), ("paged", False), ("paged", True)]
)
def test_qv(layout: str, only_qv: bool, head_dims, seqlens, options: dict[str, Any], backend: str) -> None:
    choice = {"head_dims": head_dims, "seqlens": seqlens, "heads": (4, 1), "mask": options, "sink": True}
    case = drawn(choice, layout, qv=True, page_size=16)
    if only_qv:
        case |= {"q": None, "k": None}
    GradCheck(case).check_forward(*call(case, backend=backend))


@pytest.mark.parametrize("choice", pairwise(APPEND_AXES), ids=named)
def test_append(choice: dict[str, Any], backend: str) -> None:
    (layout, page_size), dtype = choice["cache"], choice["dtype"]
    kv_dtype = dtype if choice["kv_dtype"] is None or dtype == torch.float32 else choice["kv_dtype"]
    case = drawn(choice, layout, page_size=page_size, dtype=kv_dtype, batch=3, least_k=choice["seqlen_new"])
    case["q"] = case["q"].to(dtype)
    if kv_dtype == E4M3:
        case = with_descales(case, blocks=True)
    options = {name: choice[name] for name in ("ragged", "rotary_dim", "interleaved")}
    case = with_append(case, choice["seqlen_new"], **options)
    check = GradCheck(case)
    k, v = appended(case)
    check.check_forward(*call(case, backend=backend))
    assert_same_cache(case["k"], k, exact=not choice["rotary_dim"])
    assert_same_cache(case["v"], v, exact=True)


def appended(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The caches as the oracle leaves them."""
    names = ("k", "v", "k_new", "v_new", "seqused_k", "rotary_cos", "rotary_sin")
    indices = {name: case.get(name) for name in ("kv_batch_idx", "page_table", "cu_seqlens_k_new")}
    scales = {name: case.get(name) for name in ("k_descale", "v_descale")}
    interleaved = case.get("rotary_interleaved", True)
    return reference.append(*map(case.get, names), rotary_interleaved=interleaved, **indices, **scales)


def assert_same_cache(cache: Tensor, expected: Tensor, exact: bool) -> None:
    """To the bit, or within one ulp of what was rotated."""
    if exact:
        assert bitwise_equal(cache, expected)
        return
    eps = 2**-3 if cache.dtype == E4M3 else torch.finfo(cache.dtype).eps
    atol = 2**-9 if cache.dtype == E4M3 else 1e-7
    torch.testing.assert_close(cache.double(), expected.double(), rtol=eps, atol=atol, equal_nan=True)
