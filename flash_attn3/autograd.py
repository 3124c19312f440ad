# SPDX-License-Identifier: BSD-3-Clause
"""Gradients, autocast and vmap of the ops, and attention whose gradient is one packed tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import ops
from .checks import FP8
from .errors import UnsupportedError, message
from .ops import NAMESPACE, PROBLEM_FIELDS
from .problem import AttentionProblem, assembled

_GRADIENTS = ("q", "k", "v", "s_aux")
_GRADIENT_POSITIONS = tuple(PROBLEM_FIELDS.index(name) for name in _GRADIENTS)
_NUM_TENSORS = PROBLEM_FIELDS.index("max_seqlen_q")  # the fields before it are tensors, those from it on are not
_TENSORS = PROBLEM_FIELDS[:_NUM_TENSORS]
_NO_TENSORS = dict.fromkeys(_TENSORS)
_NO_GRADIENTS = (None,) * (len(PROBLEM_FIELDS) + 1 - _NUM_TENSORS)  # of the others, and of the backend's name


def _save(ctx: Any, tensors: tuple, output: tuple[Tensor, Tensor, Tensor | None]) -> None:
    out, lse, max_logits = output
    ctx.save_for_backward(*tensors, out, lse)
    if max_logits is not None:
        ctx.mark_non_differentiable(max_logits)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, first: int, dout: Tensor | None, dlse: Tensor | None, problem: Callable[..., AttentionProblem]
) -> list[Tensor | None]:
    """Of the tensors of a problem, which are the inputs from `first` on; `problem` makes it of them again."""
    result: list[Tensor | None] = [None] * _NUM_TENSORS
    wanted = [ctx.needs_input_grad[first + position] for position in _GRADIENT_POSITIONS]
    if (dout is None and dlse is None) or not any(wanted):
        return result
    *tensors, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    plain = type(dout) is Tensor and not torch.is_grad_enabled() and ops.is_plain()
    via = ops.DIRECT if plain else ops.DISPATCHED
    grads = via.bwd(problem(*tensors), ctx.backend, dout, out, lse, dlse, wanted)
    for position, grad, want in zip(_GRADIENT_POSITIONS, grads, wanted, strict=True):
        result[position] = grad.to(tensors[position].dtype) if want else None
    return result


def _fwd_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _save(ctx, inputs[:_NUM_TENSORS], output)
    *ctx.scalars, ctx.backend = inputs[_NUM_TENSORS:]


def _fwd_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, _: None) -> tuple:
    grads = _gradients(ctx, 0, dout, dlse, lambda *tensors: AttentionProblem(*tensors, *ctx.scalars))
    return (*grads, *_NO_GRADIENTS)


def _no_second_derivative(ctx: Any, *_: Tensor | None) -> NoReturn:
    expected = "a first derivative (forward and backward have no second one)"
    raise UnsupportedError(message(NAMESPACE, "backward", "differentiated", expected))


def _merge_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    out_a, lse_a, out_b, lse_b, _, lse_layout, _ = inputs
    ctx.save_for_backward(out_a, lse_a, out_b, lse_b, *output)
    ctx.lse_layout = lse_layout
    ctx.set_materialize_grads(False)


def _merge_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    """With w = exp(lse_x - lse): dout_x = w * dout, dlse_x = w * (dlse + dout . (out_x - out))."""
    out_a, lse_a, out_b, lse_b, out, lse = ctx.saved_tensors
    hs = ctx.lse_layout == "hs"
    grads: list[Tensor | None] = []
    for out_x, lse_x in ((out_a, lse_a), (out_b, lse_b)):
        seen = lse_x > -torch.inf
        weight = torch.where(seen, torch.exp(lse_x - torch.where(seen, lse, 0.0)), 0.0)
        dlse_x = torch.zeros_like(lse_x) if dlse is None else weight * torch.where(seen, dlse, 0.0)
        if dout is None:
            grads += [None, dlse_x]
            continue
        rows = (lambda x: x.transpose(-1, -2)) if hs else (lambda x: x)
        visible = rows(seen).unsqueeze(-1)
        grads.append(torch.where(visible, rows(weight).unsqueeze(-1) * dout, 0.0).to(out_x.dtype))
        spread = torch.where(visible, dout.float() * (out_x.float() - out.float()), 0.0).sum(-1)
        grads.append(dlse_x + weight * rows(spread))
    return (*grads, None, None, None)


def _refuse(ctx: Any, *_: Any) -> NoReturn:
    expected = "inputs without requires_grad"
    raise UnsupportedError(message(NAMESPACE, "inputs", "require grad", expected, "Use torch.no_grad()"))


def _setup_nothing(ctx: Any, inputs: tuple, output: Any) -> None:
    return None


torch.library.register_autograd(f"{NAMESPACE}::fwd", _fwd_backward, setup_context=_fwd_setup, lib=ops.library)
torch.library.register_autograd(
    f"{NAMESPACE}::bwd", _no_second_derivative, setup_context=_setup_nothing, lib=ops.library
)
torch.library.register_autograd(
    f"{NAMESPACE}::merge_state", _merge_backward, setup_context=_merge_setup, lib=ops.library
)
for _name in ("rotary_q", "combine"):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _refuse, setup_context=_setup_nothing, lib=ops.library)


class Attention(torch.autograd.Function):
    """The op `fwd` with its gradients, past the dispatcher, whose registered gradients cost 0.4 ms of host time."""

    @staticmethod
    def forward(ctx, p, backend, *tensors):
        results = ops.DIRECT.fwd(p, backend)
        _save(ctx, tensors, results)
        ctx.attributes, ctx.backend = vars(p) | _NO_TENSORS, backend  # with what is prepared for it
        return results

    @staticmethod
    def backward(ctx, dout, dlse, _):
        def problem(*tensors: Tensor | None) -> AttentionProblem:
            return assembled(AttentionProblem, ctx.attributes | dict(zip(_TENSORS, tensors, strict=True)))

        return (None, None, *_gradients(ctx, 2, dout, dlse, problem))


DIFFERENTIABLE = ops.DIRECT._replace(
    fwd=lambda p, backend: Attention.apply(p, backend, *(getattr(p, name) for name in _TENSORS))
)


# Attention on packed tensors


def unpack(q: Tensor | None, packed: Tensor, num_heads_q: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k, v of (b, s, 3, h, d), of (b, s, h + 2 * h_kv, d), or with q of (b, s_k, 2, h_kv, d)."""
    if q is not None:
        return (q, *packed.unbind(2))
    if num_heads_q is None:
        return packed.unbind(2)
    heads_kv = (packed.shape[2] - num_heads_q) // 2
    return packed.split((num_heads_q, heads_kv, heads_kv), dim=2)


