# SPDX-License-Identifier: BSD-3-Clause
"""Keys in pages and caches: any page size, any strides, any content of the index tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import MASKS, POLICIES, SHAPES, attend, check, inputs, named
from torch import Tensor

import flash_attn3
from flash_attn3.errors import FlashAttn3ValueError
from flash_attn3.testing import GradCheck, bitwise_equal, pairwise, poison

SHAPE = "bf16_d64_v64"
AXES = {
    "page_size": [1, 2, 7, 8, 16, 40, 64, 256],
    "shape": ["bf16_d64_v64", "fp16_d96_v96", "bf16_d128_v128", "fp16_d192_v128", "bf16_d192_v192", "fp16_d256_v256"],
    "seqlens": [(1, 300), (5, 130), (97, 511), (200, 200), (130, 40)],
    "mask": list(MASKS),
    "heads": [(2, 2), (6, 1), (8, 2)],
    "num_splits": [1, 3],
    "narrower": [0, 8, 24],
    "leftpad": [False, True],
    "rows": ["dense", "packed"],
    "batch_idx": [False, True],
}
PAGE_SIZES = [1, 2, 7, 8, 16, 24, 64, 128, 256]
EVERY_DAY = (SHAPE,)  # the other kernels differ in the size of things


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(bitwise_equal(x, y) for x, y in zip(a, b, strict=True))


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def packed(case: dict[str, Any], lengths: list[int]) -> dict[str, Any]:
    """The case with the first rows of each sequence, packed."""
    rows = torch.cat([q[:length] for q, length in zip(case["q"], lengths, strict=True)])
    return case | {"q": rows, "cu_seqlens_q": torch.cat([int32(0), int32(*lengths).cumsum(0)]).int()}


def with_batch_idx(case: dict[str, Any]) -> dict[str, Any]:
    """The case with rows of the table in another order, and one that nobody uses."""
    order = torch.arange(len(case["page_table"])).flip(0)
    table = torch.cat([torch.full_like(case["page_table"][:1], 2**30), case["page_table"][order]])
    return case | {"page_table": table, "kv_batch_idx": (order + 1).int()}


def paged(case: dict[str, Any], page_size: int, seed: int = 0) -> dict[str, Any]:
    """A case of a cache (b, s, h_kv, d) with its slots in pages, drawn in random order from a pool of NaN."""
    batch, capacity = case["k"].shape[:2]
    width = -(-capacity // page_size)
    ids = torch.randperm(batch * width + 3, generator=torch.Generator().manual_seed(seed))[: batch * width]
    table = ids.view(batch, width)
    slots = torch.arange(capacity)
    result = dict(case)
    for name in "kv":
        pool = torch.full((batch * width + 3, page_size, *case[name].shape[2:]), torch.nan).to(case[name].dtype)
        for n in range(batch):
            pool[table[n, slots // page_size], slots % page_size] = case[name][n]
        result[name] = pool
    used = -(-case["seqused_k"] // page_size)
    unused = torch.arange(width + 1) >= used[:, None]
    padded = torch.cat([table, torch.zeros_like(table[:, :1])], 1).int()
    return result | {"page_table": padded.masked_fill(unused, -1)}


def cache_case(shape: str = SHAPE, **sizes: Any) -> dict[str, Any]:
    """Sequences of several lengths in a cache, without padding or a choice of rows."""
    case = inputs(shape, **dict(batch=4, seqlen_q=3, seqlen_k=300) | sizes)
    capacity = case["k"].shape[1]
    return case | {"seqused_k": int32(capacity, capacity // 2 + 1, 1, capacity - 7), "causal": True}


@pytest.mark.parametrize("choice", pairwise(AXES), ids=named)
def test_features(choice: dict[str, Any], simulator) -> None:
    (seqlen_q, seqlen_k), (num_heads, num_heads_kv) = choice["seqlens"], choice["heads"]
    sizes = dict(seqlen_q=seqlen_q, seqlen_k=seqlen_k, num_heads=num_heads, num_heads_kv=num_heads_kv)
    sizes["batch"] = 16 if seqlen_q == 1 else 3
    case = inputs(
        choice["shape"], "paged", page_size=choice["page_size"], least_k=20, narrower=choice["narrower"], **sizes
    )
    if choice["leftpad"]:
        case["leftpad_k"] = torch.arange(sizes["batch"]).int() * 5 % 21
    if choice["rows"] == "packed":
        case = packed(case, [seqlen_q - n % 3 if seqlen_q > 2 else n % 2 for n in range(sizes["batch"])])
    if choice["batch_idx"]:
        case = with_batch_idx(case)
    check(poison(case | MASKS[choice["mask"]]), num_splits=choice["num_splits"])


@pytest.mark.parametrize("leftpad", [False, True])
@pytest.mark.parametrize("shape", [pytest.param(s, marks=[pytest.mark.slow] * (s not in EVERY_DAY)) for s in SHAPES])
def test_pages_move_no_bits(shape: str, leftpad: bool, simulator, launched: list[str]) -> None:
    """Their size, their order, and how they are copied; against the dense cache."""
    case = cache_case(shape, seqlen_q=9, num_heads=4, num_heads_kv=2)
    if leftpad:
        case["leftpad_k"] = int32(13, 0, 1, 40)
    expected = check(poison(case))
    for page_size in PAGE_SIZES if shape.startswith("bf16") else (1, 16):
        assert same(attend(poison(paged(case, page_size, seed=page_size))), expected), page_size
    kinds = {name.split("_s2_")[1].removesuffix("_pp") for name in launched}
    assert kinds == {"tma", "cp_async"}


@pytest.mark.parametrize("num_splits", [2, 5])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_splits_of_pages(page_size: int, num_splits: int, simulator) -> None:
    case = cache_case(seqlen_k=700, seqlen_q=1, num_heads=8)
    expected = attend(case, num_splits=num_splits)
    pages = poison(paged(case, page_size))
    assert same(attend(pages, num_splits=num_splits), expected)
    GradCheck(pages).check_forward(*expected)


@pytest.mark.parametrize("page_size", [1, 16])
def test_shared_pages(page_size: int, simulator) -> None:
    case = cache_case(seqlen_k=200)
    case["seqused_k"] = int32(200, 131, 128, 129)
    for name in "kv":
        case[name][1, :128] = case[name][0, :128]
    private = paged(case, page_size)
    shared = private | {"page_table": private["page_table"].clone()}
    pages = 128 // page_size
    shared["page_table"][1, :pages] = shared["page_table"][0, :pages]
    assert same(attend(shared), attend(private))


def layouts(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The same cache in other strides."""
    k, v = case["k"], case["v"]
    both, rows = torch.stack([k, v], 2), torch.cat([k, v], -1).transpose(1, 2).contiguous().transpose(1, 2)
    pool = torch.full((*k.shape[:2], k.shape[2] + 3, k.shape[3] + 16), torch.nan, dtype=k.dtype)
    wide = {name: pool.clone()[:, :, 2:-1, 8:-8].copy_(case[name]) for name in "kv"}
    return {
        "both": {"k": both[:, :, 0], "v": both[:, :, 1]},
        "by head": {name: case[name].transpose(1, 2).contiguous().transpose(1, 2) for name in "kv"},
        "one row": dict(zip("kv", rows.split(k.shape[3], -1), strict=True)),
        "token pool": wide,
    }


