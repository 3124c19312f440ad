# SPDX-License-Identifier: BSD-3-Clause
"""The signatures, word for word: upstream's parameters first, ours behind `*`; aliases; the number of results."""

from __future__ import annotations

import inspect

import pytest
import torch
from refusals import CALLS, function, i32, make, new, pages, t

import flash_attn3
from flash_attn3 import FlashAttn3ValueError, UnsupportedError, flash_attn_interface

OURS = "return_softmax_lse=False, return_max_logits=False"
END = "batch_invariant=None, backend=None"
SIGNATURES = {
    "flash_attn_func": "q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, "
    "v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, "
    "deterministic=False, sm_margin=0, return_attn_probs=False, *, s_aux=None, out=None, "
    f"{OURS}, {END}",
    "flash_attn_varlen_func": "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, "
    "seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, "
    "window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, "
    "sm_margin=0, return_attn_probs=False, *, page_table=None, s_aux=None, out=None, "
    f"{OURS}, scheduler_metadata=None, cp_world_size=1, cp_rank=0, cp_tot_seqused_k=None, {END}",
    "flash_attn_qkvpacked_func": "qkv, softmax_scale=None, causal=False, q_descale=None, k_descale=None, "
    "v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, deterministic=False, num_heads_q=None, "
    f"sm_margin=0, return_attn_probs=False, *, s_aux=None, {OURS}, {END}",
    "flash_attn_kvpacked_func": "q, kv, softmax_scale=None, causal=False, q_descale=None, k_descale=None, "
    "v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, deterministic=False, sm_margin=0, "
    f"return_attn_probs=False, *, s_aux=None, {OURS}, {END}",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, "
    "cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, "
    "softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
    "scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False, *, s_aux=None, "
    "out=None, return_max_logits=False, only_qv=False, max_seqlen_k=None, cp_world_size=1, cp_rank=0, "
    f"cp_tot_seqused_k=None, tree_mask=None, {END}",
    "flash_attn_combine": "out_partial, lse_partial, out=None, out_dtype=None, *, backend=None",
    "merge_state": "out_a, lse_a, out_b, lse_b, *, out=None, lse_out=None, lse_layout='hs', backend=None",
    "get_scheduler_metadata": "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, "
    "cache_seqlens, qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, "
    "cache_leftpad=None, page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1), attention_chunk=0, "
    f"has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0, *, {END}",
    "_flash_attn_forward": "q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, "
    "cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, "
    "page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, "
    "q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, "
    "window_size_right=-1, attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, "
    "num_splits=1, pack_gqa=None, sm_margin=0, *, window_size=None, s_aux=None, backend=None",
    "_flash_attn_backward": "dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, "
    "sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, "
    "is_causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0, *, "
    "window_size=None, attention_chunk=0, s_aux=None, dsink=None, dlse=None, backend=None",
    "quantize_fp8": "x, *, block=None, heads_per_scale=1, cu_seqlens=None",
    "rotate_fp8": "x, signs",
    "why": "fn, *args, **kwargs",
    "warmup": "fn, *args, **kwargs",
    "check_errors": "device=None",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    signature = inspect.signature(function(name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == f"({SIGNATURES[name]})"
    assert inspect.isfunction(function(name)) and function(name).__doc__


def test_public_names() -> None:
    private = {"_flash_attn_forward", "_flash_attn_backward"}
    errors = {name for name in flash_attn3.__all__ if name.endswith("Error")}
    assert set(flash_attn3.__all__) == (SIGNATURES.keys() - private) | errors | {"__version__"}
    assert all(issubclass(getattr(flash_attn3, name), flash_attn3.FlashAttn3Error) for name in errors)
    assert all(getattr(flash_attn_interface, name) for name in flash_attn_interface.__all__)


def test_error_classes_are_those_that_callers_catch() -> None:
    assert issubclass(flash_attn3.FlashAttn3Error, RuntimeError)
    for error, caught in (
        (FlashAttn3ValueError, ValueError),
        (flash_attn3.FlashAttn3TypeError, TypeError),
        (UnsupportedError, NotImplementedError),
    ):
        assert issubclass(error, (caught, flash_attn3.FlashAttn3Error))


qv = dict(q=t(2, 3, 4, 64), k_cache=t(2, 8, 2, 64), v_cache=t(2, 8, 2, 256))
ALIASES = [
    ("flash_attn_func", "sinks", "s_aux", t(4), {}),
    ("flash_attn_func", "learnable_sink", "s_aux", t(4), {}),
    ("flash_attn_func", "return_lse", "return_softmax_lse", True, {}),
    ("flash_attn_with_kvcache", "block_table", "page_table", i32(2, 3), pages),
    ("flash_attn_with_kvcache", "q_v", "qv", t(2, 3, 4, 256), qv),
    ("_flash_attn_forward", "out", "out_", t(2, 5, 4, 16), {}),
    ("_flash_attn_forward", "sinks", "s_aux", t(4), {}),
    ("_flash_attn_backward", "causal", "is_causal", True, {}),
    ("_flash_attn_backward", "seqused_q", "sequed_q", i32(2), {}),
    ("_flash_attn_backward", "seqused_k", "sequed_k", i32(2), {}),
]


@pytest.mark.parametrize("fn, alias, name, value, extra", ALIASES)
def test_alias(fn: str, alias: str, name: str, value, extra: dict) -> None:
    arguments = CALLS[fn] | extra
    arguments.pop(name, None)
    assert alias not in inspect.signature(function(fn)).parameters
    function(fn)(**make(arguments | {alias: value}, "meta"))
    with pytest.raises(FlashAttn3ValueError, match=f"{fn}: {alias} = given together with {name}; expected"):
        function(fn)(**make(arguments | {alias: value, name: value}, "meta"))


def test_an_alias_of_a_positional_argument_or_of_an_alias() -> None:
    arguments = make(CALLS["flash_attn_func"] | {"qv": None}, "meta")
    with pytest.raises(FlashAttn3ValueError, match="q_v = given together with qv"):
        flash_attn3.flash_attn_func(*[arguments[n] for n in "qkv"], None, False, None, q_v=None)
    with pytest.raises(FlashAttn3ValueError, match="learnable_sink = given together with s_aux"):
        flash_attn3.flash_attn_func(**arguments, sinks=None, learnable_sink=None)


COUNTS = [({}, 1), ({"return_softmax_lse": True}, 2), ({"return_max_logits": True}, 3)]


@pytest.mark.parametrize("fn", [name for name in CALLS if name.endswith(("func", "kvcache"))])
def test_number_of_results(fn: str) -> None:
    for options, count in COUNTS + ([({"return_attn_probs": True}, 2)] if "cache" not in fn else []):
        result = function(fn)(**make(CALLS[fn] | options, "meta"))
        assert isinstance(result, torch.Tensor) if count == 1 else type(result) is tuple and len(result) == count


def test_results_of_the_lower_level_functions() -> None:
    out, lse, *accumulators = function("_flash_attn_forward")(**make(CALLS["_flash_attn_forward"], "cpu"))
    assert out.shape == (2, 5, 4, 16) and lse.shape == (2, 4, 5)
    assert [x.numel() for x in accumulators] == [0, 0]
    appended = dict(k_new=t(2, 1, 2, 16), v_new=t(2, 1, 2, 16), seqused_k=i32(2))
    assert len(function("_flash_attn_forward")(**make(CALLS["_flash_attn_forward"] | appended, "cpu"))) == 4
    softmax_d = function("_flash_attn_backward")(**make(CALLS["_flash_attn_backward"], "cpu"))
    assert softmax_d.shape == (2, 4, 5) and softmax_d.dtype == torch.float32


@pytest.mark.parametrize("fn", ["flash_attn_combine", "merge_state"])
def test_results_of_merging(fn: str) -> None:
    out, lse = function(fn)(**make(CALLS[fn], "meta"))
    assert out.shape == (2, 5, 4, 16) and lse.dtype == torch.float32
    if fn == "flash_attn_combine":
        assert lse.shape == (2, 5, 4) and lse.stride() == (20, 1, 5)  # a view of (b, h, s)


def test_positional_calls_mean_what_they_meant_upstream() -> None:
    q, k, v = (torch.randn(2, 5, 4, 16) for _ in range(3))
    named = flash_attn3.flash_attn_func(q, k, v, softmax_scale=0.3, causal=True, window_size=(2, -1), softcap=5.0)
    none = [None] * 4
    assert torch.equal(flash_attn3.flash_attn_func(q, k, v, 0.3, True, *none, (2, -1), 0, 5.0), named)
    cached = flash_attn3.flash_attn_with_kvcache(q, k, v, *[None] * 16, 0.3, True, (2, -1), 0, 5.0, True, None, 1)
    assert torch.equal(cached, named)


def test_new_keys_leave_the_lengths_alone() -> None:
    arguments = make(CALLS["flash_attn_with_kvcache"] | new, "cpu")
    arguments["cache_seqlens"].copy_(torch.tensor([2, 5]))
    flash_attn3.flash_attn_with_kvcache(**arguments)
    assert arguments["cache_seqlens"].tolist() == [2, 5]
