# SPDX-License-Identifier: BSD-3-Clause
"""What every layer below the public functions sees: validated, normalised, frozen arguments.

The fields of a problem are, in this order, the arguments of the torch.library ops (`ops.py` derives the
schemas from the annotations, plus the name of the backend), so an argument is declared here and nowhere else.

Letters: b batch, s_q/s_k lengths, t_q/t_k packed totals, h query heads, h_kv key/value heads, d head dim of
Q and K, dv head dim of V.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(accumulate((max(1, size) for size in shape[:0:-1]), operator.mul, initial=1))[::-1]


class derived:
    """A property that `replay` finds once for all problems of a plan: it may stand among the attributes."""

    def __init__(self, find: Callable[[Any], Any]):
        self.find = find

    def __get__(self, problem: Any, owner: type | None = None) -> Any:
        return self if problem is None else self.find(problem)


def assembled(kind: type, attributes: dict[str, Any]) -> Any:
    """A problem of all its fields, and of what is derived: what the constructor does, ten times faster."""
    problem = object.__new__(kind)
    object.__setattr__(problem, "__dict__", attributes)
    return problem


@dataclass(frozen=True, eq=False)
class AttentionProblem:
    """One attention call.

    Effective lengths of sequence n :
        n_q = seqused_q[n], else cu_seqlens_q[n+1] - cu_seqlens_q[n], else s_q
        n_k = (seqused_k[n], else cu_seqlens_k[n+1] - cu_seqlens_k[n], else capacity)
              - leftpad_k[n] + appended,   appended = seqlen_k_new or the extent in cu_seqlens_k_new
    Key j of row i is visible iff, with p = i + n_k - n_q, p - window_left <= j <= p + window_right (-1: unbounded)
    and, with attention_chunk c > 0, j // c == p // c. A causal mask is window_right = 0. With a tree mask the last n_q
    keys are draft tokens: of them row i sees token u only if bit u of tree_mask[n, i] is set.
    """

    q: Tensor  # (b, s_q, h, d), packed (t_q, h, d)
    k: Tensor  # (b_c, s_k, h_kv, d), packed (t_k, h_kv, d), pages (num_pages, page_size, h_kv, d)
    v: Tensor  # as k, with dv
    qv: Tensor | None  # as q, with dv: scores gain qv @ v^T
    cu_seqlens_q: Tensor | None  # (b + 1,) int32, as are all index tensors; q is packed
    cu_seqlens_k: Tensor | None  # (b + 1,); k and v are packed
    cu_seqlens_k_new: Tensor | None  # (b + 1,); extents appended to the cache by this call
    seqused_q: Tensor | None  # (b,)
    seqused_k: Tensor | None  # (b,); for a cache: valid slots before this call, left padding included
    leftpad_k: Tensor | None  # (b,); slots [0, leftpad_k) are invisible
    kv_batch_idx: Tensor | None  # (b,); row of the cache, or of the page table
    page_table: Tensor | None  # (b_c, pages_per_sequence)
    q_descale: Tensor | None  # (b, h_kv) or blocks of 128 rows (b, h, ceil(s_q / 128)) fp32
    k_descale: (
        Tensor | None
    )  # (b, h_kv) or (b, h_kv, ceil(s_k / 128)) fp32; blocks count from slot 0, left padding included
    v_descale: Tensor | None  # as k_descale
    s_aux: Tensor | None  # (h,) sink logits
    cp_tot_seqused_k: Tensor | None  # (b,) keys of the sequence over all context-parallel ranks
    tree_mask: Tensor | None  # (b, s, ceil(s / 32)), s = s_q, of packed q at least the most rows of a sequence
    scheduler_metadata: Tensor | None  # a hint for Hopper kernels
    max_seqlen_q: int  # bounds launches and heuristics; no part of the meaning
    max_seqlen_k: int
    seqlen_k_new: int  # slots appended to every sequence (0 with cu_seqlens_k_new)
    softmax_scale: float
    window_left: int
    window_right: int
    attention_chunk: int
    softcap: float
    num_splits: int
    pack_gqa: bool | None
    deterministic: bool
    sm_margin: int
    cp_world_size: int
    cp_rank: int
    batch_invariant: bool
    return_max_logits: bool
    out_dtype: torch.dtype

    DERIVED = ("out_shape", "out_stride", "lse_shape", "lse_stride", "prepared")

    @property
    def batch(self) -> int:
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def num_heads(self) -> int:
        return self.q.shape[-2]

    @property
    def num_heads_kv(self) -> int:
        return self.k.shape[-2]

    @property
    def head_dim(self) -> int:
        return self.q.shape[-1]

    @property
    def head_dim_v(self) -> int:
        return self.v.shape[-1]

    @property
    def key_capacity(self) -> int:
        """Slots of a sequence, or all packed ones."""
        pages = 1 if self.page_table is None else self.page_table.shape[1]
        return pages * self.k.shape[-3]

    @derived
    def lse_shape(self) -> tuple[int, ...]:
        """(b, h, s_q) for dense q, (h, t_q) for packed q."""
        if self.cu_seqlens_q is None:
            return (self.q.shape[0], self.q.shape[2], self.q.shape[1])
        return (self.q.shape[1], self.q.shape[0])

    @derived
    def out_shape(self) -> tuple[int, ...]:
        return (*self.q.shape[:-1], self.v.shape[-1])

    @derived
    def out_stride(self) -> tuple[int, ...]:
        """Of a contiguous out."""
        return contiguous(self.out_shape)

    @derived
    def lse_stride(self) -> tuple[int, ...]:
        return contiguous(self.lse_shape)

    @derived
    def prepared(self) -> dict[Any, Any]:
        """What a backend prepared for all problems of a plan; the key says for which bounds. Holds no tensor."""
        return {}

    def arguments(self) -> tuple:
        """The field values in order: the argument list of the op."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def with_q(self, q: Tensor) -> AttentionProblem:
        """The same call on other queries; what is derived stays, since the shape does."""
        return (
            replace(self, q=q) if torch.compiler.is_compiling() else assembled(AttentionProblem, vars(self) | {"q": q})
        )


