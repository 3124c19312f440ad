# SPDX-License-Identifier: BSD-3-Clause
"""Every kernel variant, declared once: build, dispatch, tests and the README read this list.

A variant is what the compiler must know (it changes registers, shared memory or instructions); masks, lengths, strides
and GQA are run-time values of one and the same kernel. Nothing here imports torch: setup.py reads the list too.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from .kernels import (
    AppendVariant,
    BwdPostprocessVariant,
    BwdPreprocessVariant,
    BwdVariant,
    CombineSplitsVariant,
    CombineVariant,
    FwdVariant,
    MergeVariant,
    MetadataVariant,
    MlaVariant,
    Variant,
)

if TYPE_CHECKING:
    import torch

    from .problem import AttentionProblem

DTYPES = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}


class Tile(NamedTuple):
    block_n: int  # keys
    reason: str  # why not more


# By (head_dim, head_dim_v), of what fits, with two stages and no spill, into 227 KB of shared memory and 240 registers
# of a thread. One for all masks and all sizes of the query tile, which therefore move no bits. Causal masks want few
# keys: a block at the diagonal is computed whole. What full masks gain by more is to be timed: benchmarks/sweep_fwd.py.
FWD_TILES = {
    (64, 64): Tile(128, "192 fit, too, but masks cut larger tiles more often"),
    (96, 96): Tile(128, "192 fit, too, but masks cut larger tiles more often"),
    (128, 128): Tile(128, "176 fit, too (192 spill registers), but masks cut larger tiles more often"),
    (192, 128): Tile(128, "144 exceed shared memory"),
    (192, 192): Tile(112, "128 exceed shared memory"),
    (256, 256): Tile(80, "96 exceed shared memory"),
}
BLOCK_N = {dims: tile.block_n for dims, tile in FWD_TILES.items()}
MLA_DIMS = ((64, 256), (64, 512))  # of kernels whose values are keys too
SWIZZLE_ROWS = 8  # of 128 bytes, the period of the swizzle in shared memory
SMALL_TILE = 64  # query rows, for calls that have no more of them: half the work of a tile of 128

# Of the backward: (block_m, block_n, consumers, stages, stages_dout) by head dims. What fits with no spill into 227 KB
# of shared memory and the registers of 2 or 3 warpgroups.
BWD_TILES = {
    (64, 64): (128, 128, 2, 2, 2),
    (96, 96): (64, 128, 2, 2, 2),
    (128, 128): (64, 128, 2, 2, 2),
    (192, 128): (96, 64, 3, 2, 2),
    (192, 192): (96, 64, 3, 2, 1),
    (256, 256): (64, 64, 2, 2, 1),
}

COMBINE = CombineVariant()
COMBINE_SPLITS = CombineSplitsVariant()
METADATA = MetadataVariant()
APPEND_KV = AppendVariant()
MERGE_STATE = MergeVariant()
BWD_PREPROCESS = BwdPreprocessVariant()
BWD_POSTPROCESS = BwdPostprocessVariant()


@functools.cache
def fwd_variants() -> tuple[FwdVariant, ...]:
    return tuple(
        FwdVariant(dtype, d, dv, block_m, block_n, kv_source=kv_source, ping_pong=block_m > SMALL_TILE)
        for kv_source in ("tma", "cp_async")
        for dtype in ("bf16", "fp16")
        for (d, dv), block_n in BLOCK_N.items()
        for block_m in (SMALL_TILE, 128)
        if kv_source == "tma" or block_m == SMALL_TILE or dv <= 128  # else consumers leave producers no registers
    )


@functools.cache
def mla_variants() -> tuple[MlaVariant, ...]:
    return tuple(
        MlaVariant(dtype, d, dv, kv_source=kv_source)
        for kv_source in ("tma", "cp_async")
        for dtype in ("bf16", "fp16")
        for d, dv in MLA_DIMS
    )


@functools.cache
def bwd_variants() -> tuple[BwdVariant, ...]:
    return tuple(
        BwdVariant(dtype, d, dv, *tile, softcap=softcap)
        for dtype in ("bf16", "fp16")
        for (d, dv), tile in BWD_TILES.items()
        for softcap in (False, True)
    )


@functools.cache
def partial_bwd_variants() -> tuple[BwdVariant, ...]:
    """Those of `bwd_variants` for some of the gradients: rarely used, and compiled then."""
    return tuple(
        replace(variant, dq=dq, dk=dk, dv=dv)
        for variant in bwd_variants()
        for dq, dk, dv in itertools.product((False, True), repeat=3)
        if 0 < dq + dk + dv < 3
    )


@functools.cache
def all_variants() -> tuple[Variant, ...]:
    """Of every operation, without those that are no more than a part of another one."""
    small = (COMBINE, COMBINE_SPLITS, METADATA, APPEND_KV, MERGE_STATE)
    return (*fwd_variants(), *mla_variants(), *small, BWD_PREPROCESS, *bwd_variants(), BWD_POSTPROCESS)


def by_name(name: str) -> Variant | None:
    """The kernel of this name; of a forward also one that is not in the list."""
    listed = (*all_variants(), *partial_bwd_variants())
    return next((variant for variant in listed if variant.name == name), None) or FwdVariant.named(name)


def notes(names: str) -> list[str]:
    """A line for each forward among kernels named like `kernel_name`: its tile, and why it is that."""
    found = (by_name(name) for name in names.split(", "))
    return [
        f"{v.block_m} x {v.block_n} tiles of queries and keys, {v.tile_bytes // 1024} KB of shared memory: "
        f"{FWD_TILES[v.head_dim, v.head_dim_v].reason}"
        for v in found
        if isinstance(v, FwdVariant)
    ]


def only_qv(p: AttentionProblem) -> bool:
    """Whether q of `p` is qv: nothing else is so wide. At 256 any kernel of that width serves."""
    return p.q.shape[-1] > 256


def is_mla(p: AttentionProblem) -> bool:
    """Whether it takes a kernel whose values are keys too."""
    return p.qv is not None or p.v.shape[-1] > 256


def select(p: AttentionProblem) -> FwdVariant | MlaVariant | None:
    """The variant that computes `p`, None where no kernel does."""
    rows = p.q.shape[1] if p.cu_seqlens_q is None else min(p.max_seqlen_q, p.q.shape[0])
    if p.pack_gqa is not False:
        rows *= p.num_heads // max(1, p.num_heads_kv)
    page_size = None if p.page_table is None else p.k.shape[1]
    padded_pages = page_size is not None and p.leftpad_k is not None
    if is_mla(p):
        return _select_mla(p.q.dtype, dims_of(p), page_size, padded_pages)
    return _select(p.q.dtype, p.q.shape[-1], p.v.shape[-1], rows <= SMALL_TILE, page_size, padded_pages)


def box_keys(p: AttentionProblem, variant: FwdVariant | MlaVariant) -> int:
    """Keys that the copy engine takes at once, for they lie in one page; 0 where threads copy rows."""
    if variant.kv_source != "tma":
        return 0
    return variant.block_n if p.page_table is None else math.gcd(variant.block_n, p.k.shape[1])


def _kv_source(block_n: int, page_size: int | None, padded_pages: bool) -> str:
    """How keys are loaded. A box lies in one page, at a period of the swizzle: not if a padding shifts keys."""
    if page_size is None:
        return "tma"
    return "cp_async" if padded_pages or math.gcd(block_n, page_size) < SWIZZLE_ROWS else "tma"


def supports(p: AttentionProblem) -> bool:
    return str(p.q.dtype) in DTYPES and dims_of(p) is not None


def unsupported_reason(p: AttentionProblem) -> str | None:
    """Why no variant computes `p`, naming the nearest one that exists; None where one does.

    Looks at no length: what torch.compile traces would else be compiled anew for others.
    """
    return None if supports(p) else _reason(p.q.dtype, p.q.shape[-1], p.v.shape[-1])


def dims_of(p: AttentionProblem) -> tuple[int, int] | None:
    """The head dims of the kernels that compute `p`."""
    if is_mla(p):
        return next(((d, dv) for d, dv in MLA_DIMS if p.v.shape[-1] <= dv), None)
    return held_in(p.q.shape[-1], p.v.shape[-1])


def held_in(head_dim: int, head_dim_v: int) -> tuple[int, int] | None:
    """The smallest head dims of a kernel that hold these."""
    for held, held_v in BLOCK_N:  # from the smallest on
        if head_dim <= held and head_dim_v <= held_v:
            return held, held_v
    return None


def any_name(dtype: str, head_dim: int, head_dim_v: int) -> str:
    """The name of one kernel of these head dims."""
    kernels = (*fwd_variants(), *mla_variants())
    return next(v.name for v in kernels if (v.dtype, v.head_dim, v.head_dim_v) == (dtype, head_dim, head_dim_v))


any_name._dynamo_marked_constant = True  # see runtime.py


@functools.cache
def _select(
    dtype: torch.dtype, head_dim: int, head_dim_v: int, small: bool, page_size: int | None, padded_pages: bool
) -> FwdVariant | None:
    held = held_in(head_dim, head_dim_v)
    rows = SMALL_TILE if small else 128
    able = (
        variant
        for variant in fwd_variants()
        if variant.dtype == DTYPES.get(str(dtype))
        and (variant.head_dim, variant.head_dim_v) == held
        and variant.kv_source == _kv_source(variant.block_n, page_size, padded_pages)
    )
    return min(able, key=lambda variant: abs(variant.block_m - rows), default=None)


def select_bwd(p: AttentionProblem, dq: bool = True, dk: bool = True, dv: bool = True) -> BwdVariant | None:
    """The main kernel of these gradients of `p`, None where there is none; for no gradient, the one of all."""
    wanted = (dq, dk, dv) if dq or dk or dv else (True, True, True)
    return _select_bwd(p.q.dtype, p.q.shape[-1], p.v.shape[-1], p.softcap > 0, wanted)


@functools.cache
def _select_bwd(
    dtype: torch.dtype, head_dim: int, head_dim_v: int, softcap: bool, grads: tuple[bool, bool, bool]
) -> BwdVariant | None:
    wanted = (DTYPES.get(str(dtype)), held_in(head_dim, head_dim_v), softcap, grads)
    able = (
        v
        for v in (*bwd_variants(), *partial_bwd_variants())
        if (v.dtype, (v.head_dim, v.head_dim_v), v.softcap, (v.dq, v.dk, v.dv)) == wanted
    )
    return next(able, None)


def bwd_names(dtype: str, head_dim: int, head_dim_v: int, softcap: bool) -> tuple[str, ...]:
    """The kernels of a backward."""
    wanted = (dtype, head_dim, head_dim_v, softcap)
    main = next(v.name for v in bwd_variants() if (v.dtype, v.head_dim, v.head_dim_v, v.softcap) == wanted)
    return BWD_PREPROCESS.name, main, BWD_POSTPROCESS.name


bwd_names._dynamo_marked_constant = True  # see runtime.py


@functools.cache
def _select_mla(
    dtype: torch.dtype, dims: tuple[int, int], page_size: int | None, padded_pages: bool
) -> MlaVariant | None:
    able = (
        variant
        for variant in mla_variants()
        if variant.dtype == DTYPES.get(str(dtype))
        and (variant.head_dim, variant.head_dim_v) == dims
        and variant.kv_source == _kv_source(variant.block_n, page_size, padded_pages)
    )
    return next(able, None)


@functools.cache
def _reason(dtype: torch.dtype, head_dim: int, head_dim_v: int) -> str:
    def distance(variant: FwdVariant) -> tuple[bool, int]:
        other_dtype = variant.dtype != DTYPES.get(str(dtype))
        return other_dtype, abs(variant.head_dim - head_dim) + abs(variant.head_dim_v - head_dim_v)

    nearest = min(fwd_variants(), key=distance)
    wanted = f"{str(dtype).removeprefix('torch.')} with head dims ({head_dim}, {head_dim_v})"
    return f"no forward kernel for {wanted}; the nearest is {nearest.name}"
