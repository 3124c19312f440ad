# SPDX-License-Identifier: BSD-3-Clause
"""Tiles: how queries, keys and values are cut, read as fp32, and multiplied.

Products run in fp32 for every dtype, because torch has no 16-bit product with an fp32 result on the CPU. For a
given number of rows their bits depend neither on the number of heads multiplied at once nor on strides nor on the
number of threads, and from 16 rows on not on the number of rows: on that the bitwise promises rest.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import status
from ..problem import AttentionProblem
from .mask import Bands, Mask
from .sequences import Sequence

LOG2E = math.log2(math.e)
LN2 = math.log(2)
DESCALE_BLOCK = 128  # tokens that share a block descale
TILE_ELEMENTS = 1 << 19  # scores in a tile: 2 MiB, about what the cores' L2 caches hold together


class Workspace:
    """What is reused from tile to tile: named fp32 scratch memory, and masks."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[str, dict[tuple[int, ...], Tensor]] = {}  # of the buffers, by shape
        self.bands: Bands = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Contiguous and uninitialised; valid until `name` is taken again."""
        views = self._views.setdefault(name, {})
        if shape not in views:
            size = math.prod(shape)
            buffer = self._buffers.get(name)
            if buffer is None or buffer.numel() < size:
                buffer = self._buffers[name] = torch.empty(size, dtype=torch.float32)
                views.clear()
            views[shape] = buffer[:size].view(shape)
        return views[shape]


class HeadGroup:
    """Heads [head_kv0, head_kv1) of one sequence, with the `group` query heads of each, read as fp32 tiles.

    The rows of a group's query heads are stacked to one matrix, so that products with K and V serve all of them
    and sums over the group (dk, dv) cost nothing.
    """

    def __init__(self, p: AttentionProblem, seq: Sequence, head_kv0: int, head_kv1: int, work: Workspace) -> None:
        self.p, self.seq, self.work = p, seq, work
        self.mask = Mask(p, seq, work.bands)
        self.group = p.num_heads // p.num_heads_kv
        self.heads_kv = slice(head_kv0, head_kv1)
        self.heads = slice(head_kv0 * self.group, head_kv1 * self.group)
        self.num_heads_kv, self.num_heads = head_kv1 - head_kv0, (head_kv1 - head_kv0) * self.group
        scale = p.softmax_scale
        self.q_factor = scale / p.softcap if p.softcap else scale * LOG2E
        self.k = _key_rows(p.k[..., self.heads_kv, :], p, seq)
        self.v = _key_rows(p.v[..., self.heads_kv, :], p, seq)

    def rows(self, x: Tensor) -> Tensor:
        """(heads, n_q, ...) of x (b, s_q, h, ...) or (t_q, h, ...)."""
        x = x[self.seq.index] if self.p.cu_seqlens_q is None else x
        return x[self.seq.q_start : self.seq.q_start + self.seq.n_q, self.heads].transpose(0, 1)

    def stats(self, x: Tensor) -> Tensor:
        """(heads, n_q) of x (b, h, s_q) or (h, t_q)."""
        x = x[self.seq.index] if self.p.cu_seqlens_q is None else x
        return x[self.heads, self.seq.q_start : self.seq.q_start + self.seq.n_q]

    def stack(self, x: Tensor) -> Tensor:
        """(heads, rows, n) as (heads_kv, group * rows, n)."""
        return x.view(self.num_heads_kv, -1, x.shape[-1])

    def stack_visible(self, keep: Tensor) -> Tensor:
        """(rows, keys) or (heads, rows, keys) bit masks as (heads_kv, group * rows, keys) bool."""
        return (keep != 0).expand(self.num_heads, -1, -1).reshape(self.num_heads_kv, -1, keep.shape[-1])

    def keys(self, x: Tensor) -> Tensor:
        """(heads_kv, n_k, n) of x (b, s_k, h_kv, n) or (t_k, h_kv, n)."""
        return _key_rows(x[..., self.heads_kv, :], self.p, self.seq).transpose(0, 1)

    def row_tile(self, name: str, x: Tensor, i0: int, i1: int) -> Tensor:
        """Rows [i0, i1) of x (as in `rows`) in fp32, (heads, i1 - i0, n)."""
        x = self.rows(x)[:, i0:i1]
        return self.work.take(name, *x.shape).copy_(x)

    def query_tile(self, i0: int, i1: int) -> tuple[Tensor, Tensor | None]:
        """q and qv, stacked and scaled so that `scores` are what tanh or exp2 takes."""
        q = self.row_tile("q", self.p.q, i0, i1).mul_(self.q_factor)
        if self.p.q_descale is not None:
            q.mul_(_descale(self.p.q_descale[self.seq.index], self.heads, self.group, i0, i1))
        if self.p.qv is None:
            return self.stack(q), None
        return self.stack(q), self.stack(self.row_tile("qv", self.p.qv, i0, i1).mul_(self.q_factor))

    def key_tile(self, j0: int, j1: int) -> tuple[Tensor, Tensor]:
        """k and v of keys [j0, j1), (heads_kv, j1 - j0, d|dv)."""
        k = self._dequantised("k", self.k, self.p.k_descale, j0, j1)
        return k, self._dequantised("v", self.v, self.p.v_descale, j0, j1)

    def _dequantised(self, name: str, rows: Tensor | _PagedRows, descale: Tensor | None, j0: int, j1: int) -> Tensor:
        x = rows[j0:j1]
        if x.dtype == torch.float32 and x.stride(0) >= x.shape[2]:
            return x.transpose(0, 1)
        x = self.work.take(name, *x.shape).copy_(x).transpose(0, 1)
        if descale is not None:
            first = self.seq.left_padding
            x.mul_(_descale(descale[self.seq.index], self.heads_kv, 1, first + j0, first + j1))
        return x

    def scores(self, q: Tensor, qv: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
        """(heads, rows, keys): the scaled products of a tile, in units of log 2 (of softcap, if there is one)."""
        scores = self.work.take("scores", *q.shape[:2], k.shape[1])
        matmul(q, k.transpose(1, 2), scores)
        if qv is not None:
            matmul(qv, v.transpose(1, 2), scores, accumulate=True)
        return scores.view(self.num_heads, -1, k.shape[1])


def block_shape(p: AttentionProblem, seq: Sequence, block_n: int) -> tuple[int, int]:
    """(heads_kv, block_m): key/value heads and query rows of a tile of scores with `block_n` keys."""
    group = p.num_heads // max(p.num_heads_kv, 1)
    rows = TILE_ELEMENTS // block_n
    block_m = max(min(256, rows // max(group, 1), seq.n_q), 1)
    heads_by_scores = rows // (max(group, 1) * block_m)
    heads_by_keys = TILE_ELEMENTS // (block_n * max(p.head_dim, p.head_dim_v))
    return max(min(heads_by_scores, heads_by_keys), 1), block_m


def matmul(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """out (+)= a @ b for batches of matrices; `out` contiguous."""
    if len(a) == 1 and a.shape[1] % 2 == 0:  # two halves: torch.bmm runs one matrix on each thread
        a, out_ = a[0].unflatten(0, (2, -1)), out.view(2, -1, out.shape[-1])
        b = b.expand(2, -1, -1)
    else:
        out_ = out
    if accumulate:
        torch.baddbmm(out_, a, b, out=out_)
    else:
        torch.bmm(a, b, out=out_)
    return out


def matmul_visible(a: Tensor, b: Tensor, visible: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """matmul where a is 0 unless `visible`, broadcastable to a; such terms add nothing even if b is not finite."""
    finite = b.isfinite()
    matmul(a, b.where(finite, 0.0), out, accumulate)
    special = b.where(~finite, 0.0)
    for j in (~finite).any(-1).any(0).nonzero()[:, 0].tolist():
        out.add_(torch.where(visible[..., j, None], a[..., j, None] * special[:, j, None], 0.0))
    return out


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of the rows of a and b (heads, rows, n), (heads, rows, 1), with the bits that matmul gives them.

    Where out is one value, dout . out then is the same number as dout . v. Other orders of summation would leave a
    rounding error of the size of both, all that is left of dscores there. Hence 16 x 16 products and their diagonals.
    """
    num_rows = a.shape[0] * a.shape[1]
    a16, b16 = (F.pad(x.flatten(0, 1), (0, 0, 0, -num_rows % 16)).view(-1, 16, x.shape[-1]) for x in (a, b))
    diagonals = torch.bmm(a16, b16.transpose(1, 2)).diagonal(dim1=1, dim2=2)
    return diagonals.flatten()[:num_rows].view(*a.shape[:2], 1)