class PackedAttention(torch.autograd.Function):
    """Attention on views of a packed tensor; the backward kernel writes into views of one packed gradient."""

    @staticmethod
    def forward(ctx, q, packed, s_aux, num_heads_q, *scalars):
        out, lse, max_logits = ops.fwd(*_packed_arguments(q, packed, s_aux, num_heads_q, scalars))
        ctx.save_for_backward(q, packed, s_aux, out, lse)
        ctx.num_heads_q, ctx.scalars = num_heads_q, scalars
        ctx.mark_non_differentiable(max_logits)
        ctx.set_materialize_grads(False)
        return out, lse, max_logits

    @staticmethod
    def backward(ctx, dout, dlse, _):
        q, packed, s_aux, out, lse = ctx.saved_tensors
        arguments = _packed_arguments(q, packed, s_aux, ctx.num_heads_q, ctx.scalars)
        needs_q, needs_packed, needs_sink, *_ = ctx.needs_input_grad
        dq = torch.empty_like(q, memory_format=torch.contiguous_format) if needs_q else None
        dpacked = torch.empty_like(packed, memory_format=torch.contiguous_format) if needs_packed else None
        dsink = s_aux.new_empty(s_aux.shape, dtype=torch.float32) if needs_sink else None
        dout = torch.zeros_like(out) if dout is None else dout
        grads = (None, None, None) if dpacked is None else unpack(q, dpacked, ctx.num_heads_q)
        if q is not None:
            grads = (dq, *grads[1:])
        with torch.no_grad():  # grad mode is on under create_graph
            ops.bwd_out(*arguments, dout, out, lse, dlse, *grads, dsink)
        if dsink is not None:
            dsink = dsink.to(s_aux.dtype)
        grads = _FirstDerivative.apply(dout, q, packed, s_aux, dq, dpacked, dsink)
        return (*grads, *[None] * (1 + len(ctx.scalars)))


