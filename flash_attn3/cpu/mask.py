# SPDX-License-Identifier: BSD-3-Clause
"""Which keys a row sees: an interval, the intersection of a few limits that never decrease from row to row.

A tree mask hides some of the last keys in it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import status
from ..problem import AttentionProblem
from .sequences import Sequence

NEG_INF_BITS = -(1 << 23)  # of float32 -inf
MAX_BANDS = 16

Bands = dict[tuple[int, ...], tuple[Tensor, Tensor]]  # masks of tiles, of which there are few if j - i alone counts


class Mask:
    """The visible keys of each row of one sequence; `bands` serves all sequences of a call."""

    def __init__(self, p: AttentionProblem, seq: Sequence, bands: Bands) -> None:
        self.bands = bands
        self.n_k = seq.n_k
        self.cp_world_size, self.cp_rank = p.cp_world_size, p.cp_rank
        self.num_all = seq.cp_total  # n_k, but for context parallel
        self.diagonal = seq.cp_total - seq.n_q
        # A limit that no pair reaches is dropped, which changes no result and keeps limits within int32.
        self.left = p.window_left if p.window_left < self.num_all else -1
        self.right = p.window_right if p.window_right < seq.n_q + self.num_all else -1
        self.chunk = min(p.attention_chunk, max(self.num_all, 1))
        self.tree = None if p.tree_mask is None else _rows_of_tree(p.tree_mask[seq.index], seq.n_q)

    def _first(self, i: int | Tensor) -> list:
        """Limits from which on row i, or each of rows i, sees keys."""
        position = i + self.diagonal
        limits = [position - self.left] if self.left >= 0 else []
        return limits + ([position // self.chunk * self.chunk] if self.chunk else [])

    def _end(self, i: int | Tensor) -> list:
        """Limits below which row i, or each of rows i, sees keys."""
        position = i + self.diagonal
        limits = [position + self.right + 1] if self.right >= 0 else []
        limits += [position // self.chunk * self.chunk + self.chunk] if self.chunk else []
        if self.cp_world_size == 1:
            return limits
        # Local key j is key j * cp_world_size + cp_rank of the whole sequence.
        return [(end - self.cp_rank - 1) // self.cp_world_size + 1 for end in [self.num_all, *limits]]

    def first(self, i: int) -> int:
        return max([0, *self._first(i)])

    def end(self, i: int) -> int:
        return min([self.n_k, *self._end(i)])

    def keys(self, i0: int, i1: int) -> tuple[int, int]:
        """The interval of keys that the rows [i0, i1) see between them."""
        return self.first(i0), self.end(i1 - 1)

    def blind(self, i0: int, i1: int) -> Tensor | None:
        """(i1 - i0, 1): whether row i sees no key; None where all see one."""
        num_visible = [self.end(i) - self.first(i) for i in range(i0, i1)]
        return None if min(num_visible) > 0 else torch.tensor(num_visible)[:, None] <= 0

    def bits(self, i0: int, i1: int, j0: int, j1: int) -> tuple[Tensor, Tensor] | None:
        """(i1 - i0, j1 - j0) int32 bit masks: all ones where row i sees key j and 0 elsewhere; 0 and -inf elsewhere.

        None where all pairs are visible.
        """
        in_tree = self.tree is not None and j1 > self.diagonal
        if self.first(i1 - 1) <= j0 and j1 <= self.end(i0) and not in_tree:
            return None
        if self.chunk or self.cp_world_size > 1 or in_tree:
            return self._bits(i0, i1, j0, j1)
        band = (self.left, self.right, i0 + self.diagonal - j0, i1 - i0, j1 - j0)
        if band not in self.bands:
            if len(self.bands) == MAX_BANDS:
                self.bands.clear()
            self.bands[band] = self._bits(i0, i1, j0, j1)
        return self.bands[band]

    def _bits(self, i0: int, i1: int, j0: int, j1: int) -> tuple[Tensor, Tensor]:
        rows = torch.arange(i0, i1, dtype=torch.int32)[:, None]
        keys = torch.arange(j0, j1, dtype=torch.int32)
        keep = torch.full((i1 - i0, j1 - j0), -1, dtype=torch.int32)
        for limit in self._first(rows):
            keep &= ~((keys - limit) >> 31)  # the sign of j - limit, in every bit
        for limit in self._end(rows):
            keep &= (keys - limit) >> 31
        if self.tree is not None:
            tokens = keys[keys >= self.diagonal] - self.diagonal
            words = self.tree[i0:i1].index_select(1, tokens >> 5)
            keep[:, j1 - j0 - len(tokens) :] &= -(words >> (tokens & 31) & 1)
        return keep, ~keep & NEG_INF_BITS


def _rows_of_tree(words: Tensor, n_q: int) -> Tensor:
    """(n_q, ceil(n_q / 32)) of the words of one sequence; what they lack is 0."""
    missing = n_q - words.shape[0]
    if missing <= 0:
        return words
    status.note("tree_mask")
    return F.pad(words, (0, max(-(-n_q // 32) - words.shape[1], 0), 0, missing))


def zero_invisible_(x: Tensor, keep: Tensor) -> None:
    """x[..., i, j] = 0 where not visible. An AND of bits, as torch's selections run 20 times slower on the CPU."""
    x.view(torch.int32).bitwise_and_(keep)


def hide_invisible_(scores: Tensor, keep: Tensor, fill: Tensor) -> None:
    """scores[..., i, j] = -inf where not visible."""
    scores.view(torch.int32).bitwise_and_(keep).bitwise_or_(fill)
