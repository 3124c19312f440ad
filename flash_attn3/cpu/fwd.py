# SPDX-License-Identifier: BSD-3-Clause
"""Forward: online softmax over tiles of keys, one tile of query rows and heads at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import AttentionProblem
from .mask import hide_invisible_
from .sequences import covers_all_rows, sequences
from .tiles import LN2, LOG2E, HeadGroup, Workspace, block_shape, is_finite, matmul, matmul_visible

BLOCK_N = 512
FAR = 1024.0  # a sum over a tile that no tile reaches unless some score exceeds row_max
LOWEST = torch.finfo(torch.float32).min


def fwd(p: AttentionProblem, out: Tensor, lse: Tensor, max_logits: Tensor | None) -> None:
    batch = sequences(p) if p.num_heads else []
    if not covers_all_rows(p, batch):
        out.zero_()
        lse.fill_(-torch.inf)
    if max_logits is not None:
        max_logits.fill_(-torch.inf)
    work = Workspace()
    for seq in batch:
        num_heads_kv, block_m = block_shape(p, seq, BLOCK_N)
        for head_kv in range(0, p.num_heads_kv, num_heads_kv):
            heads = HeadGroup(p, seq, head_kv, min(head_kv + num_heads_kv, p.num_heads_kv), work)
            _attend(heads, block_m, heads.rows(out), heads.stats(lse), max_logits)


def _attend(heads: HeadGroup, block_m: int, out: Tensor, lse: Tensor, max_logits: Tensor | None) -> None:
    """out (heads, n_q, dv) and lse (heads, n_q) of the heads of one sequence."""
    for i0 in range(0, heads.seq.n_q, block_m):
        i1 = min(i0 + block_m, heads.seq.n_q)
        rows = _RowTile(heads, i0, i1)
        if rows.attend() and not is_finite(rows.acc_o):
            rows = _RowTile(heads, i0, i1)
            rows.attend(select=True)
        out[:, i0:i1] = rows.acc_o
        lse[:, i0:i1] = rows.lse()
        if max_logits is not None:
            top = max_logits[heads.seq.index, heads.heads]
            torch.maximum(top, rows.max_score.amax(1)[:, 0] * LN2, out=top)


class _RowTile:
    """The state (acc_o, row_max, row_sum) of the rows [i0, i1) of a group of heads; scores are in units of log 2.

    A sink is a key that was seen first and whose value is 0.
    """

    def __init__(self, heads: HeadGroup, i0: int, i1: int) -> None:
        self.heads, self.i0, self.i1 = heads, i0, i1
        p = heads.p
        self.acc_o = heads.work.take("acc_o", heads.num_heads, i1 - i0, p.head_dim_v)
        shape = (heads.num_heads, i1 - i0, 1)
        self.max_score = torch.full(shape, -torch.inf) if p.return_max_logits else None
        self.row_max, self.row_sum = torch.full(shape, LOWEST), torch.zeros(shape)
        self.sink = None
        if p.s_aux is not None:
            self.sink = p.s_aux[heads.heads, None, None].float()
            self.row_max = torch.maximum(self.row_max, self.sink * LOG2E)
            self.row_sum = (self.sink * LOG2E - self.row_max).exp2_()

    def attend(self, select: bool = False) -> bool:
        """Whether some pair of a visited tile was hidden.

        A value that is not finite then spoils rows that do not see it (0 * NaN), unless `select`, which is slow.
        """
        heads = self.heads
        queries = heads.query_tile(self.i0, self.i1)
        first, end = heads.mask.keys(self.i0, self.i1)
        masked = False
        if first >= end:
            self.acc_o.zero_()
        for j0 in range(first, end, BLOCK_N):
            j1 = min(j0 + BLOCK_N, end)
            k, v = heads.key_tile(j0, j1)
            bits = heads.mask.bits(self.i0, self.i1, j0, j1)
            probs = self._probs(queries, k, v, bits, first_tile=j0 == first)
            if bits is None or not select:
                matmul(heads.stack(probs), v, heads.stack(self.acc_o), accumulate=j0 > first)
            else:
                visible = heads.stack_visible(bits[0])
                matmul_visible(heads.stack(probs), v, visible, heads.stack(self.acc_o), accumulate=j0 > first)
            masked |= bits is not None
        self._normalise(select)
        if masked:
            self.acc_o.add_(0.0)  # a hidden value times zero is -0 if negative, and with a single key nothing adds +0
        return masked

    def _probs(
        self,
        queries: tuple[Tensor, Tensor | None],
        k: Tensor,
        v: Tensor,
        bits: tuple[Tensor, Tensor] | None,
        first_tile: bool,
    ) -> Tensor:
        """Probabilities of a tile relative to row_max; row_sum and what acc_o has so far follow.

        row_max is the maximum over some tiles only: it is raised where a tile is masked, and in rows that exceed it by
        far, which their sums tell. Whether a row does so depends on what this row sees alone.
        """
        scores = self._scores(queries, k, v)
        if bits is not None:
            hide_invisible_(scores, *bits)
        if self.max_score is not None:
            self.max_score = torch.maximum(self.max_score, scores.amax(-1, keepdim=True))
        steady = bits is None and not first_tile
        if not steady:
            self._raise_row_max(scores, rescale=not first_tile)
        probs = scores.sub_(self.row_max).exp2_()
        row_sum = probs.sum(-1, keepdim=True)
        if steady and not row_sum.amax().item() <= FAR:
            scores = self._scores(queries, k, v)
            self._raise_row_max(scores, rows=~(row_sum <= FAR))
            probs = scores.sub_(self.row_max).exp2_()
            row_sum = probs.sum(-1, keepdim=True)
        self.row_sum.add_(row_sum)
        return probs

    def _scores(self, queries: tuple[Tensor, Tensor | None], k: Tensor, v: Tensor) -> Tensor:
        scores, softcap = self.heads.scores(*queries, k, v), self.heads.p.softcap
        return scores.tanh_().mul_(softcap * LOG2E) if softcap else scores

    def _raise_row_max(self, scores: Tensor, rows: Tensor | None = None, rescale: bool = True) -> None:
        """To the maximum of the scores, in all or in the given rows."""
        row_max = torch.maximum(scores.amax(-1, keepdim=True), self.row_max)
        if rows is not None:
            row_max = torch.where(rows, row_max, self.row_max)
        if rescale or self.sink is not None:
            decay = self.row_max.sub_(row_max).exp2_()
            self.row_sum.mul_(decay)
        if rescale:
            self.acc_o.mul_(decay)
        self.row_max = row_max

    def _normalise(self, select: bool) -> None:
        empty = self.row_sum == 0
        self.acc_o.div_(self.row_sum.masked_fill(empty, 1.0))
        if select:  # rows all of whose visible scores are -inf
            self.acc_o.masked_fill_(empty, 0.0)

    def lse(self) -> Tensor:
        lse = ((self.row_max.double() + self.row_sum.double().log2()) * LN2).float()
        if self.sink is not None:  # without rounding where nothing but the sink counts
            only_sink = (self.row_sum == 1) & (self.row_max == self.sink * LOG2E)
            lse = torch.where(only_sink, self.sink, lse)
        return lse[..., 0]