class _FirstDerivative(torch.autograd.Function):
    """The identity on gradients, as a function of what they came from that refuses to be differentiated."""

    @staticmethod
    def forward(ctx, dout, q, packed, s_aux, *grads):
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    backward = staticmethod(_no_second_derivative)


def _packed_arguments(q, packed, s_aux, num_heads_q, scalars) -> tuple:
    tensors = dict(zip(("q", "k", "v"), unpack(q, packed, num_heads_q), strict=True), s_aux=s_aux)
    return (*(tensors.get(name) for name in PROBLEM_FIELDS[:_NUM_TENSORS]), *scalars)


def attend_packed(q: Tensor | None, packed: Tensor, num_heads_q: int | None, p: AttentionProblem, backend: str):
    """(out, lse, max_logits) of `p`, whose q, k, v are views of `packed`, with gradients."""
    return PackedAttention.apply(q, packed, p.s_aux, num_heads_q, *p.arguments()[_NUM_TENSORS:], backend)


# Autocast, vmap, FLOP count


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """fp32 tensors in the autocast dtype of their device, as torch's SDPA casts them."""
    return tuple(_autocast(x) for x in tensors)


def _autocast(x: Tensor | None) -> Tensor | None:
    if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.device.type not in ("cpu", "cuda"):
        return x
    device_type = x.device.type
    return x.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else x


def _fwd_autocast(*arguments):
    position = PROBLEM_FIELDS.index("out_dtype")
    q, k, v, qv = autocast(*arguments[:4])
    out_dtype = torch.bfloat16 if q.dtype == FP8 else q.dtype
    with torch.autocast(q.device.type, enabled=False):
        return ops.fwd(q, k, v, qv, *arguments[4:position], out_dtype, *arguments[position + 1 :])


for _key in ("AutocastCPU", "AutocastCUDA"):
    ops.library.impl("fwd", _fwd_autocast, _key)


def _each(op):
    """vmap by one call per element: kernels have one batch dimension."""

    def vmap(info, in_dims, *arguments):
        def element(argument, dim, index):
            return argument if dim is None else argument.select(dim, index)

        calls = [
            op(*(element(x, dim, index) for x, dim in zip(arguments, in_dims, strict=True)))
            for index in range(info.batch_size)
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        return tuple(torch.stack(parts) for parts in zip(*calls, strict=True)), (0,) * len(calls[0])

    return vmap


def _write(info, in_dims, *arguments):
    expected = "no vmap over calls that write into their arguments (a cache, out=, gradients)"
    raise UnsupportedError(message(NAMESPACE, "vmap", f"over {info.batch_size} elements", expected))


for _op in (ops.append_kv, ops.fwd_out, ops.bwd_out):
    torch.library.register_vmap(_op.name().split(".")[0], _write, lib=ops.library)
for _op in (ops.fwd, ops.bwd, ops.rotary_q, ops.combine, ops.merge_state, ops.scheduler_metadata):
    torch.library.register_vmap(_op.name().split(".")[0], _each(_op), lib=ops.library)


def _attention_flops(*shapes, **_) -> int:
    """All s_q * s_k pairs and no discount for a mask, as torch counts SDPA; packed batches by their length bounds."""
    q, _, v = shapes[:3]
    cu_seqlens_q = shapes[PROBLEM_FIELDS.index("cu_seqlens_q")]
    max_q, max_k = shapes[_NUM_TENSORS], shapes[_NUM_TENSORS + 1]
    batch = q[0] if cu_seqlens_q is None else cu_seqlens_q[0] - 1
    return 2 * batch * q[-2] * max_q * max_k * (q[-1] + v[-1])


@register_flop_formula(ops.fwd.overloadpacket)
def _fwd_flops(*shapes, out_shape=None, **kwargs) -> int:
    return _attention_flops(*shapes)


@register_flop_formula(ops.bwd.overloadpacket)
def _bwd_flops(*shapes, out_shape=None, **kwargs) -> int:
    return _attention_flops(*shapes) * 5 // 2
