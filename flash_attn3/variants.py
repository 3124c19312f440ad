# SPDX-License-Identifier: BSD-3-Clause
"""Every kernel variant, declared once: build, dispatch, tests and the README read this list.

A variant is what the compiler must know (it changes registers, shared memory or instructions); masks, lengths, strides
and GQA are run-time values of one and the same kernel. Nothing here imports torch: setup.py reads the list too.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch

    from .problem import AttentionProblem

DTYPES = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}

# Fields that are enumerations in hopper/config.h.
_ENUMS = {"dtype": "Dtype", "kv_source": "KvSource"}


@dataclass(frozen=True)
class Variant:
    """One kernel of an operation; the fields are those of its configuration in hopper/config.h, in that order."""

    operation: ClassVar[str]  # hopper/<operation>.cuh, hopper/<operation>_entry.cuh
    config: ClassVar[str]

    @property
    def name(self) -> str:
        raise NotImplementedError

    @property
    def entry(self) -> str:
        """The symbol of the kernel, the same in every cubin of the operation."""
        return f"fa3_{self.operation}"

    def stub(self) -> str:
        """The whole source of the kernel: its configuration between two includes."""
        settings = ", ".join(f".{field.name} = {self._literal(field.name)}" for field in fields(self))
        return (
            f'#include "{self.operation}.cuh"\n'
            "using namespace fa3;\n"
            f"constexpr {self.config} kConfig{{{settings}}};\n"
            f'#include "{self.operation}_entry.cuh"\n'
        )

    def _literal(self, field: str) -> str:
        """The value of a field in C++."""
        value = getattr(self, field)
        if field in _ENUMS:
            return f"{_ENUMS[field]}::{value}"
        return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class FwdVariant(Variant):
    operation = "fwd"
    config = "FwdConfig"

    dtype: str  # "bf16" or "fp16"
    head_dim: int  # the largest d and dv that it serves: the copy engine fills up with zeros
    head_dim_v: int
    block_m: int = 128  # query rows of a tile, 64 for each consumer warpgroup
    block_n: int = 128  # keys of a tile
    stages: int = 2  # tiles of K, and of V, in shared memory
    kv_source: str = "tma"  # "cp_async": for pages that no box of the copy engine fits
    ping_pong: bool = True  # consumer warpgroups take turns at the tensor cores

    @property
    def name(self) -> str:
        return (
            f"fwd_{self.dtype}_d{self.head_dim}_v{self.head_dim_v}_m{self.block_m}_n{self.block_n}"
            f"_s{self.stages}_{self.kv_source}" + "_pp" * self.ping_pong
        )


@dataclass(frozen=True)
class BwdVariant(Variant):
    operation = "bwd"
    config = "BwdConfig"

    dtype: str
    head_dim: int  # the largest d and dv that it serves
    head_dim_v: int
    block_m: int = 64  # query rows of a step
    block_n: int = 128  # keys of a CTA: 64 for each consumer warpgroup, or 64 that they share
    consumers: int = 2  # warpgroups
    stages: int = 2  # tiles of Q in shared memory
    stages_dout: int = 2  # of dout
    softcap: bool = False

    @property
    def name(self) -> str:
        return (
            f"bwd_{self.dtype}_d{self.head_dim}_v{self.head_dim_v}_m{self.block_m}_n{self.block_n}_w{self.consumers}"
            f"_s{self.stages}{self.stages_dout}" + "_cap" * self.softcap
        )


@dataclass(frozen=True)
class BwdPreprocessVariant(Variant):
    operation = "bwd_preprocess"
    config = "BwdPreprocessConfig"

    threads: int = 128

    @property
    def name(self) -> str:
        return f"bwd_preprocess_t{self.threads}"

    @property
    def block_m(self) -> int:
        """Any: that of the main kernel."""
        return 0


@dataclass(frozen=True)
class BwdPostprocessVariant(BwdPreprocessVariant):
    operation = "bwd_postprocess"
    config = "BwdPostprocessConfig"

    @property
    def name(self) -> str:
        return f"bwd_postprocess_t{self.threads}"


@dataclass(frozen=True)
class CombineVariant(Variant):
    operation = "combine"
    config = "CombineConfig"

    threads: int = 128  # a warp for each row

    @property
    def name(self) -> str:
        return f"combine_t{self.threads}"

    @property
    def block_m(self) -> int:
        """Rows of a CTA."""
        return self.threads // 32


@dataclass(frozen=True)
class AppendVariant(Variant):
    operation = "append_kv"
    config = "AppendConfig"

    threads: int = 128

    @property
    def name(self) -> str:
        return f"append_kv_t{self.threads}"

    @property
    def block_m(self) -> int:
        """Chunks of eight elements of a tile."""
        return 2 * self.threads


@dataclass(frozen=True)
class MergeVariant(Variant):
    operation = "merge_state"
    config = "MergeConfig"

    threads: int = 256

    @property
    def name(self) -> str:
        return f"merge_state_t{self.threads}"

    @property
    def block_m(self) -> int:
        """Chunks of eight elements of a tile."""
        return 2 * self.threads


# Keys of a tile by (head_dim, head_dim_v): as many as fit, with two stages and no spill, into 227 KB of shared memory
# and 240 registers of a thread. One for all masks and all sizes of the query tile, which therefore move no bits.
BLOCK_N = {(64, 64): 128, (96, 96): 128, (128, 128): 128, (192, 128): 128, (192, 192): 112, (256, 256): 80}
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
def bwd_variants() -> tuple[BwdVariant, ...]:
    return tuple(
        BwdVariant(dtype, d, dv, *tile, softcap=softcap)
        for dtype in ("bf16", "fp16")
        for (d, dv), tile in BWD_TILES.items()
        for softcap in (False, True)
    )


@functools.cache
def all_variants() -> tuple[Variant, ...]:
    """Of every operation."""
    return (*fwd_variants(), COMBINE, APPEND_KV, MERGE_STATE, BWD_PREPROCESS, *bwd_variants(), BWD_POSTPROCESS)


def by_name(name: str) -> Variant | None:
    return next((variant for variant in all_variants() if variant.name == name), None)


def select(p: AttentionProblem) -> FwdVariant | None:
    """The variant that computes `p`, None where no kernel does."""
    rows = p.q.shape[1] if p.cu_seqlens_q is None else min(p.max_seqlen_q, p.q.shape[0])
    if p.pack_gqa is not False:
        rows *= p.num_heads // max(1, p.num_heads_kv)
    page_size = None if p.page_table is None else p.k.shape[1]
    padded_pages = page_size is not None and p.leftpad_k is not None
    return _select(p.q.dtype, p.q.shape[-1], p.v.shape[-1], rows <= SMALL_TILE, page_size, padded_pages)


def box_keys(p: AttentionProblem, variant: FwdVariant) -> int:
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
    return str(p.q.dtype) in DTYPES and held_in(p.q.shape[-1], p.v.shape[-1]) is not None


def unsupported_reason(p: AttentionProblem) -> str | None:
    """Why no variant computes `p`, naming the nearest one that exists; None where one does.

    Looks at no length: what torch.compile traces would else be compiled anew for others.
    """
    return None if supports(p) else _reason(p.q.dtype, p.q.shape[-1], p.v.shape[-1])


def held_in(head_dim: int, head_dim_v: int) -> tuple[int, int] | None:
    """The smallest head dims of a kernel that hold these."""
    for held, held_v in BLOCK_N:  # from the smallest on
        if head_dim <= held and head_dim_v <= held_v:
            return held, held_v
    return None


def any_name(dtype: str, head_dim: int, head_dim_v: int) -> str:
    """The name of one kernel of these head dims."""
    return next(v.name for v in fwd_variants() if (v.dtype, v.head_dim, v.head_dim_v) == (dtype, head_dim, head_dim_v))


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


def select_bwd(p: AttentionProblem) -> BwdVariant | None:
    """The main kernel of the backward of `p`, None where there is none."""
    return _select_bwd(p.q.dtype, p.q.shape[-1], p.v.shape[-1], p.softcap > 0)


@functools.cache
def _select_bwd(dtype: torch.dtype, head_dim: int, head_dim_v: int, softcap: bool) -> BwdVariant | None:
    wanted = (DTYPES.get(str(dtype)), held_in(head_dim, head_dim_v), softcap)
    able = (v for v in bwd_variants() if (v.dtype, (v.head_dim, v.head_dim_v), v.softcap) == wanted)
    return next(able, None)


def bwd_names(dtype: str, head_dim: int, head_dim_v: int, softcap: bool) -> tuple[str, ...]:
    """The kernels of a backward."""
    wanted = (dtype, head_dim, head_dim_v, softcap)
    main = next(v.name for v in bwd_variants() if (v.dtype, v.head_dim, v.head_dim_v, v.softcap) == wanted)
    return BWD_PREPROCESS.name, main, BWD_POSTPROCESS.name


bwd_names._dynamo_marked_constant = True  # see runtime.py


@functools.cache
def _reason(dtype: torch.dtype, head_dim: int, head_dim_v: int) -> str:
    def distance(variant: FwdVariant) -> tuple[bool, int]:
        other_dtype = variant.dtype != DTYPES.get(str(dtype))
        return other_dtype, abs(variant.head_dim - head_dim) + abs(variant.head_dim_v - head_dim_v)

    nearest = min(fwd_variants(), key=distance)
    wanted = f"{str(dtype).removeprefix('torch.')} with head dims ({head_dim}, {head_dim_v})"
    return f"no forward kernel for {wanted}; the nearest is {nearest.name}"
