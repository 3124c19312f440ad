# SPDX-License-Identifier: BSD-3-Clause
"""The torch.library ops `flash_attn3::*`: schemas, allocation, fakes, and the step into a backend.

Schemas come from the fields of `AttentionProblem` and `AppendProblem`. Kernels only write: every output is
allocated here, by the functions that the fakes use too, so shapes, dtypes and strides cannot differ.

`DISPATCHED` and `DIRECT` are the two ways from a problem to its results: through torch's dispatcher, which serves
autograd, tracing, modes and subclasses, and past it, which saves 25 microseconds where none of these is at work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import (
    _get_tracing_state,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad, profiler

from . import debug, env, runtime, status
from .problem import AppendProblem, AttentionProblem, ScheduleProblem

NAMESPACE = __package__.replace(".", "_")  # "flash_attn3"; a renamed copy of the package has ops of its own
_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "int": "SymInt",
    "float": "float",
    "bool": "bool",
    "bool | None": "bool?",
    "torch.dtype": "ScalarType",
}
PROBLEM_FIELDS = tuple(field.name for field in fields(AttentionProblem))
_NUM_PROBLEM, _NUM_APPEND = len(PROBLEM_FIELDS), len(fields(AppendProblem))

library = torch.library.Library(NAMESPACE, "DEF")


def _schema(problem: type, mutated: tuple[str, ...] = ()) -> str:
    """The fields of `problem` and the backend's name as op arguments."""
    arguments = []
    for field in fields(problem):
        kind = _SCHEMA_TYPES[field.type]
        if field.name in mutated:
            kind = f"Tensor({chr(ord('a') + mutated.index(field.name))}!)"
        arguments.append(f"{kind} {field.name}")
    return ", ".join((*arguments, "str backend"))