@pytest.mark.parametrize("page_size", [None, 1, 16])
def test_strided_caches(page_size: int | None, simulator) -> None:
    case = cache_case()
    case = case if page_size is None else paged(case, page_size)
    expected = attend(case)
    for name, layout in layouts(case).items():
        before = {key: x.clone() for key, x in layout.items()}
        assert same(attend(case | layout), expected), name
        assert all(bitwise_equal(layout[key], x) for key, x in before.items())


@pytest.mark.parametrize("page_size", [None, 4, 16])
def test_appended_lengths(page_size: int | None, simulator) -> None:
    """Keys that the call itself has written count; more than there is room for do not."""
    case = inputs(SHAPE, batch=3, seqlen_q=2, seqlen_k=150) | {"causal": True}
    used, new = int32(0, 77, 130), [3, 0, 20]
    whole = case | {"seqused_k": used + int32(*new)}
    if page_size is not None:
        whole = paged(whole, page_size)
    expected = attend(whole)
    fresh = {}
    for name in "kv":
        fresh[name] = torch.cat([case[name][n, used[n] : used[n] + count] for n, count in enumerate(new)])
    rest = {"k_cache": whole["k"].clone(), "v_cache": whole["v"].clone(), "cache_seqlens": used, **fresh}
    offsets = int32(0, 3, 3, 23)
    results = flash_attn3.flash_attn_with_kvcache(
        whole["q"], **rest, page_table=whole.get("page_table"), cu_seqlens_k_new=offsets, causal=True, num_splits=1,
        return_softmax_lse=True, backend="hopper",
    )  # fmt: skip
    assert same(results, expected)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("name", ["page_table", "seqused_k", "leftpad_k", "kv_batch_idx", "cu_seqlens_q"])