def is_finite(x: Tensor) -> bool:
    """False if any element is not finite, or the sum overflows."""
    return math.isfinite(x.sum().item())


def _key_rows(x: Tensor, p: AttentionProblem, seq: Sequence) -> Tensor | _PagedRows:
    """The rows of keys 0 to n_k - 1, to be sliced: (n_k, heads, d)."""
    if p.page_table is not None:
        return _PagedRows(x, p.page_table[seq.row], seq)
    x = x if p.cu_seqlens_k is not None else x[seq.row]
    return x[seq.k_start : seq.k_start + seq.n_k]


class _PagedRows:
    """Rows scattered over pages (num_pages, page_size, heads, d), gathered when they are sliced."""

    def __init__(self, pages: Tensor, table: Tensor, seq: Sequence) -> None:
        num_pages, page_size = pages.shape[:2]
        slots = torch.arange(seq.k_start, seq.k_start + seq.n_k)
        ids = table.index_select(0, slots // page_size).long()
        valid = ids.clamp(0, max(num_pages - 1, 0))
        if not torch.equal(valid, ids):
            status.note("page_table")
        # Row r of the view starts r slot strides into the pages: one index for page and slot gathers ten times faster.
        step = pages.stride(1) if page_size > 1 else pages.stride(0)
        if step == 0 or pages.stride(0) % step:
            pages = pages.contiguous()
            step = pages.stride(1)
        page_step = pages.stride(0) // step if num_pages else 0
        num_rows = (num_pages - 1) * page_step + page_size if num_pages else 0
        self.x = pages.as_strided((num_rows, *pages.shape[2:]), (step, *pages.stride()[2:]))
        self.index = valid * page_step + slots % page_size

    def __getitem__(self, keys: slice) -> Tensor:
        return self.x.index_select(0, self.index[keys])


def _descale(descale: Tensor, heads: slice, group: int, first: int, stop: int) -> Tensor:
    """Descales of one sequence, (h_kv,) or (heads, blocks), of tokens [first, stop): (heads, stop - first or 1, 1)."""
    if descale.ndim == 1:
        return descale.repeat_interleave(group)[heads, None, None]
    blocks = torch.arange(first, stop) // DESCALE_BLOCK
    return descale[heads].index_select(1, blocks)[..., None]
