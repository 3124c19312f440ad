# SPDX-License-Identifier: BSD-3-Clause
"""The work that is timed: shapes, how many pairs they see, how many operations and bytes that is.

FLOP are those of visible pairs: 2 h (d + dv) each in the forward, 2.5 times that in the backward, whatever a kernel
computes in vain. Decode is counted in bytes: K and V once for each KV head, Q and O.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
}
FORWARD, BACKWARD, BOTH = 1.0, 2.5, 3.5  # operations in units of the forward


@dataclass(frozen=True)
class Shape:
    """b sequences of s queries and s keys, or the ragged `lengths`; window: keys left of the diagonal, -1 all."""

    b: int
    s: int
    h: int
    h_kv: int
    d: int
    dv: int
    dtype: str = "bf16"
    causal: bool = False
    window: int = -1
    lengths: tuple[int, ...] = ()

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def mask(self) -> str:
        if self.window >= 0:
            return f"window {self.window}"
        return "causal" if self.causal else "full"

    @property
    def heads(self) -> str:
        dims = f"D{self.d}" if self.d == self.dv else f"D{self.d}/{self.dv}"
        return f"H{self.h} {dims}" if self.h == self.h_kv else f"H{self.h}/{self.h_kv} {dims}"

    def visible_pairs(self) -> int:
        """Pairs of a query and a key that it sees, of all sequences and one head."""
        return sum(visible_pairs(n, self.causal, self.window) for n in self.lengths or (self.s,) * self.b)

    def flops(self, work: float = FORWARD) -> int:
        return int(work * 2 * self.h * (self.d + self.dv) * self.visible_pairs())


def visible_pairs(n: int, causal: bool, window: int) -> int:
    """Row i sees keys [max(0, i - window), i] if causal, else up to n - 1."""
    pairs = n * (n + 1) // 2 if causal else n * n
    if window < 0:
        return pairs
    hidden = max(0, n - 1 - window)  # row window + r has r keys too far left
    return pairs - hidden * (hidden + 1) // 2


@dataclass(frozen=True)
class DecodeShape:
    """b sequences of one query over `keys` cached keys, in pages or (page_size 0) in one piece."""

    b: int
    keys: int
    h: int
    h_kv: int
    d: int
    page_size: int = 0
    dtype: str = "bf16"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def heads(self) -> str:
        return f"H{self.h}/{self.h_kv} D{self.d}"

    def bytes(self) -> int:
        cache = 2 * self.b * self.keys * self.h_kv * self.d
        return (cache + 2 * self.b * self.h * self.d) * self.torch_dtype.itemsize


@dataclass(frozen=True)
class Composition:
    """A forward of Dynamic SplitFuse: of `budget` tokens `decodes` stand alone, the others are a piece of a prompt.

    Each sequence has `context` tokens in the cache before, in pages.
    """

    decodes: int
    budget: int = 768
    context: int = 1024
    h: int = 32
    h_kv: int = 8
    d: int = 128
    page_size: int = 64
    dtype: str = "fp16"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def new(self) -> tuple[int, ...]:
        """New tokens of each sequence."""
        return (1,) * self.decodes + ((self.budget - self.decodes,) if self.decodes < self.budget else ())

    def flops(self) -> int:
        return 4 * self.h * self.d * sum(n * self.context + visible_pairs(n, True, -1) for n in self.new)


def inputs(shape: Shape, device: str, seed: int = 0) -> dict[str, Tensor]:
    """q, k, v, dout of N(0, 1); (b, s, heads, d), or packed (t, heads, d) with cu_seqlens."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = (sum(shape.lengths),) if shape.lengths else (shape.b, shape.s)
    sizes = {
        "q": (shape.h, shape.d),
        "k": (shape.h_kv, shape.d),
        "v": (shape.h_kv, shape.dv),
        "dout": (shape.h, shape.dv),
    }
    made = {
        name: torch.randn(*rows, *size, device=device, generator=generator).to(shape.torch_dtype)
        for name, size in sizes.items()
    }
    if shape.lengths:
        made["cu_seqlens"] = torch.tensor([0, *shape.lengths], device=device).cumsum(0).int()
    return made


