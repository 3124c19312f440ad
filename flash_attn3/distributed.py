# SPDX-License-Identifier: BSD-3-Clause
"""Attention over a sequence that is spread over the ranks of a process group (gloo or NCCL), forward and backward.

Ring: keys and values travel from rank to rank while queries stay; each rank merges what its queries find in the block
that is passing, in fp32. Two placements of a sequence of W * s tokens on W ranks:
    contiguous: rank r holds tokens [r * s, (r + 1) * s). With a causal mask late ranks do most of the work.
    zigzag: the sequence is cut into 2 * W chunks and rank r holds chunks r and 2 * W - 1 - r; causal work is balanced.
Ulysses: an all-to-all turns a shard of the sequence with all heads into the whole sequence with h / W heads, a plain
call follows, and a second all-to-all turns the result back. Sequences are contiguous, and every option of
`flash_attn_func` works.

Letters: W ranks, b batch, s tokens of a rank, h query heads, h_kv key/value heads, d and dv head dims. Every rank of
the group makes the same call.

Formulas: Liu et al., "Ring Attention with Blockwise Transformers" (arXiv:2310.01889); Jacobs et al., "DeepSpeed
Ulysses" (arXiv:2309.14509).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .api import Result, flash_attn_func
from .checks import Checks
from .flash_attn_interface import _flash_attn_backward, _flash_attn_forward
from .merge_api import merge_state

Group = dist.ProcessGroup | None


def zigzag_shard(x: Tensor, dim: int = 1, *, group: Group = None) -> Tensor:
    """This rank's zigzag shard of a whole sequence: x has 2 * W * n tokens in `dim`, the result 2 * n."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if x.shape[dim] % (2 * world):
        Checks("zigzag_shard").fail("x", f"{x.shape[dim]} tokens", f"a multiple of 2 * W = {2 * world}")
    chunks = x.chunk(2 * world, dim)
    return torch.cat((chunks[rank], chunks[2 * world - 1 - rank]), dim)


def ring_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    deterministic: bool = False,
    return_softmax_lse: bool = False,
    *,
    zigzag: bool = False,
    s_aux: Tensor | None = None,
    group: Group = None,
    backend: str | None = None,
) -> Result:
    """Attention of the whole sequence, of which each rank holds s tokens; keys travel around a ring. Differentiable.

    Args:
        q: (b, s, h, d), k: (b, s, h_kv, d), v: (b, s, h_kv, dv): this rank's tokens. s is the same on all ranks, and
            even with zigzag.
        zigzag: tokens are placed as `zigzag_shard` does; else rank r holds tokens [r * s, (r + 1) * s).
        s_aux: (h,) sink logits, the same on all ranks; the gradient is that of this rank's rows.
        Others: see `flash_attn_func`.

    Returns:
        out (b, s, h, dv) of this rank's tokens; with return_softmax_lse (out, lse), lse (b, h, s) fp32.
    """
    c = Checks("ring_flash_attn_func")
    for name, x in (("q", q), ("k", k), ("v", v)):
        c.tensor(name, x)
        c.shape(name, x, ("b", None), ("s", q.shape[1]), ("h", None), ("d", None))
    causal = c.flag("causal", causal)
    zigzag = c.flag("zigzag", zigzag) and causal  # without a mask every rank sees every block, wherever it lies
    if zigzag and q.shape[1] % 2:
        c.fail("q", f"{q.shape[1]} tokens", "an even number with zigzag: two chunks")
    options = dict(softmax_scale=softmax_scale, softcap=softcap, backend=backend)
    out, lse = _Ring.apply(q, k, v, s_aux, _Schedule(causal, zigzag, group), deterministic, options)
    return (out, lse) if return_softmax_lse else out


@dataclass(frozen=True)
class _Step:
    """What one rank does with the block of keys that has arrived: which rows, which keys, which mask."""

    rows: slice
    keys: slice
    causal: bool


