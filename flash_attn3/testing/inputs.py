# SPDX-License-Identifier: BSD-3-Clause
"""Random arguments of attention, in every layout of keys and with NaN wherever nobody looks."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import torch
from torch import Tensor

from .. import reference

NO_INFLUENCE_ON_MASK = {"q", "k", "v", "qv", "s_aux", "softcap", "softmax_scale", "q_descale", "k_descale", "v_descale"}
NO_INFLUENCE_ON_MASK |= {"rotary_cos", "rotary_sin", "rotary_seqlens", "rotary_interleaved"}


def values(shape: tuple[int, ...], dtype: torch.dtype, distribution: str = "normal", seed: int = 0) -> Tensor:
    """Random values: normal, paper (N(0,1) + N(0,100) Bernoulli(0.001)), huge (N(0, 30^2)) or constant."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if distribution == "paper":
        outliers = torch.rand(shape, generator=generator) < 0.001
        x = x + 10 * outliers * torch.randn(shape, generator=generator)
    elif distribution == "huge":
        x = 30 * x
    elif distribution == "constant":
        x = torch.full(shape, 0.5)
    return x.to(dtype)


def lengths(batch: int, most: int, seed: int = 0, least: int = 0) -> Tensor:
    """(batch,) int32 lengths in [least, most], one of them `most`, small ones and bounds more likely."""
    rng = random.Random(seed)
    drawn = [rng.choice([least, min(least + 1, most), most, rng.randint(least, most)]) for _ in range(batch)]
    if drawn:
        drawn[rng.randrange(batch)] = most
    return torch.tensor(drawn, dtype=torch.int32)


def offsets(extents: Tensor) -> Tensor:
    """(b + 1,) int32 cu_seqlens of the given extents."""
    return torch.cat([extents.new_zeros(1), extents.cumsum(0)]).int()


def restrided(x: Tensor, seed: int = 0) -> Tensor:
    """The values of x as a view into larger NaN-filled storage: dims reordered, padded, offset; last stride 1."""
    rng = random.Random(seed)
    leading = list(range(x.ndim - 1))
    rng.shuffle(leading)
    order = [*leading, x.ndim - 1]
    starts = [rng.randint(0, 2) for _ in order]
    starts[-1] *= 8
    ends = [
        start + x.shape[dim] + rng.randint(0, 1) * (8 if dim == x.ndim - 1 else 1)
        for start, dim in zip(starts, order, strict=True)
    ]
    storage = torch.full(ends, torch.nan).to(device=x.device, dtype=x.dtype)
    window = storage[tuple(slice(start, start + x.shape[dim]) for start, dim in zip(starts, order, strict=True))]
    return window.permute([order.index(dim) for dim in range(x.ndim)]).copy_(x)


