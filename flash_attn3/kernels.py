# SPDX-License-Identifier: BSD-3-Clause
"""What a variant of a kernel is made of: a class for each operation. Which variants there are, `variants.py` says."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import ClassVar

# Fields that are enumerations in hopper/config.h.
_ENUMS = {"dtype": "Dtype", "kv_source": "KvSource"}
_FWD_NAME = re.compile(r"fwd_(bf16|fp16)_d(\d+)_v(\d+)_m(\d+)_n(\d+)_s(\d+)_(tma|cp_async)(_pp)?(_nohold)?")
SMEM_BYTES = 227 * 1024  # of a CTA
SMEM_REST = 2048  # of those, for barriers and the schedule
PANEL_BYTES = 128  # of a row in shared memory: 64 columns


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
    hold: bool = True  # exponentials are computed while the second product runs, not after it

    @property
    def name(self) -> str:
        return (
            f"fwd_{self.dtype}_d{self.head_dim}_v{self.head_dim_v}_m{self.block_m}_n{self.block_n}"
            f"_s{self.stages}_{self.kv_source}" + "_pp" * self.ping_pong + "_nohold" * (not self.hold)
        )

    @classmethod
    def named(cls, name: str) -> FwdVariant | None:
        """The variant of this name, in the list or not; None if no kernel can be so."""
        found = _FWD_NAME.fullmatch(name)
        if found is None:
            return None
        dtype, *numbers, kv_source, ping_pong, nohold = found.groups()
        variant = cls(dtype, *map(int, numbers), kv_source, ping_pong is not None, nohold is None)
        return variant if variant.is_possible() else None

    def is_possible(self) -> bool:
        """Whether products have such sizes, and tiles have room."""
        products = self.head_dim % 16 == 0 < self.head_dim and self.head_dim_v % 32 == 0 < self.head_dim_v
        tiles = self.block_m in (64, 128, 192) and self.block_n % 16 == 0 and self.stages > 1
        return products and tiles and self.tile_bytes <= SMEM_BYTES - SMEM_REST

    @property
    def tile_bytes(self) -> int:
        """Of Q and all stages of K and V in shared memory."""
        panels, panels_v = -(-self.head_dim // 64), -(-self.head_dim_v // 64)
        return PANEL_BYTES * (panels * self.block_m + self.stages * (panels + panels_v) * self.block_n)


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
    dq: bool = True  # gradients that it can compute
    dk: bool = True
    dv: bool = True

    @property
    def name(self) -> str:
        return (
            f"bwd_{self.dtype}_d{self.head_dim}_v{self.head_dim_v}_m{self.block_m}_n{self.block_n}_w{self.consumers}"
            f"_s{self.stages}{self.stages_dout}" + "_cap" * self.softcap + self._some
        )

    @property
    def _some(self) -> str:
        names = [name for name in ("dq", "dk", "dv") if getattr(self, name)]
        return "" if len(names) == 3 else "_only_" + "".join(names)


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
class MlaVariant(Variant):
    """Values are keys too, and wide; all query heads of a tile share them."""

    operation = "mla"
    config = "MlaConfig"

    dtype: str
    head_dim: int  # of Q and K, as in FwdVariant
    head_dim_v: int  # of V, Qv and out
    block_m: int = 64
    block_n: int = 64
    stages: int = 2
    kv_source: str = "tma"

    @property
    def name(self) -> str:
        return (
            f"mla_{self.dtype}_d{self.head_dim}_v{self.head_dim_v}_m{self.block_m}_n{self.block_n}"
            f"_s{self.stages}_{self.kv_source}"
        )


@dataclass(frozen=True)
class CombineVariant(Variant):
    operation = "combine"
    config = "CombineConfig"

    threads: int = 128  # a warp for each row

    @property
    def name(self) -> str:
        return f"{self.operation}_t{self.threads}"

    @property
    def block_m(self) -> int:
        """Rows of a CTA."""
        return self.threads // 32


@dataclass(frozen=True)
class CombineSplitsVariant(CombineVariant):
    operation = "combine_splits"
    config = "CombineSplitsConfig"


@dataclass(frozen=True)
class MetadataVariant(Variant):
    operation = "metadata"
    config = "MetadataConfig"

    threads: int = 1024

    @property
    def name(self) -> str:
        return f"metadata_t{self.threads}"

    @property
    def block_m(self) -> int:
        """Sequences that the only CTA sorts in a step."""
        return self.threads


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