ALL = slice(None)


@dataclass(frozen=True)
class _Schedule:
    causal: bool
    zigzag: bool
    group: Group

    def steps(self, seqlen: int) -> Iterator[_Step | None]:
        """The step for the block of rank - 0, rank - 1, ...; None where every pair is masked."""
        rank, world = dist.get_rank(self.group), dist.get_world_size(self.group)
        first, second = slice(0, seqlen // 2), slice(seqlen // 2, seqlen)
        for distance in range(world):
            earlier = distance <= rank  # the block comes from rank - distance, and not from behind
            if distance == 0 or not self.causal:
                yield _Step(ALL, ALL, self.causal)
            elif self.zigzag:
                yield _Step(ALL, first, False) if earlier else _Step(second, ALL, False)
            else:
                yield _Step(ALL, ALL, False) if earlier else None


class _Shift:
    """Tensors on their way to the next rank, and those of the rank before on their way here."""

    def __init__(self, tensors: tuple[Tensor, ...], group: Group):
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        after, before = (rank + 1) % world, (rank - 1) % world
        if group is not None:
            after, before = dist.get_global_rank(group, after), dist.get_global_rank(group, before)
        self.sent = tuple(x.contiguous() for x in tensors)
        self.received = tuple(torch.empty_like(x) for x in self.sent)
        self.requests = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, x, after, group) for x in self.sent]
            + [dist.P2POp(dist.irecv, x, before, group) for x in self.received]
        )

    def wait(self) -> tuple[Tensor, ...]:
        for request in self.requests:
            request.wait()
        return self.received


