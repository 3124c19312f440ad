# SPDX-License-Identifier: BSD-3-Clause
"""The adapters: parameters in the consumer's order, values of the plain call, and what they refuse."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from paging import cu, int32, paginate, tokens
from torch import Tensor

import flash_attn3
from flash_attn3 import UnsupportedError
from flash_attn3.compat import fa2, raw_ops, sglang, vllm
from flash_attn3.testing import GradCheck, bitwise_equal, make_inputs, values

VLLM_VARLEN = (
    "q k v max_seqlen_q cu_seqlens_q max_seqlen_k cu_seqlens_k seqused_k q_v dropout_p softmax_scale causal "
    "window_size softcap alibi_slopes deterministic return_attn_probs block_table return_softmax_lse out "
    "scheduler_metadata q_descale k_descale v_descale num_splits fa_version s_aux cp_world_size cp_rank "
    "cp_tot_seqused_k"
)
VLLM_METADATA = (
    "batch_size max_seqlen_q max_seqlen_k num_heads_q num_heads_kv headdim cache_seqlens qkv_dtype headdim_v "
    "cu_seqlens_q cu_seqlens_k_new cache_leftpad page_size max_seqlen_k_new causal window_size has_softcap num_splits "
    "pack_gqa sm_margin"
)
SGLANG_KVCACHE = (
    "q k_cache v_cache k v qv rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad page_table "
    "cu_seqlens_q cu_seqlens_k_new max_seqlen_q rotary_seqlens q_descale k_descale v_descale softmax_scale causal "
    "window_size attention_chunk softcap rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin "
    "return_softmax_lse sinks"
)
SGLANG_VARLEN = (
    "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q seqused_k page_table softmax_scale causal qv "
    "q_descale k_descale v_descale window_size attention_chunk softcap num_splits pack_gqa sm_margin "
    "return_softmax_lse sinks"
)
FA2_OPTIONS = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
FA2_LENGTHS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
FA2_SIDES = "window_size_left window_size_right softcap alibi_slopes"
FA2_STATE = "dout q k v out softmax_lse dq dk dv"
ORDER = [
    (vllm.flash_attn_varlen_func, VLLM_VARLEN),
    (vllm.get_scheduler_metadata, VLLM_METADATA),
    (vllm.merge_attn_states, "output prefix_output prefix_lse suffix_output suffix_lse output_lse"),
    (sglang.flash_attn_with_kvcache, SGLANG_KVCACHE),
    (sglang.flash_attn_varlen_func, SGLANG_VARLEN),
    (sglang.get_scheduler_metadata, "batch_size max_seqlen_q max_seqlen_k num_heads num_heads_k"),
    (sglang.merge_state_v2, "v_a s_a v_b s_b v_merged s_merged"),
    (fa2.flash_attn_func, f"q k v {FA2_OPTIONS}"),
    (fa2.flash_attn_kvpacked_func, f"q kv {FA2_OPTIONS}"),
    (fa2.flash_attn_qkvpacked_func, f"qkv {FA2_OPTIONS}"),
    (fa2.flash_attn_varlen_func, f"q k v {FA2_LENGTHS} {FA2_OPTIONS} block_table"),
    (fa2.flash_attn_varlen_kvpacked_func, f"q kv {FA2_LENGTHS} {FA2_OPTIONS}"),
    (fa2.flash_attn_varlen_qkvpacked_func, f"qkv cu_seqlens max_seqlen {FA2_OPTIONS}"),
    (
        fa2.flash_attn_with_kvcache,
        "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad block_table "
        "softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse",
    ),
    (fa2._flash_attn_forward, f"q k v dropout_p softmax_scale causal {FA2_SIDES} return_softmax"),
    (
        fa2._flash_attn_varlen_forward,
        f"q k v {FA2_LENGTHS} dropout_p softmax_scale causal {FA2_SIDES} return_softmax block_table leftpad_k "
        "seqused_k",
    ),
    (fa2._flash_attn_backward, f"{FA2_STATE} dropout_p softmax_scale causal {FA2_SIDES} deterministic rng_state"),
    (
        fa2._flash_attn_varlen_backward,
        f"{FA2_STATE} {FA2_LENGTHS} dropout_p softmax_scale causal {FA2_SIDES} deterministic rng_state",
    ),
]


@pytest.mark.parametrize("function, order", ORDER, ids=lambda x: getattr(x, "__name__", ""))
def test_order_of_parameters(function, order: str) -> None:
    parameters = list(inspect.signature(function).parameters)
    assert parameters[: len(order.split())] == order.split()
    assert inspect.isfunction(function)


REFUSED = [
    (fa2.flash_attn_func, dict(dropout_p=0.1), "dropout_p = 0.1; expected 0"),
    (fa2.flash_attn_func, dict(alibi_slopes=torch.ones(4)), "alibi_slopes = a tensor; expected None"),
    (fa2.flash_attn_varlen_func, dict(dropout_p=0.1), "dropout_p = 0.1; expected 0"),
    (vllm.flash_attn_varlen_func, dict(dropout_p=0.1), "dropout_p = 0.1; expected 0"),
    (vllm.flash_attn_varlen_func, dict(alibi_slopes=torch.ones(4)), "alibi_slopes = a tensor; expected None"),
    (vllm.flash_attn_varlen_func, dict(return_attn_probs=True), "return_attn_probs = True; expected False"),
    (vllm.flash_attn_varlen_func, dict(fa_version=4), "fa_version = 4; expected 2 or 3"),
]


@pytest.mark.parametrize("function, options, message", REFUSED)
def test_refused(function, options: dict, message: str) -> None:
    x = torch.randn(8, 4, 16)
    lengths = dict(cu_seqlens_q=cu([8]), cu_seqlens_k=cu([8]), max_seqlen_q=8, max_seqlen_k=8)
    arguments = (
        dict(q=x, k=x, v=x, **lengths) if "varlen" in function.__name__ else dict(q=x[None], k=x[None], v=x[None])
    )
    with pytest.raises(UnsupportedError, match=message):
        function(**arguments, **options)


def test_scheduler_metadata() -> None:
    sizes, lengths = (3, 1, 300, 4, 2, 64), int32(1, 200, 300)
    expected = flash_attn3.get_scheduler_metadata(*sizes, lengths, causal=True, num_splits=4, has_softcap=True)
    options = dict(causal=True, num_splits=4, has_softcap=True)
    for adapter in (vllm, sglang):
        assert torch.equal(adapter.get_scheduler_metadata(*sizes, lengths, **options), expected)
    metadata = sglang.get_scheduler_metadata(
        batch_size=3, max_seqlen_q=1, max_seqlen_k=300, num_heads=4, num_heads_k=2, headdim=64, cache_seqlens=lengths
    )
    assert metadata.shape == expected.shape


@pytest.mark.parametrize("layout", ["hs", "sh"])
def test_merges_write_where_they_are_told(layout: str) -> None:
    a, b = (values((9, 4, 64), torch.bfloat16, seed=seed) for seed in (1, 2))
    lses = [values((9, 4), torch.float32, seed=seed) for seed in (3, 4)]
    expected, expected_lse = flash_attn3.merge_state(a, lses[0], b, lses[1], lse_layout="sh")
    out, lse = torch.full_like(a, math.nan), torch.full((9, 4), math.nan)
    if layout == "sh":
        merged = sglang.merge_state_v2(a, lses[0], b, lses[1], out, lse)
        assert merged[0] is out and merged[1] is lse
    else:
        vllm.merge_attn_states(out, a, lses[0].T, b, lses[1].T, lse.T)
    assert bitwise_equal(out, expected) and bitwise_equal(lse, expected_lse)


def test_supported_devices() -> None:
    assert sglang.is_fa3_supported("cpu") and vllm.is_fa_version_supported(3, torch.device("cpu"))
    assert vllm.fa_version_unsupported_reason(2, torch.device("cpu")) is None
    assert "not 4" in vllm.fa_version_unsupported_reason(4)
    assert "serves CPU tensors only" in vllm.fa_version_unsupported_reason(3, torch.device("xpu"))
    assert not sglang.is_fa3_supported("xpu")


# FlashAttention-2


def dense(dtype: torch.dtype = torch.bfloat16) -> dict:
    return make_inputs(batch=2, seqlen_q=40, seqlen_k=40, head_dim=64, dtype=dtype)


def test_fa2_functions_and_gradients() -> None:
    case = dense() | dict(causal=True, window_size=(17, 0))
    check = GradCheck(case)
    options = dict(causal=True, window_size=(17, 0), deterministic=True, return_attn_probs=True)
    flat = cu([40, 40])

    def unpacked(case: dict) -> tuple[Tensor, Tensor]:
        out, lse, probs = fa2.flash_attn_func(case["q"], case["k"], case["v"], 0.0, **options)
        assert probs.numel() == 0
        return out, lse

    def kv_packed(case: dict) -> tuple[Tensor, Tensor]:
        return fa2.flash_attn_kvpacked_func(case["q"], torch.stack([case["k"], case["v"]], 2), **options)[:2]

    def varlen(case: dict) -> tuple[Tensor, Tensor]:
        q, k, v = (case[name].flatten(0, 1) for name in "qkv")
        out, lse, _ = fa2.flash_attn_varlen_func(q, k, v, flat, flat, 40, 40, **options)
        return out.unflatten(0, (2, 40)), lse.unflatten(1, (2, 40)).transpose(0, 1)

    def varlen_kv_packed(case: dict) -> tuple[Tensor, Tensor]:
        kv = torch.stack([case["k"], case["v"]], 2).flatten(0, 1)
        out, lse, _ = fa2.flash_attn_varlen_kvpacked_func(case["q"].flatten(0, 1), kv, flat, flat, 40, 40, **options)
        return out.unflatten(0, (2, 40)), lse.unflatten(1, (2, 40)).transpose(0, 1)

    for function in (unpacked, kv_packed, varlen, varlen_kv_packed):
        check.check(function)


def test_fa2_qkv_packed() -> None:
    case = make_inputs(batch=2, seqlen_q=40, seqlen_k=40, num_heads=4, num_heads_kv=4) | dict(causal=True)
    check, flat = GradCheck(case), cu([40, 40])

    def packed(case: dict) -> tuple[Tensor, Tensor]:
        qkv = torch.stack([case["q"], case["k"], case["v"]], 2)
        return fa2.flash_attn_qkvpacked_func(qkv, causal=True, return_attn_probs=True)[:2]

    def varlen(case: dict) -> tuple[Tensor, Tensor]:
        qkv = torch.stack([case["q"], case["k"], case["v"]], 2).flatten(0, 1)
        out, lse, _ = fa2.flash_attn_varlen_qkvpacked_func(qkv, flat, 40, causal=True, return_attn_probs=True)
        return out.unflatten(0, (2, 40)), lse.unflatten(1, (2, 40)).transpose(0, 1)

    check.check(packed)
    check.check(varlen)


def test_fa2_lower_level() -> None:
    case = dense() | dict(causal=True)
    check, q, k, v = GradCheck(case), case["q"], case["k"], case["v"]
    out, lse, dropped, rng = fa2._flash_attn_forward(q, k, v, 0.0, 64**-0.5, True, -1, -1, 0.0, None, False)
    assert dropped.numel() == 0 and rng.shape == (2,)
    check.check_forward(out, lse)
    check.dlse = torch.zeros_like(check.dlse)
    grads = [torch.full_like(x, math.nan) for x in (q, k, v)]
    options = (0.0, 64**-0.5, True, -1, -1, 0.0, None, False)
    fa2._flash_attn_backward(check.dout, q, k, v, out, lse, *grads, *options, rng_state=rng)
    check.check_backward(dict(zip("qkv", grads, strict=True)))

    flat, (fq, fk, fv) = cu([40, 40]), (x.flatten(0, 1) for x in (q, k, v))
    lengths = (flat, flat, 40, 40)
    packed_out, packed_lse, _, _ = fa2._flash_attn_varlen_forward(fq, fk, fv, *lengths, 0.0, 64**-0.5, True)
    check.check_forward(packed_out.unflatten(0, (2, 40)), packed_lse.unflatten(1, (2, 40)).transpose(0, 1))
    packed = [torch.full_like(x, math.nan) for x in (fq, fk, fv)]
    dout = check.dout.flatten(0, 1)
    fa2._flash_attn_varlen_backward(dout, fq, fk, fv, packed_out, packed_lse, *packed, *lengths, *options)
    check.check_backward({name: x.unflatten(0, (2, 40)) for name, x in zip("qkv", packed, strict=True)})


def test_fa2_paged() -> None:
    """FlashAttention-2 takes the lengths of paged sequences from cu_seqlens_k."""
    new, lengths = [1, 20], [65, 300]
    keys, vals = (tokens(lengths, 2, 64, seed=seed) for seed in (1, 2))
    pool = paginate(keys, vals, 16)
    q = values((21, 4, 64), torch.bfloat16, seed=3)
    case = pool.case(q, new, causal=True)
    paged = dict(causal=True, block_table=pool.page_table)
    out, lse, _ = fa2.flash_attn_varlen_func(
        q, pool.k, pool.v, cu(new), cu(lengths), 20, 300, **paged, return_attn_probs=True
    )
    GradCheck(case).check_forward(out, lse)
    decode = dict(cache_seqlens=pool.seqused_k, return_softmax_lse=True, num_splits=1, **paged)
    last = fa2.flash_attn_with_kvcache(q[[0, 20]][:, None], pool.k, pool.v, **decode)[0]
    torch.testing.assert_close(last[:, 0], out[[0, 20]], rtol=2**-7, atol=2**-9)


# torch.ops.flash_attn_3


@pytest.fixture(scope="module")
def raw():
    raw_ops.define()
    return torch.ops.flash_attn_3


def test_raw_ops_are_defined_once(raw) -> None:
    assert not raw_ops.define()
    assert [len(op.default._schema.arguments) for op in (raw.fwd, raw.bwd)] == [34, 22]
    assert [len(op.default._schema.returns) for op in (raw.fwd, raw.bwd)] == [4, 5]


def test_raw_defaults_are_upstreams(raw) -> None:
    defaults = {argument.name: argument.default_value for argument in raw.fwd.default._schema.arguments}
    assert defaults["num_splits"] == 0 and defaults["is_rotary_interleaved"] is False
    keys, vals = (values((2, 32, 2, 64), torch.bfloat16, seed=seed) for seed in (1, 2))
    q, k, v = (values((2, 1, heads, 64), torch.bfloat16, seed=heads) for heads in (4, 2, 3))
    angles = torch.randn(40, 8)
    rotary = (angles.cos(), angles.sin())
    caches = keys.clone(), vals.clone()
    out, lse, *_ = raw.fwd(
        q, *caches, k, v[:, :, :2], seqused_k=int32(5, 20), rotary_cos=rotary[0], rotary_sin=rotary[1], is_causal=True
    )
    expected = flash_attn3.flash_attn_with_kvcache(
        q, keys, vals, k, v[:, :, :2], rotary_cos=rotary[0], rotary_sin=rotary[1], cache_seqlens=int32(5, 20),
        causal=True, rotary_interleaved=False, return_softmax_lse=True,
    )  # fmt: skip
    assert bitwise_equal(out, expected[0]) and bitwise_equal(lse, expected[1])
    assert bitwise_equal(caches[0], keys) and bitwise_equal(caches[1], vals)


def test_raw_combine_and_metadata(raw) -> None:
    parts, lses = torch.randn(3, 2, 5, 4, 16), torch.randn(3, 2, 5, 4)
    out = torch.empty(2, 5, 4, 16)
    combined, lse = raw.fwd_combine(parts, lses, out)
    expected = flash_attn3.flash_attn_combine(parts, lses)
    assert combined.data_ptr() == out.data_ptr()
    assert bitwise_equal(out, expected[0]) and bitwise_equal(lse, expected[1])
    metadata = raw.get_scheduler_metadata(2, 1, 64, 4, 2, 64, 64, torch.bfloat16, int32(3, 64))
    assert torch.equal(metadata, flash_attn3.get_scheduler_metadata(2, 1, 64, 4, 2, 64, int32(3, 64)))