def _define(name: str, schema: str, run: Callable, fake: Callable) -> None:
    library.define(f"{name}({schema}", tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    library.impl(name, run, "CPU")
    library.impl(name, run, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)


# Attention


def _empty_out(p: AttentionProblem) -> Tensor:
    return debug.empty(p.q, p.out_shape, p.out_dtype)


def _empty_lse(p: AttentionProblem) -> Tensor:
    return debug.empty(p.q, p.lse_shape, torch.float32)


def _fresh_out(p: AttentionProblem) -> Tensor:
    """`_empty_out` of a plain tensor, in two thirds of the time."""
    if env.check_level:
        return _empty_out(p)
    return torch.empty_strided(p.out_shape, p.out_stride, dtype=p.out_dtype, device=p.q.device)


def _fresh_lse(p: AttentionProblem) -> Tensor:
    if env.check_level:
        return _empty_lse(p)
    return torch.empty_strided(p.lse_shape, p.lse_stride, dtype=torch.float32, device=p.q.device)


def _empty_max_logits(p: AttentionProblem) -> Tensor:
    """(b, h), or (0,) when they are not wanted."""
    return debug.empty(p.q, (p.batch, p.num_heads) if p.return_max_logits else (0,), torch.float32)


def _appends(p: AttentionProblem) -> bool:
    return p.cu_seqlens_k_new is not None or p.seqlen_k_new > 0


def _attend_into(p: AttentionProblem, backend: str, out: Tensor) -> tuple[Tensor, Tensor | None]:
    if not _appends(p):  # else `append_kv` raised, and what is pending now comes from this very call
        status.raise_pending(p.q.device)
    lse, max_logits = _fresh_lse(p), _empty_max_logits(p) if p.return_max_logits else None
    runtime.backend(backend).fwd(p, out, lse, max_logits)
    return lse, max_logits


def _attend(p: AttentionProblem, backend: str) -> tuple[Tensor, Tensor, Tensor | None]:
    out = _fresh_out(p)
    return (out, *_attend_into(p, backend, out))


def _attend_out(p: AttentionProblem, backend: str, out: Tensor) -> tuple[Tensor, Tensor | None]:
    results = _attend_into(p, backend, out)
    _written(out)
    return results


def _written(*tensors: Tensor | None) -> None:
    """Let autograd know, whatever wrote: a tensor saved for a backward before this call is not what was saved."""
    torch.autograd.graph.increment_version([x for x in tensors if x is not None and not x.is_inference()])


def _fwd(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    p = AttentionProblem(*arguments[:_NUM_PROBLEM])
    out, lse, max_logits = _attend(p, arguments[_NUM_PROBLEM])
    return out, lse, _empty_max_logits(p) if max_logits is None else max_logits


def _fwd_fake(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    p = AttentionProblem(*arguments[:_NUM_PROBLEM])
    return _empty_out(p), _empty_lse(p), _empty_max_logits(p)


def _fwd_out(*arguments) -> tuple[Tensor, Tensor]:
    p = AttentionProblem(*arguments[:_NUM_PROBLEM])
    lse, max_logits = _attend_out(p, *arguments[_NUM_PROBLEM:])
    return lse, _empty_max_logits(p) if max_logits is None else max_logits


def _fwd_out_fake(*arguments) -> tuple[Tensor, Tensor]:
    p = AttentionProblem(*arguments[:_NUM_PROBLEM])
    return _empty_lse(p), _empty_max_logits(p)


# Backward: gradients of q, k, v and s_aux; those not wanted are empty tensors


def _empty_grads(p: AttentionProblem, wanted: list[bool]) -> list[Tensor]:
    shapes = ((p.q.shape, p.q.dtype), (p.k.shape, p.k.dtype), (p.v.shape, p.v.dtype), ((p.num_heads,), torch.float32))
    return [
        debug.empty(p.q, shape if want else (0,), dtype) for (shape, dtype), want in zip(shapes, wanted, strict=True)
    ]


def _gradients(p: AttentionProblem, backend: str, *given: Any) -> tuple[Tensor, ...]:
    *given, wanted = given
    grads = _empty_grads(p, wanted)
    _gradients_into(p, backend, *given, *(grad if want else None for grad, want in zip(grads, wanted, strict=True)))
    return tuple(grads)


def _gradients_into(p: AttentionProblem, backend: str, dout: Tensor, *others: Tensor | None) -> None:
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    runtime.backend(backend).bwd(p, dout, *others)
    _written(*others[3:])


def _bwd(*arguments) -> tuple[Tensor, ...]:
    return _gradients(AttentionProblem(*arguments[:_NUM_PROBLEM]), *arguments[_NUM_PROBLEM:])


def _bwd_fake(*arguments) -> tuple[Tensor, ...]:
    return tuple(_empty_grads(AttentionProblem(*arguments[:_NUM_PROBLEM]), arguments[-1]))


def _bwd_out(*arguments) -> None:
    _gradients_into(AttentionProblem(*arguments[:_NUM_PROBLEM]), *arguments[_NUM_PROBLEM:])


def _nothing(*arguments) -> None:
    return None


# Cache


def _empty_rotated(q: Tensor | None, like: Tensor) -> Tensor:
    """As q and contiguous, or (0,) without one."""
    return like.new_empty((0,)) if q is None else torch.empty_like(q, memory_format=torch.contiguous_format)


def _append(a: AppendProblem, backend: str) -> Tensor | None:
    status.raise_pending(a.k_cache.device)
    rotated = None if a.q is None else _empty_rotated(a.q, a.k)
    runtime.backend(backend).append_kv(a, rotated)
    _written(a.k_cache, a.v_cache)
    return rotated


def _append_kv(*arguments) -> Tensor:
    a = AppendProblem(*arguments[:_NUM_APPEND])
    rotated = _append(a, arguments[_NUM_APPEND])
    return _empty_rotated(None, a.k) if rotated is None else rotated


def _append_kv_fake(*arguments) -> Tensor:
    a = AppendProblem(*arguments[:_NUM_APPEND])
    return _empty_rotated(a.q, a.k)


def _rotary_q(q, cos, sin, positions, cu_seqlens_q, advance, interleaved, backend) -> Tensor:
    out = _empty_rotated(q, q)
    runtime.backend(backend).rotary_q(q, cos, sin, positions, cu_seqlens_q, advance, interleaved, out)
    return out


def _rotary_q_fake(q, *_) -> Tensor:
    return _empty_rotated(q, q)


# Merging partial results


def _empty_combined(out_partial: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out (b, s, h, d), and lse (b, s, h) as a view of (b, h, s) storage."""
    _, b, s, h, d = out_partial.shape
    return out_partial.new_empty((b, s, h, d), dtype=out_dtype), out_partial.new_empty((b, h, s))


def _combine(out_partial, lse_partial, out_dtype, backend) -> tuple[Tensor, Tensor]:
    out, lse = _empty_combined(out_partial, out_dtype)
    runtime.backend(backend).combine(out_partial, lse_partial, out, lse.transpose(1, 2))
    return out, lse


def _combine_fake(out_partial, lse_partial, out_dtype, backend) -> tuple[Tensor, Tensor]:
    return _empty_combined(out_partial, out_dtype)


def _empty_merged(out_a: Tensor, lse_a: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape, dtype=out_dtype), lse_a.new_empty(lse_a.shape)


def merge_into(out_a, lse_a, out_b, lse_b, out, lse, lse_layout, backend) -> None:
    """Past the dispatcher, into contiguous `out` and `lse`."""
    by_row = (lambda x: x.transpose(-1, -2)) if lse_layout == "hs" else (lambda x: x)
    runtime.backend(backend).merge_state(out_a, by_row(lse_a), out_b, by_row(lse_b), out, by_row(lse))
    _written(out, lse)


def _merge_state(out_a, lse_a, out_b, lse_b, out_dtype, lse_layout, backend) -> tuple[Tensor, Tensor]:
    out, lse = _empty_merged(out_a, lse_a, out_dtype)
    merge_into(out_a, lse_a, out_b, lse_b, out, lse, lse_layout, backend)
    return out, lse


def _merge_state_fake(out_a, lse_a, out_b, lse_b, out_dtype, lse_layout, backend) -> tuple[Tensor, Tensor]:
    return _empty_merged(out_a, lse_a, out_dtype)


def _scheduler_metadata(*arguments) -> Tensor:
    s = ScheduleProblem(*arguments[:-1])
    schedule = _empty_schedule(s)
    runtime.backend(arguments[-1]).scheduler_metadata(s, schedule)
    return schedule


def _scheduler_metadata_fake(*arguments) -> Tensor:
    return _empty_schedule(ScheduleProblem(*arguments[:-1]))


def _empty_schedule(s: ScheduleProblem) -> Tensor:
    return s.seqused_k.new_empty(1 + 4 * ((s.batch + 3) // 4 * 4))


_problem = _schema(AttentionProblem)
_backward = f"{_problem}, Tensor dout, Tensor out, Tensor lse, Tensor? dlse"
_define("fwd", f"{_problem}) -> (Tensor, Tensor, Tensor)", _fwd, _fwd_fake)
_define("fwd_out", f"{_problem}, Tensor(a!) out) -> (Tensor, Tensor)", _fwd_out, _fwd_out_fake)
_define("bwd", f"{_backward}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)", _bwd, _bwd_fake)
_define(
    "bwd_out",
    f"{_backward}, Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, Tensor(d!)? dsink) -> ()",
    _bwd_out,
    _nothing,
)
_define("append_kv", f"{_schema(AppendProblem, ('k_cache', 'v_cache'))}) -> Tensor", _append_kv, _append_kv_fake)
_define(
    "rotary_q",
    "Tensor q, Tensor cos, Tensor sin, Tensor positions, Tensor? cu_seqlens_q, bool advance, bool interleaved, "
    "str backend) -> Tensor",
    _rotary_q,
    _rotary_q_fake,
)
_define(
    "combine",
    "Tensor out_partial, Tensor lse_partial, ScalarType out_dtype, str backend) -> (Tensor, Tensor)",
    _combine,
    _combine_fake,
)
_define(
    "merge_state",
    "Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, ScalarType out_dtype, str lse_layout, str backend) "
    "-> (Tensor, Tensor)",
    _merge_state,
    _merge_state_fake,
)
_define("scheduler_metadata", f"{_schema(ScheduleProblem)}) -> Tensor", _scheduler_metadata, _scheduler_metadata_fake)

_ops = getattr(torch.ops, NAMESPACE)
fwd = _ops.fwd.default
fwd_out = _ops.fwd_out.default
bwd = _ops.bwd.default
bwd_out = _ops.bwd_out.default
append_kv = _ops.append_kv.default
rotary_q = _ops.rotary_q.default
combine = _ops.combine.default
merge_state = _ops.merge_state.default
scheduler_metadata = _ops.scheduler_metadata.default


class Operations(NamedTuple):
    """What a call of attention and its gradient are made of."""

    fwd: Callable[[AttentionProblem, str], tuple[Tensor, Tensor, Tensor | None]]
    fwd_out: Callable[[AttentionProblem, str, Tensor], tuple[Tensor, Tensor | None]]
    append_kv: Callable[[AppendProblem, str], Tensor | None]  # rotated queries
    bwd: Callable[..., tuple[Tensor, ...]]  # of a problem, its backend, then the arguments of the op


DISPATCHED = Operations(
    fwd=lambda p, backend: fwd(*p.arguments(), backend),
    fwd_out=lambda p, backend, out: fwd_out(*p.arguments(), backend, out),
    append_kv=lambda a, backend: append_kv(*a.arguments(), backend),
    bwd=lambda p, backend, *given: bwd(*p.arguments(), backend, *given),
)
DIRECT = Operations(fwd=_attend, fwd_out=_attend_out, append_kv=_append, bwd=_gradients)


def is_plain() -> bool:
    """Whether nothing but eager execution is at work, so that nothing needs to see the ops."""
    return not (
        torch.compiler.is_compiling()
        or env.check_level
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
        or _is_any_autocast_enabled()
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
    )