class _Ring(torch.autograd.Function):
    """The first step is the diagonal block, which covers every row; the sink enters there and nowhere else."""

    @staticmethod
    def forward(ctx: Any, q, k, v, s_aux, schedule: _Schedule, deterministic: bool, options: dict):
        ctx.schedule, ctx.deterministic, ctx.options = schedule, deterministic, options
        block = (k, v)
        out = lse = None
        steps = list(schedule.steps(q.shape[1]))
        for distance, step in enumerate(steps):
            shift = _Shift(block, schedule.group) if distance + 1 < len(steps) else None
            if step is not None:
                part = _attend(q, *block, step, s_aux if distance == 0 else None, options)
                out, lse = part if out is None else _merge(out, lse, *part, step.rows)
            block = block if shift is None else shift.wait()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, s_aux, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None):
        q, k, v, s_aux, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        dq = torch.zeros_like(q, dtype=torch.float32)
        dsink = None if s_aux is None else s_aux.new_empty(s_aux.shape, dtype=torch.float32)
        block, grads = (k, v), tuple(torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        steps = list(ctx.schedule.steps(q.shape[1]))
        for distance, step in enumerate(steps):
            shift = _Shift(block, ctx.schedule.group) if distance + 1 < len(steps) else None
            if step is not None:
                sink = (s_aux, dsink) if distance == 0 else (None, None)
                state = (dout, out, lse, dlse)
                _add_gradients(q, block, state, step, sink, (dq, *grads), ctx.deterministic, ctx.options)
            block = block if shift is None else shift.wait()
            grads = _Shift(grads, ctx.schedule.group).wait()  # after W shifts they are home
        dk, dv = grads
        dsink = dsink if s_aux is None else dsink.to(s_aux.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsink, None, None, None


def _attend(q: Tensor, k: Tensor, v: Tensor, step: _Step, s_aux: Tensor | None, options: dict) -> tuple[Tensor, Tensor]:
    """(out, lse) of the step's rows over its keys, out in fp32."""
    q, k, v = q[:, step.rows], k[:, step.keys], v[:, step.keys]
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=torch.float32)
    out, lse, *_ = _flash_attn_forward(q, k, v, out=out, causal=step.causal, s_aux=s_aux, **options)
    return out, lse


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """The state (out, lse) with `rows` merged with a part of that many rows."""
    merged = merge_state(out[:, rows], lse[..., rows], part, part_lse)
    if rows == ALL:
        return merged
    out[:, rows], lse[..., rows] = merged
    return out, lse


def _add_gradients(q, block, state, step: _Step, sink, grads, deterministic: bool, options: dict) -> None:
    """Add what one step contributes to dq, dk and dv; out, lse are those of the whole sequence."""
    dout, out, lse, dlse = state
    rows, keys = step.rows, step.keys
    q, k, v = q[:, rows], *(x[:, keys] for x in block)
    parts = tuple(torch.empty_like(x, dtype=torch.float32) for x in (q, k, v))
    _flash_attn_backward(
        dout[:, rows],
        q,
        k,
        v,
        out[:, rows],
        lse[..., rows],
        dq=parts[0],
        dk=parts[1],
        dv=parts[2],
        dlse=None if dlse is None else dlse[..., rows],
        s_aux=sink[0],
        dsink=sink[1],
        is_causal=step.causal,
        deterministic=deterministic,
        **options,
    )
    for grad, part, place in zip(grads, parts, (rows, keys, keys), strict=True):
        grad[:, place] += part


def ulysses_flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, *args: Any, s_aux: Tensor | None = None, group: Group = None, **options: Any
) -> Result:
    """`flash_attn_func` of the whole sequence, of which each rank holds s tokens. Differentiable.

    Args:
        q: (b, s, h, d), k: (b, s, h_kv, d), v: (b, s, h_kv, dv): this rank's tokens, rank r those from r * s on. W
            divides h and h_kv.
        s_aux: (h,) sink logits, the same on all ranks; the gradient is that of this rank's heads.
        Others: as `flash_attn_func`, but for tensors of its heads or sequences (qv, descales, out).

    Returns:
        out (b, s, h, dv) of this rank's tokens; (out, lse), lse (b, h, s) fp32, where `flash_attn_func` returns lse.
    """
    c = Checks("ulysses_flash_attn_func")
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    for name, x in (("q", q), ("k", k), ("v", v)):
        c.shape(name, c.tensor(name, x), ("b", None), ("s", q.shape[1]), ("h", None), ("d", None))
        if x.shape[2] % world:
            c.fail(name, f"{x.shape[2]} heads", f"a multiple of the group's size {world}")
    for name in ("qv", "q_descale", "k_descale", "v_descale", "out", "return_max_logits"):
        if options.get(name) is not None and options[name] is not False:
            c.unsupported(name, "given", "None")
    if s_aux is not None:
        s_aux = s_aux.chunk(world)[rank]
    q, k, v = (_Exchange.apply(x, True, group) for x in (q, k, v))
    attended = flash_attn_func(q, k, v, *args, s_aux=s_aux, **options)
    if isinstance(attended, Tensor):
        return _Exchange.apply(attended, False, group)
    out, lse = attended
    lse = _Exchange.apply(lse.transpose(1, 2).unsqueeze(-1), False, group)
    return _Exchange.apply(out, False, group), lse.squeeze(-1).transpose(1, 2)


class _Exchange(torch.autograd.Function):
    """All-to-all: (b, s, h, d) to (b, W * s, h / W, d) if `to_heads`, else back. Its gradient is the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to_heads: bool, group: Group) -> Tensor:
        ctx.to_heads, ctx.group = to_heads, group
        return _exchange(x, to_heads, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Exchange.apply(grad, not ctx.to_heads, ctx.group), None, None


def _exchange(x: Tensor, to_heads: bool, group: Group) -> Tensor:
    world = dist.get_world_size(group)
    split, joined = (2, 1) if to_heads else (1, 2)
    sent = x.unflatten(split, (world, -1)).movedim(split, 0).contiguous()  # (W, b, s, h, d), a part for each rank
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.movedim(0, joined).flatten(joined, joined + 1)
