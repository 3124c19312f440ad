# SPDX-License-Identifier: BSD-3-Clause
"""Which cases to try, and the public function that a case fits."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

CACHE_NAMES = {
    "k": "k_cache",
    "v": "v_cache",
    "seqused_k": "cache_seqlens",
    "kv_batch_idx": "cache_batch_idx",
    "leftpad_k": "cache_leftpad",
    "k_new": "k",
    "v_new": "v",
}
CACHE_ARGUMENTS = {"kv_batch_idx", "leftpad_k", "k_new", "tree_mask"}
VARLEN_ARGUMENTS = {"cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "page_table", "cp_world_size"}


def call(case: dict[str, Any], **options: Any) -> tuple[Tensor, ...]:
    """(out, lse) of the public function that fits the case; `options` are further arguments of it."""
    import flash_attn3

    arguments = {"return_softmax_lse": True} | case | options
    dense_q = "cu_seqlens_q" not in case and "seqused_q" not in case
    if arguments.keys() & CACHE_ARGUMENTS or (dense_q and "seqused_k" in case and "cp_world_size" not in case):
        arguments = {CACHE_NAMES.get(name, name): argument for name, argument in arguments.items()}
        arguments.setdefault("num_splits", 1)
        return flash_attn3.flash_attn_with_kvcache(**arguments, only_qv=arguments["q"] is None)
    if arguments.keys() & VARLEN_ARGUMENTS:
        required = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"))
        return flash_attn3.flash_attn_varlen_func(**required | arguments)
    return flash_attn3.flash_attn_func(**arguments)


def pairwise(axes: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Few cases in which each pair of values of two axes occurs; greedy, and the same list every time."""
    names = list(axes)
    uncovered = {
        frozenset([(a, i), (b, j)]): None
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(axes[a])), range(len(axes[b])))
    }
    chosen: list[dict[str, int]] = []
    times = Counter()
    while uncovered:
        row = dict(sorted(next(iter(uncovered))))
        for name in names:
            if name not in row:
                row[name] = max(
                    range(len(axes[name])),
                    key=lambda i, name=name: (
                        sum(frozenset([(name, i), other]) in uncovered for other in row.items()),
                        -times[name, i],
                    ),
                )
        for pair in itertools.combinations(row.items(), 2):
            uncovered.pop(frozenset(pair), None)
        times.update(row.items())
        chosen.append(row)
    return [{name: axes[name][row[name]] for name in names} for row in chosen]


def boundary_sizes(most: int, tiles: tuple[int, ...] = (16, 64, 128)) -> list[int]:
    """0, 1, 2, the tile edges and their neighbours, and a few primes, up to `most`."""
    edges = {tile * times + off for tile in tiles for times in (1, 2) for off in (-1, 0, 1)}
    return sorted(size for size in {0, 1, 2, 7, 37, 97, 191, most} | edges if size <= most)


def sizes(most: int, least: int = 0) -> SearchStrategy[int]:
    """A hypothesis strategy of sizes in [least, most] that prefers the boundary ones."""
    from hypothesis import strategies

    preferred = [size for size in boundary_sizes(most) if size >= least]
    return strategies.one_of(strategies.sampled_from(preferred), strategies.integers(least, most))