@dataclass(frozen=True, eq=False)
class AppendProblem:
    """Write new keys (rotated when tables are given) and values into a cache; and rotate queries.

    New key u of sequence n goes to slot cache_seqlens[n] + u, rotated for position p0 + u with
    p0 = rotary_seqlens[n], else cache_seqlens[n].
    """

    k_cache: Tensor  # (b_c, s_c, h_kv, d) or pages (num_pages, page_size, h_kv, d); written
    v_cache: Tensor  # as k_cache, with dv; written
    k: Tensor  # (b, s_new, h_kv, d) or packed (t_new, h_kv, d)
    v: Tensor
    cache_seqlens: Tensor  # (b,) int32
    rotary_cos: Tensor | None  # (s_ro, rotary_dim / 2)
    rotary_sin: Tensor | None
    rotary_seqlens: Tensor | None  # (b,)
    kv_batch_idx: Tensor | None  # (b,)
    page_table: Tensor | None  # (b_c, pages_per_sequence)
    cu_seqlens_k_new: Tensor | None  # (b + 1,)
    k_descale: Tensor | None  # (b, h_kv) or (b, h_kv, blocks): 16-bit k into an e4m3 cache
    v_descale: Tensor | None
    q: Tensor | None  # (b, s_q, h, d) or packed (t_q, h, d), to be rotated too; None without tables
    cu_seqlens_q: Tensor | None  # (b + 1,); q is packed
    q_advances: bool  # row i of q is rotated for position p0 + i, not for p0
    rotary_interleaved: bool

    DERIVED = ("prepared",)

    @property
    def positions(self) -> Tensor:
        """(b,) p0 of each sequence."""
        return self.cache_seqlens if self.rotary_seqlens is None else self.rotary_seqlens

    @derived
    def prepared(self) -> dict[Any, Any]:
        """As of an AttentionProblem."""
        return {}

    def arguments(self) -> tuple:
        return tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, eq=False)
class ScheduleProblem:
    """A schedule to make for calls on caches, see `AttentionProblem`: what it may depend on."""

    seqused_k: Tensor  # (b,) int32
    cu_seqlens_q: Tensor | None  # (b + 1,)
    leftpad_k: Tensor | None  # (b,)
    max_seqlen_q: int
    max_seqlen_k: int
    num_heads: int
    num_heads_kv: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype  # of q
    window_left: int
    window_right: int
    attention_chunk: int
    has_softcap: bool
    num_splits: int
    pack_gqa: bool | None
    batch_invariant: bool

    @property
    def batch(self) -> int:
        return self.seqused_k.shape[0]

    def arguments(self) -> tuple:
        return tuple(getattr(self, field.name) for field in fields(self))