def test_any_index_is_memory_safe(name: str, page_size: int, simulator) -> None:
    """The simulator refuses an access outside of the tensors; other sequences are not affected."""
    simulator.configure("races=0")
    case = paged(cache_case(), page_size)
    case |= {"leftpad_k": int32(3, 0, 0, 9), "kv_batch_idx": int32(0, 1, 2, 3)}
    case = packed(case, [3, 3, 3, 3])
    expected = attend(case)
    for seed in range(3):
        torch.manual_seed(seed)
        wrong = torch.randint(-(2**31), 2**31 - 1, case[name].shape).int()
        broken = wrong if seed == 0 else torch.where(torch.rand(wrong.shape) < 0.5, wrong, case[name])
        broken[0] = 2**31 - 1
        if name != "cu_seqlens_q":
            broken[1] = case[name][1]
        out, lse = attend(case | {name: broken})
        with pytest.raises(FlashAttn3ValueError, match=name):
            flash_attn3.check_errors()
        if name != "cu_seqlens_q":
            assert bitwise_equal(out[3:6], expected[0][3:6]) and bitwise_equal(lse[:, 3:6], expected[1][:, 3:6])


def test_a_row_outside_of_the_cache_has_no_keys(simulator) -> None:
    case = cache_case() | {"kv_batch_idx": int32(2, 4, -1, 0)}
    for pages in (case, paged(case, 16), paged(case, 1)):
        out, lse = attend(pages)
        for n in (1, 2):
            assert bitwise_equal(out[n], torch.zeros_like(out[n])) and bool((lse[n] == -torch.inf).all())
        with pytest.raises(FlashAttn3ValueError, match="kv_batch_idx"):
            flash_attn3.check_errors()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("page_size", [1, 16])
def test_decode_and_prompts_in_one_call(page_size: int, policy: str, simulator) -> None:
    """A ragged batch with more tiles than CTAs; an empty sequence, and one without queries."""
    case = paged(inputs("bf16_d128_v128", batch=5, seqlen_q=140, seqlen_k=410, num_heads=4) | {
        "seqused_k": int32(410, 0, 17, 128, 257), "causal": True,
    }, page_size)  # fmt: skip
    case = packed(case, [140, 1, 0, 9, 130])
    simulator.configure(f"{policy},sms=3")
    check(poison(case))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("page_size", [None, 1, 16])
def test_context_parallel(page_size: int | None, world: int, simulator) -> None:
    """Rank r holds keys r, r + world, ...: its rows see what the whole lets them see. Some ranks hold nothing."""
    case = inputs(SHAPE, batch=5, seqlen_q=5, seqlen_k=700 // world) | {"causal": True, "cp_world_size": world}
    totals = int32(700, 1, 64, 333, 6)
    for rank in {0, world - 1}:
        local = case | {"cp_rank": rank, "cp_tot_seqused_k": totals}
        local["seqused_k"] = (totals - rank + world - 1).clamp_min(0) // world
        local = local if page_size is None else paged(local, page_size)
        check(poison(local), num_splits=1 + rank)
