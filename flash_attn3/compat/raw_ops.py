# SPDX-License-Identifier: BSD-3-Clause
"""`torch.ops.flash_attn_3`, the operators of upstream's wheel, for callers that go below its Python functions.

torch's "FA3" attention and xformers call them with all arguments positional. The schemas are upstream's; their
defaults differ from those of the Python functions (num_splits 0, rotary halves).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..cache_api import get_scheduler_metadata
from ..flash_attn_interface import _flash_attn_backward, _flash_attn_forward, flash_attn_combine

NAMESPACE = "flash_attn_3"

SCHEMAS = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
    "Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)",
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
    "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0.0, bool deterministic=False, int sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "fwd_combine(Tensor out_partial, Tensor lse_partial, Tensor(out!)? out=None, ScalarType? out_dtype=None) "
    "-> (Tensor(out!), Tensor)",
    "get_scheduler_metadata(int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads, int num_heads_k, "
    "int headdim, int headdim_v, ScalarType qkv_dtype, Tensor seqused_k, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? leftpad_k=None, "
    "int? page_size=None, int max_seqlen_k_new=0, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, bool has_softcap=False, int num_splits=0, bool? pack_gqa=None, "
    "int sm_margin=0) -> Tensor",
)


_defined: list[torch.library.Library] = []  # a library that is dropped takes its operators back


def define() -> bool:
    """Define the operators for the rest of the process, unless somebody has; whether this call did."""
    if hasattr(getattr(torch.ops, NAMESPACE), "fwd"):
        return False
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for schema, run in zip(SCHEMAS, (_fwd, _bwd, _combine, _scheduler_metadata), strict=True):
        name = library.define(schema)
        library.impl(name, _kernel(torch._C.parse_schema(f"{NAMESPACE}::{schema}"), run), "CompositeExplicitAutograd")
    _defined.append(library)
    return True


def _kernel(schema: torch.FunctionSchema, run: Callable) -> Callable:
    """`run` on all arguments of the schema: the dispatcher drops trailing ones that equal their default."""
    defaults = [argument.default_value for argument in schema.arguments]

    def kernel(*arguments):
        with torch.no_grad():
            return run(*arguments, *defaults[len(arguments) :])

    return kernel


def _fwd(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _flash_attn_forward(*arguments)


def _bwd(dout, q, k, v, out, softmax_lse, dq, dk, dv, *others) -> tuple[Tensor, ...]:
    """softmax_d, and four empty tensors in the place of upstream's workspaces."""
    lengths, options = others[:6], others[6:]
    softmax_d = _flash_attn_backward(dout, q, k, v, out, softmax_lse, *lengths, dq, dk, dv, *options)
    return (softmax_d, *(softmax_d.new_empty(0) for _ in range(4)))


def _combine(out_partial, lse_partial, out, out_dtype) -> tuple[Tensor, Tensor]:
    return flash_attn_combine(out_partial, lse_partial, out, out_dtype)


def _scheduler_metadata(
    batch_size,
    max_seqlen_q,
    max_seqlen_k,
    num_heads,
    num_heads_k,
    headdim,
    headdim_v,
    qkv_dtype,
    seqused_k,
    cu_seqlens_q,
    cu_seqlens_k,
    cu_seqlens_k_new,
    seqused_q,
    leftpad_k,
    page_size,
    max_seqlen_k_new,
    is_causal,
    window_size_left,
    window_size_right,
    attention_chunk,
    *options,
) -> Tensor:
    sizes = (batch_size, max_seqlen_q, max_seqlen_k, num_heads, num_heads_k, headdim)
    lengths = (cu_seqlens_q, cu_seqlens_k_new, leftpad_k, page_size, max_seqlen_k_new)
    mask = (is_causal, (window_size_left, window_size_right), attention_chunk)
    return get_scheduler_metadata(*sizes, seqused_k, qkv_dtype, headdim_v, *lengths, *mask, *options)