def decode_inputs(shape: DecodeShape, device: str, seed: int = 0) -> dict[str, Tensor]:
    """q (b, 1, h, d), caches (b, keys, h_kv, d) or pages in random order with their table."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator).to(shape.torch_dtype)

    made = {"q": normal(shape.b, 1, shape.h, shape.d)}
    if not shape.page_size:
        size = (shape.b, shape.keys, shape.h_kv, shape.d)
    else:
        pages = -(-shape.keys // shape.page_size)
        size = (shape.b * pages, shape.page_size, shape.h_kv, shape.d)
        order = torch.randperm(shape.b * pages, device=device, generator=generator)
        made["page_table"] = order.view(shape.b, pages).int()
    made |= {"k_cache": normal(*size), "v_cache": normal(*size)}
    made["cache_seqlens"] = torch.full((shape.b,), shape.keys, device=device, dtype=torch.int32)
    return made


def composition_inputs(shape: Composition, device: str, seed: int = 0) -> dict[str, Tensor]:
    """q (budget, h, d) over pages in random order, which hold the new tokens already."""
    generator = torch.Generator(device).manual_seed(seed)
    used = [shape.context + n for n in shape.new]
    width = -(-max(used) // shape.page_size)
    order = torch.randperm(len(used) * width, device=device, generator=generator)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator).to(shape.torch_dtype)

    size = (len(order), shape.page_size, shape.h_kv, shape.d)
    return {
        "q": normal(shape.budget, shape.h, shape.d),
        "k_cache": normal(*size),
        "v_cache": normal(*size),
        "page_table": order.view(-1, width).int(),
        "cache_seqlens": torch.tensor(used, device=device, dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, *shape.new], device=device).cumsum(0).int(),
    }


def lognormal_lengths(batch: int, most: int, seed: int = 0) -> tuple[int, ...]:
    """Ragged lengths as prompts have them: median a quarter of `most`, one of them `most`."""
    rng = random.Random(seed)
    drawn = [min(most, max(1, int(rng.lognormvariate(0, 0.8) * most / 4))) for _ in range(batch - 1)]
    return (*drawn, most)


def paper(dtype: str, quick: bool) -> list[Shape]:
    """b s = 16384 and h d = 2048, for each head dim, length and mask."""
    lengths = (512, 2048) if quick else (512, 1024, 2048, 4096, 8192, 16384)
    return [
        Shape(16384 // s, s, 2048 // d, 2048 // d, d, d, dtype, causal)
        for d in ((128,) if quick else (64, 128, 256))
        for causal in (False, True)
        for s in lengths
    ]


def models(dtype: str, quick: bool) -> list[Shape]:
    """Grouped heads, DeepSeek's prefill, a sliding window, ragged lengths."""
    lengths = (1024,) if quick else (1024, 4096, 16384)
    grouped = [Shape(16384 // s, s, h, 8, 128, 128, dtype, True) for h in (32, 64) for s in lengths]
    mla = [Shape(16384 // s, s, 128, 128, 192, 128, dtype, True) for s in lengths]
    window = [Shape(16384 // s, s, 64, 8, 64, 64, dtype, True, 1024) for s in lengths]
    ragged = [Shape(16, 0, 32, 8, 128, 128, dtype, True, lengths=lognormal_lengths(16, s)) for s in lengths]
    return grouped + mla + window + ragged


def decode(quick: bool) -> list[DecodeShape]:
    batches, lengths, pages = (
        ((1, 8), (4096,), (0, 64)) if quick else ((1, 8, 32, 64), (1024, 4096, 16384, 65536), (0, 16, 64, 256))
    )
    heads = ((32, 8),) if quick else ((32, 8), (64, 8), (32, 4), (8, 1))
    return [
        DecodeShape(b, keys, h, h_kv, 128, page_size)
        for h, h_kv in heads
        for page_size in pages
        for b in batches
        for keys in lengths
        if b * keys * h_kv <= 64 * 16384 * 8  # the cache stays below 4 GiB each
    ]


def compositions(quick: bool) -> list[Composition]:
    return [Composition(decodes) for decodes in ((0, 512) if quick else (0, 64, 128, 256, 512))]