def make_inputs(
    layout: str = "dense",
    *,
    batch: int = 2,
    seqlen_q: int = 33,
    seqlen_k: int = 65,
    num_heads: int = 4,
    num_heads_kv: int = 2,
    head_dim: int = 64,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    distribution: str = "normal",
    sink: bool = False,
    qv: bool = False,
    page_size: int = 16,
    least_k: int = 0,
    strided: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Tensors of a case. Whatever no row can see is NaN, and unused table entries are -1 or huge.

    dense: (b, s, h, d). varlen: packed, ragged lengths, zeros among them. padded: packed, and only part of each
    extent used. cache: rows of a larger cache picked by kv_batch_idx, with lengths and left padding. paged: pages
    in random order. `least_k` is the least length of a sequence in the latter two.
    """
    dv = head_dim if head_dim_v is None else head_dim_v
    case: dict[str, Any] = {}
    rows = (batch, seqlen_q)
    slots = (batch, seqlen_k)
    if layout in ("varlen", "padded"):
        extent_q, extent_k = lengths(batch, seqlen_q, seed), lengths(batch, seqlen_k, seed + 1)
        if layout == "padded":
            case |= {"seqused_q": extent_q, "seqused_k": extent_k}
            extent_q, extent_k = extent_q + lengths(batch, 5, seed + 2), extent_k + lengths(batch, 7, seed + 3)
        case |= {"cu_seqlens_q": offsets(extent_q), "cu_seqlens_k": offsets(extent_k)}
        rows, slots = (int(extent_q.sum()),), (int(extent_k.sum()),)
    elif layout == "cache":
        case["seqused_k"] = lengths(batch, seqlen_k, seed, least_k)
        case["leftpad_k"] = torch.minimum(lengths(batch, 9, seed + 1), case["seqused_k"])
        case["kv_batch_idx"] = _permutation(batch + 2, seed)[:batch]
        slots = (batch + 2, seqlen_k + 3)
    elif layout == "paged":
        case["seqused_k"] = lengths(batch, seqlen_k, seed, least_k)
        case["page_table"], num_pages = _page_table(case["seqused_k"], seqlen_k, page_size, seed)
        slots = (num_pages, page_size)
    shapes = {"q": (*rows, num_heads, head_dim), "k": (*slots, num_heads_kv, head_dim), "v": (*slots, num_heads_kv, dv)}
    if qv:
        shapes["qv"] = (*rows, num_heads, dv)
    tensors = {
        name: values(shape, dtype, distribution, seed + 10 * i) for i, (name, shape) in enumerate(shapes.items())
    }
    case = poison(tensors | case)
    case = {name: x.to(device) for name, x in case.items()}
    if strided:
        case |= {name: restrided(case[name], seed + i) for i, name in enumerate(shapes)}
    if sink:
        case["s_aux"] = values((num_heads,), torch.float32, seed=seed + 7).to(device)
    return case


def with_descales(case: dict[str, Any], blocks: bool, seed: int = 0) -> dict[str, Any]:
    """The case with scales for those of q, k, v that are e4m3: of a head, or of a head and 128 tokens."""
    batch = len(case["cu_seqlens_q"]) - 1 if "cu_seqlens_q" in case else len(case["q"])
    num_heads_kv = case["k"].shape[-2]
    capacity = case["k"].shape[-3]
    if "page_table" in case:
        capacity *= case["page_table"].shape[1]
    num_tokens = {"q": case["q"].shape[-3], "k": capacity, "v": capacity}
    for i, name in enumerate("qkv"):
        if case[name].dtype == torch.float8_e4m3fn:
            shape = (batch, num_heads_kv)
            if blocks:
                shape = (batch, case[name].shape[-2], -(-num_tokens[name] // reference.FP8_BLOCK))
            scale = values(shape, torch.float32, seed=seed + i).abs().clamp_min(0.1)
            case = case | {f"{name}_descale": scale.to(case[name].device)}
    return case


def with_append(
    case: dict[str, Any],
    seqlen_new: int,
    *,
    ragged: bool = False,
    rotary_dim: int = 0,
    interleaved: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """The case of a cache, of lengths >= seqlen_new, with its last keys appended by the call; they are NaN before."""
    batch, dtype, device = len(case["q"]), case["q"].dtype, case["q"].device
    new = lengths(batch, seqlen_new, seed) if ragged else torch.full((batch,), seqlen_new, dtype=torch.int32)
    rows = (int(new.sum()),) if ragged else (batch, seqlen_new)
    case = case | {"seqused_k": case["seqused_k"] - new.to(device)}
    if "leftpad_k" in case:
        case["leftpad_k"] = torch.minimum(case["leftpad_k"], case["seqused_k"])
    if ragged:
        case["cu_seqlens_k_new"] = offsets(new).to(device)
    for i, name in enumerate("kv"):
        case[f"{name}_new"] = values((*rows, *case[name].shape[-2:]), dtype, seed=seed + i).to(device)
    if rotary_dim:
        positions = case["seqused_k"].max() + max(seqlen_new, case["q"].shape[1]) + 1
        angles = torch.outer(torch.arange(positions), 10.0 ** -torch.arange(rotary_dim // 2)).to(device)
        case |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "rotary_interleaved": interleaved}
    return poison(case)


def draft_trees(batch: int, num_tokens: int, seed: int = 0) -> Tensor:
    """(batch, num_tokens, num_tokens) bool: whether token i of a random tree sees token u, itself or an ancestor.

    A token comes behind its parent; a tree may have several roots.
    """
    rng = random.Random(seed)
    sees = torch.eye(num_tokens, dtype=torch.bool).repeat(batch, 1, 1)
    for tree in sees:
        for i in range(1, num_tokens):
            parent = rng.randint(-1, i - 1)
            if parent >= 0:
                tree[i] |= tree[parent]
    return sees


def packed_bits(sees: Tensor) -> Tensor:
    """(..., s, s) bool as a tree mask (..., s, ceil(s / 32)) int32: bit u of row i is sees[..., i, u]."""
    num_words = -(-sees.shape[-1] // 32)
    bits = torch.nn.functional.pad(sees.long(), (0, 32 * num_words - sees.shape[-1])).unflatten(-1, (num_words, 32))
    return (bits << torch.arange(32, device=sees.device)).sum(-1).int()


def _permutation(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).int()


def _page_table(used: Tensor, seqlen_k: int, page_size: int, seed: int) -> tuple[Tensor, int]:
    """(b, pages + 1) int32 table over twice the pages in use, and their number."""
    width = -(-seqlen_k // page_size) + 1
    num_used = -(-used // page_size)
    num_pages = 2 * int(num_used.sum()) + 1
    table = torch.where(torch.arange(width) % 2 == 0, -1, 2**30).int().repeat(len(used), 1)
    pages = iter(_permutation(num_pages, seed).tolist())
    for n, count in enumerate(num_used.tolist()):
        table[n, :count] = torch.tensor(list(itertools.islice(pages, count)), dtype=torch.int32)
    return table, num_pages


def poison(case: dict[str, Any], value: float = math.nan) -> dict[str, Any]:
    """The case with `value` in every query row that sees nothing and every key and value that no row sees."""
    masks = {name: argument for name, argument in case.items() if name not in NO_INFLUENCE_ON_MASK}
    masks |= {name: torch.zeros_like(case[name][..., :1]) for name in ("k_new", "v_new") if name in case}
    queries = [case[name] for name in ("q", "qv") if case.get(name) is not None]
    q = torch.zeros_like(queries[0][..., :1], dtype=torch.float32)
    v = torch.ones_like(case["v"][..., :1], dtype=torch.float32).requires_grad_()
    result = reference.attention(q, torch.zeros_like(v), v, **masks)
    # The weights are uniform: a value has a positive gradient where some row sees it. An empty call has no graph.
    (result.out.sum() + 0 * v.sum()).backward()
    blind, unseen = result.num_keys <= 0, v.grad.sum(-2)[..., 0] == 0

    def fill(x: Tensor, rows: Tensor) -> Tensor:
        return x.float().masked_fill(rows[..., None, None], value).to(x.dtype)

    rows = {"q": blind, "qv": blind, "k": unseen, "v": unseen}
    return case | {name: fill(case[name], where) for name, where in rows.items() if case.get(name) is not None}
