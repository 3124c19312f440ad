# SPDX-License-Identifier: BSD-3-Clause
"""Backward: probabilities are recomputed tile by tile from the LSE; dk and dv are summed in fp32 over the row tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import AttentionProblem
from .mask import zero_invisible_
from .sequences import Sequence, covers_all_keys, covers_all_rows, sequences
from .tiles import LN2, LOG2E, HeadGroup, Workspace, block_shape, is_finite, matmul, matmul_visible, row_dots

BLOCK_N = 512  # keys of a tile; their dk and dv are one contiguous matrix for each head
ACC_ELEMENTS = 1 << 22  # of dk and dv, for the heads that are processed together


def bwd(
    p: AttentionProblem,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dsink: Tensor | None,
) -> None:
    batch = sequences(p) if p.num_heads else []
    if dq is not None and not covers_all_rows(p, batch):
        dq.zero_()
    for grad in (dk, dv):
        if grad is not None and not (p.num_heads and covers_all_keys(p, batch)):
            grad.zero_()
    if dsink is not None:
        dsink.zero_()
    work = Workspace()
    for seq in batch:
        num_heads_kv, block_m = _block_shape(p, seq)
        for head_kv in range(0, p.num_heads_kv, num_heads_kv):
            heads = HeadGroup(p, seq, head_kv, min(head_kv + num_heads_kv, p.num_heads_kv), work)
            grads = _Gradients(heads, (dout, out, lse, dlse), (dq, dk, dv, dsink))
            if not grads.run(block_m):
                grads.run(block_m, select=True)
            grads.store()


def _block_shape(p: AttentionProblem, seq: Sequence) -> tuple[int, int]:
    num_heads_kv, block_m = block_shape(p, seq, BLOCK_N)
    per_head = max(seq.n_k, 1) * (p.head_dim + p.head_dim_v)
    return max(min(num_heads_kv, ACC_ELEMENTS // per_head), 1), block_m


class _Gradients:
    """Gradients of a group of heads of one sequence; those that are None are not computed."""

    def __init__(self, heads: HeadGroup, given: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...]) -> None:
        self.heads, self.p, self.work = heads, heads.p, heads.work
        self.dout, self.out, self.lse, self.dlse = given
        self.dq, self.dk, self.dv, self.dsink = grads

    def run(self, block_m: int, select: bool = False) -> bool:
        """Whether the result holds: unless `select`, what is not finite spoils (0 * NaN) what does not see it."""
        self.select, self.masked = select, False
        self.acc_dk = self._zero_blocks("acc_dk", self.p.head_dim) if self.dk is not None else None
        self.acc_dv = self._zero_blocks("acc_dv", self.p.head_dim_v) if self.dv is not None else None
        self.acc_dsink = torch.zeros(self.heads.num_heads)
        finite = True
        for i0 in range(0, self.heads.seq.n_q, block_m):
            finite = finite and self._row_tile(i0, min(i0 + block_m, self.heads.seq.n_q))
        blocks = (self.acc_dk or []) + (self.acc_dv or [])
        return select or not self.masked or (finite and all(is_finite(block) for block in blocks))

    def store(self) -> None:
        for grad, acc, factor in ((self.dk, self.acc_dk, self.p.softcap or LN2), (self.dv, self.acc_dv, 1.0)):
            if acc is None:
                continue
            for block, j0 in zip(acc, range(0, self.heads.seq.n_k, BLOCK_N), strict=True):
                self.heads.keys(grad)[:, j0 : j0 + BLOCK_N] = block.mul_(factor)
        if self.dsink is not None:
            self.dsink[self.heads.heads] += self.acc_dsink

    def _zero_blocks(self, name: str, head_dim: int) -> list[Tensor]:
        """(heads_kv, BLOCK_N, head_dim) for each block of keys."""
        num_heads_kv, n_k = self.heads.num_heads_kv, self.heads.seq.n_k
        size = num_heads_kv * head_dim
        acc = self.work.take(name, n_k * size).zero_()
        bounds = [(j0, min(j0 + BLOCK_N, n_k)) for j0 in range(0, n_k, BLOCK_N)]
        return [acc[j0 * size : j1 * size].view(num_heads_kv, j1 - j0, head_dim) for j0, j1 in bounds]

    def _row_tile(self, i0: int, i1: int) -> bool:
        """Add what the rows [i0, i1) contribute; whether their dq is finite."""
        heads, stack = self.heads, self.heads.stack
        q, _ = heads.query_tile(i0, i1)
        dout = heads.row_tile("dout", self.dout, i0, i1)
        lse = heads.stats(self.lse)[:, i0:i1, None]
        alive = lse != -torch.inf
        lse_log2 = torch.where(alive, (lse.double() * LOG2E).float(), torch.inf)
        delta = self._delta(dout, i0, i1)
        if self.dsink is not None:
            self._add_dsink(lse, delta, i0, i1)
        if self.dq is None and self.dk is None and self.dv is None:
            return True
        acc_dq = None
        if self.dq is not None:
            acc_dq = heads.work.take("acc_dq", heads.num_heads, i1 - i0, self.p.head_dim).zero_()
        stacked_dout = stack(dout)
        alive_bits = None if bool(alive.all()) else alive.int().neg_()
        first, end = heads.mask.keys(i0, i1)
        for block in range(first // BLOCK_N, -(-end // BLOCK_N) if first < end else 0):
            j0, j1 = max(first, block * BLOCK_N), min(end, (block + 1) * BLOCK_N)
            keep = self._keep(alive_bits, i0, i1, j0, j1)
            k, v = heads.key_tile(j0, j1)
            probs, tanh = self._probs(q, k, v, lse_log2, keep)
            rows = slice(j0 - block * BLOCK_N, j1 - block * BLOCK_N)
            if self.acc_dv is not None:
                self._matmul(stack(probs), stacked_dout, keep, self.acc_dv[block][:, rows], transposed=True)
            if self.dq is None and self.acc_dk is None:
                continue
            dscores = stack(self._dscores(stacked_dout, v, probs, delta, tanh, keep))
            if acc_dq is not None:
                self._matmul(dscores, k, keep, stack(acc_dq))
            if self.acc_dk is not None:
                self._matmul(dscores, q, keep, self.acc_dk[block][:, rows], transposed=True)
        if acc_dq is None:
            return True
        heads.rows(self.dq)[:, i0:i1] = acc_dq.mul_(self.p.softmax_scale)
        return not self.masked or is_finite(acc_dq)

    def _delta(self, dout: Tensor, i0: int, i1: int) -> Tensor:
        """dout . out - dlse, (heads, rows, 1)."""
        delta = row_dots(dout, self.heads.row_tile("out", self.out, i0, i1))
        return delta if self.dlse is None else delta - self.heads.stats(self.dlse)[:, i0:i1, None]

    def _add_dsink(self, lse: Tensor, delta: Tensor, i0: int, i1: int) -> None:
        """A row without keys has out = 0 whatever its dout, so that only dlse counts there."""
        sink = self.p.s_aux[self.heads.heads, None, None].float()
        weight = torch.where(sink == -torch.inf, 0.0, torch.exp(sink - lse))
        blind = self.heads.mask.blind(i0, i1)
        if blind is not None:
            dlse = 0.0 if self.dlse is None else self.heads.stats(self.dlse)[:, i0:i1, None]
            delta = torch.where(blind, -dlse, delta)
        self.acc_dsink -= torch.where(weight == 0, 0.0, weight * delta).sum((1, 2))

    def _keep(self, alive: Tensor | None, i0: int, i1: int, j0: int, j1: int) -> Tensor | None:
        """The mask of a tile, without the rows whose bits `alive` are 0; None if it hides nothing."""
        bits = self.heads.mask.bits(i0, i1, j0, j1)
        keep = None if bits is None else bits[0]
        if alive is not None:
            keep = alive.expand(-1, -1, j1 - j0) if keep is None else alive & keep
        self.masked |= keep is not None
        return keep

    def _probs(
        self, q: Tensor, k: Tensor, v: Tensor, lse_log2: Tensor, keep: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Probabilities (heads, rows, keys), and tanh of the scores if they are capped."""
        scores, tanh = self.heads.scores(q, None, k, v), None
        if self.p.softcap:
            tanh = torch.tanh(scores, out=self.work.take("tanh", *scores.shape))
            torch.mul(tanh, self.p.softcap * LOG2E, out=scores)
        probs = scores.sub_(lse_log2).exp2_()
        if keep is not None:
            zero_invisible_(probs, keep)
        return probs, tanh

    def _dscores(
        self, dout: Tensor, v: Tensor, probs: Tensor, delta: Tensor, tanh: Tensor | None, keep: Tensor | None
    ) -> Tensor:
        """Gradients of the scaled scores, (heads, rows, keys)."""
        dscores = self.work.take("dscores", *dout.shape[:2], v.shape[1])
        matmul(dout, v.transpose(1, 2), dscores)
        dscores = dscores.view(probs.shape).sub_(delta).mul_(probs)
        if tanh is not None:
            dscores.addcmul_(dscores, tanh.square_(), value=-1)
        if keep is not None:
            zero_invisible_(dscores, keep)
        return dscores

    def _matmul(self, a: Tensor, b: Tensor, keep: Tensor | None, acc: Tensor, transposed: bool = False) -> None:
        """acc += a @ b, a (heads_kv, group * rows, keys), or acc += a^T @ b if `transposed`."""
        visible = None if keep is None or not self.select else self.heads.stack_visible(keep)
        if transposed:
            a, visible = a.transpose(1, 2), None if visible is None else visible.transpose(1, 2)
        if visible is None:
            matmul(a, b, acc, accumulate=True)
        else:
            matmul_visible(a, b, visible, acc, accumulate=True)
