# SPDX-License-Identifier: BSD-3-Clause
"""New keys and values on their way into a cache, on the simulator: rotated, quantised, and in no slot but their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import named
from torch import Tensor

import flash_attn3
from flash_attn3 import ops, reference
from flash_attn3.problem import AppendProblem
from flash_attn3.testing import bitwise_equal, offsets, pairwise, restrided, values

FP8 = torch.float8_e4m3fn
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "e4m3": FP8}
ULP = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, FP8: 2.0**-3}
POLICIES = ("policy=eager", "policy=random,seed=1", "policy=random,seed=2,cta_order=random", "sms=1")
CAPACITY = 210
AXES = {
    "dtype": ["bf16", "fp16"],
    "cache": ["bf16", "e4m3", "16-bit"],
    "page_size": [0, 1, 7, 64],
    "new": [(3, 3, 3), (0, 70, 5), (1, 1, 1), (40, 0, 0)],
    "ragged": [False, True],
    "rows": [False, True],
    "rotary": [None, (2, True), (20, True), (32, False), (20, False), (64, True), (64, False)],
    "table": [torch.float32, "16-bit"],
    "dims": [(64, 64), (80, 80), (64, 128), (72, 24)],
    "heads": [1, 5],
    "blocks": [False, True],
    "strided": [False, True],
    "policy": POLICIES,
}


@pytest.fixture(autouse=True)
def nothing_was_clamped() -> Iterator[None]:
    """But what a test has asked about."""
    yield
    flash_attn3.check_errors()


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def case_of(choice: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Arguments of `AppendProblem`. Unused slots, table entries and padding between rows hold garbage."""
    torch.manual_seed(seed)
    dtype, cache_dtype = DTYPES[choice["dtype"]], DTYPES.get(choice["cache"], DTYPES[choice["dtype"]])
    if cache_dtype != FP8:
        cache_dtype = dtype
    new, heads, (d, dv) = choice["new"], choice["heads"], choice["dims"]
    if not choice["ragged"]:
        new = (max(new),) * 3
    used = int32(CAPACITY - new[0], 130, 0)
    rows = (sum(new) + 4,) if choice["ragged"] else (3, new[0])
    spread = restrided if choice["strided"] else lambda x, seed=0: x
    k, v = (spread(values((*rows, heads, size), dtype, seed=seed + i), i) for i, size in enumerate((d, dv)))
    a = dict(k=k, v=v, cache_seqlens=used, rotary_interleaved=True)
    if choice["ragged"]:
        a["cu_seqlens_k_new"] = offsets(int32(*new)) + 2
    page_size, num_rows = choice["page_size"], 5 if choice["rows"] else 3
    slots = (num_rows, CAPACITY)
    if page_size:
        width = -(-CAPACITY // page_size)
        slots = (num_rows * width + 2, page_size)
        a["page_table"] = torch.randperm(slots[0])[: num_rows * width].view(num_rows, width).int()
    if choice["rows"]:
        a["kv_batch_idx"] = int32(4, 0, 2)
    sizes = ((*slots, heads, d), (*slots, heads, dv))
    a |= {
        name: spread(values(size, torch.float32, seed=seed + 5).to(cache_dtype), 3 + i)
        for i, (name, size) in enumerate(zip(("k_cache", "v_cache"), sizes, strict=True))
    }
    if cache_dtype == FP8:
        shape = (3, heads, -(-CAPACITY // 128)) if choice["blocks"] else (3, heads)
        a |= {
            f"{x}_descale": torch.rand(shape).mul(2.0).add(0.01).transpose(0, 1).contiguous().transpose(0, 1)
            for x in "kv"
        }
        a["k"][..., 0, :2] = 5e3  # saturates
    if choice["rotary"] is not None:
        rotary_dim, a["rotary_interleaved"] = choice["rotary"]
        rotary_dim = min(rotary_dim, d)
        table = dtype if choice["table"] == "16-bit" else choice["table"]
        angles = torch.outer(torch.arange(CAPACITY + 5), 100.0 ** -(torch.arange(rotary_dim // 2) / rotary_dim))
        a |= {"rotary_cos": angles.cos().to(table), "rotary_sin": angles.sin().to(table)}
        if choice["rows"]:
            a["rotary_seqlens"] = used + int32(0, 5, 7)
    return a


def problem(a: dict[str, Any], q_advances: bool = False) -> AppendProblem:
    names = AppendProblem.__dataclass_fields__
    return AppendProblem(**{name: a.get(name) for name in names} | {"q_advances": q_advances})


def append(a: dict[str, Any]) -> None:
    ops.append_kv(*problem(a).arguments(), "hopper")


def expected(a: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The caches as the oracle has them."""
    positional = ("k_cache", "v_cache", "k", "v", "cache_seqlens")
    named = {name: x for name, x in a.items() if name not in positional}
    return reference.append(*(a[name] for name in positional), **named)


def check(a: dict[str, Any]) -> None:
    """Plain appends bit for bit; rotated keys within a unit in the last place; other slots untouched."""
    new, before = (a["k"].clone(), a["v"].clone()), a["k_cache"].clone()
    k, v = expected(a)
    append(a)
    assert bitwise_equal(a["k"], new[0]) and bitwise_equal(a["v"], new[1])
    assert bitwise_equal(a["v_cache"], v)
    if a.get("rotary_cos") is None:
        assert bitwise_equal(a["k_cache"], k)
        return
    slots = (bits(k) != bits(before)).flatten(2).any(-1)
    assert bool(slots.any()) and bitwise_equal(a["k_cache"][~slots], before[~slots])
    small = 2.0**-9 if k.dtype == FP8 else 1e-6  # e4m3 ends there
    torch.testing.assert_close(a["k_cache"][slots].double(), k[slots].double(), rtol=ULP[k.dtype], atol=small)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


@pytest.mark.parametrize("choice", pairwise(AXES), ids=named)
def test_features(choice: dict[str, Any], simulator) -> None:
    simulator.configure(choice["policy"])
    check(case_of(choice))


PLAIN = {name: values[0] for name, values in AXES.items()}
ROTARY = PLAIN | {"rotary": (32, False)}


@pytest.mark.parametrize("name", ["k", "v", "k_cache", "v_cache", "rotary_cos", "rotary_sin"])
@pytest.mark.parametrize("interleaved", [True, False])
def test_any_alignment(name: str, interleaved: bool, simulator) -> None:
    a = case_of(PLAIN | {"rotary": (32, interleaved), "dims": (72, 72)})
    memory = torch.empty(a[name].numel() + 1, dtype=a[name].dtype)
    a[name] = memory[1:].view(a[name].shape).copy_(a[name])
    check(a)


@pytest.mark.parametrize("given", ["bf16", "e4m3"])
def test_e4m3_is_copied_or_rounded_once(given: str, simulator) -> None:
    """Every value of e4m3 bit for bit; 16-bit ones to the nearest, ties to even, and no further than 448."""
    a = case_of(PLAIN | {"cache": "e4m3"})
    if given == "e4m3":
        a["k"] = torch.arange(576).remainder(256).to(torch.uint8).view(FP8).view(3, 3, 1, 64)
        a["v"] = a["k"].flip(1)
    else:
        between = torch.arange(-0.15, 0.15, 0.3 / 576)[:576]
        a |= {"k": between.view(3, 3, 1, 64).bfloat16(), "v": (3000 * between).view(3, 3, 1, 64).bfloat16()}
        a |= {"k_descale": torch.ones(3, 1), "v_descale": torch.tensor([[1.0], [0.3], [0.0]])}
    k, v = a["k_cache"].clone(), a["v_cache"].clone()
    append(a)
    for x, new, cache, name in ((k, a["k"], a["k_cache"], "k_descale"), (v, a["v"], a["v_cache"], "v_descale")):
        for n, used in enumerate(a["cache_seqlens"].tolist()):
            scaled = new[n] if given == "e4m3" else new[n].float().div(a[name][n]).clamp(-448, 448)
            x[n, used : used + 3] = scaled.to(FP8)
        assert bitwise_equal(cache.view(torch.uint8), x.view(torch.uint8))


def test_e4m3_keys_are_rotated(simulator) -> None:
    a = case_of(ROTARY | {"cache": "e4m3"})
    a |= {"k": a["k"].to(FP8), "v": a["v"].to(FP8), "k_descale": None, "v_descale": None}
    check(a)


@pytest.mark.parametrize("ragged", [False, True])
def test_many_sequences(ragged: bool, simulator) -> None:
    """More than a block has threads, and more tiles than blocks; most without a row."""
    simulator.configure("sms=1")
    batch = 600
    new = torch.zeros(batch, dtype=torch.int32)
    new[[0, 255, 256, 257, 511, 512, 599]] = int32(2, 1, 40, 3, 1, 200, 1)
    rows = (int(new.sum()),) if ragged else (batch, 1)
    k, v = (values((*rows, 1, 16), torch.bfloat16, seed=i) for i in range(2))
    caches = [torch.full((batch, 205, 1, 16), 7.0).bfloat16() for _ in range(2)]
    a = dict(k=k, v=v, k_cache=caches[0], v_cache=caches[1], cache_seqlens=torch.arange(batch).int() % 5)
    a |= {"rotary_interleaved": True} | ({"cu_seqlens_k_new": offsets(new)} if ragged else {})
    check(a)


@pytest.mark.parametrize("name", ["k_cache", "k", "k_descale"])
def test_repeated_scales_and_rows(name: str, simulator) -> None:
    """Strides of 0 where they are usual: one scale for all; one new row for all sequences."""
    a = case_of(PLAIN | {"cache": "e4m3"})
    if name == "k_descale":
        a |= {f"{x}_descale": torch.tensor(0.3).expand(3, 1) for x in "kv"}
    elif name == "k":
        a["k"] = a["k"][:1, :1].expand(a["k"].shape)
    check(a)


@pytest.mark.parametrize("name", ["k", "v", "k_cache", "v_cache"])
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.unpoisoned
def test_offsets_beyond_32_bits(name: str, dim: int, simulator, tmp_path) -> None:
    """A sparse file stands in for the memory: few of its pages are ever touched."""
    a = case_of(PLAIN | {"heads": 2, "new": (2, 2, 2)})
    a |= {x: a[x][:, :5].contiguous() for x in ("k_cache", "v_cache")} | {"cache_seqlens": int32(3, 0, 2)}
    like, far = a[name], 2**31 + 64  # elements
    strides = [64 * 10, 64 * 2, 64, 1]
    strides[dim] = far
    extent = sum((size - 1) * stride for size, stride in zip(like.shape, strides, strict=True)) + 1
    with open(tmp_path / "memory", "wb") as file:
        file.truncate(2 * extent)
    memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=extent, dtype=torch.bfloat16)
    far_away = a | {name: memory.as_strided(like.shape, strides).copy_(like)}
    far_away |= {x: a[x].clone() for x in ("k_cache", "v_cache") if x != name}
    append(a)
    append(far_away)
    assert all(bitwise_equal(far_away[x].contiguous(), a[x]) for x in ("k_cache", "v_cache"))


# Contents of index tensors

INDICES = ("cache_seqlens", "kv_batch_idx", "page_table", "rotary_seqlens", "cu_seqlens_k_new")
ALL = ROTARY | {"rows": True, "ragged": True, "page_size": 64, "new": (3, 2, 4)}


@pytest.mark.parametrize("content", [-1, -(2**31), 2**31 - 1, 10**6])
@pytest.mark.parametrize("name", INDICES)
def test_what_is_out_of_range_is_dropped_and_leaves_other_sequences_alone(name: str, content: int, simulator) -> None:
    a = case_of(ALL)
    sound = a | {x: a[x].clone() for x in ("k_cache", "v_cache")}
    append(sound)
    a[name] = a[name].clone()
    at = {"page_table": (a["kv_batch_idx"][1], 130 // 64), "cu_seqlens_k_new": 2}.get(name, 1)
    a[name][at] = content
    before = {x: a[x].clone() for x in ("k_cache", "v_cache")}
    append(a)
    told = {"cache_seqlens": "seqused_k"}.get(name, name)
    with pytest.raises(flash_attn3.FlashAttn3ValueError, match=told):
        flash_attn3.check_errors()
    own = [sound["page_table"][row].long() for row in sound["kv_batch_idx"].tolist()]
    for x in ("k_cache", "v_cache"):
        assert bitwise_equal(a[x][own[0]], sound[x][own[0]])
        if name != "cu_seqlens_k_new":
            assert bitwise_equal(a[x][own[2]], sound[x][own[2]])
            written = not bitwise_equal(a[x][own[1]], before[x][own[1]])
            # A negative length is none: the new keys are all that the sequence has.
            assert written == (name == "rotary_seqlens" or (name == "cache_seqlens" and content < 0))


@pytest.mark.parametrize("page_size", [0, 7])
@pytest.mark.parametrize("name", INDICES)
def test_any_index_is_memory_safe(name: str, page_size: int, simulator) -> None:
    """The simulator refuses an access outside of the tensors. Sequences may overlap here, and race for a row."""
    simulator.configure("races=0")
    a = case_of(ALL | {"page_size": page_size})
    if name not in a:
        return
    for seed in range(6):
        torch.manual_seed(seed)
        wrong = torch.randint(-(2**31), 2**31 - 1, a[name].shape).int()
        if seed % 2:
            wrong = torch.randint(-3, 20, a[name].shape).int()
        for broken in (torch.where(torch.rand(wrong.shape) < 0.5, wrong, a[name]), wrong):
            append(a | {name: broken})
            flash_attn3.status.device_word(a["k"].device).zero_()


def test_nothing_to_append(simulator) -> None:
    a = case_of(PLAIN)
    before = a["k_cache"].clone()
    for empty in ({"k": a["k"][:, :0], "v": a["v"][:, :0]}, {"cu_seqlens_k_new": int32(0, 0, 0, 0)}):
        rows = {} if "k" in empty else {x: a[x][0, :0] for x in "kv"}
        append(a | rows | empty)
    assert bitwise_equal(a["k_cache"], before) and not simulator.report()["launches"]


# Queries

Q_AXES = {
    "dtype": ["bf16", "fp16"],
    "rotary": [(2, True), (20, True), (32, False), (20, False), (64, True), (64, False)],
    "table": [torch.float32, "16-bit"],
    "head_dim": [64, 72, 128],
    "heads": [1, 6],
    "layout": ["one", "dense", "ragged"],
    "advance": [True, False],
    "strided": [False, True],
    "policy": POLICIES,
}


@pytest.mark.parametrize("choice", pairwise(Q_AXES), ids=named)
def test_queries(choice: dict[str, Any], simulator) -> None:
    simulator.configure(choice["policy"])
    dtype, (rotary_dim, interleaved) = DTYPES[choice["dtype"]], choice["rotary"]
    rows = {"one": (3, 1), "dense": (3, 20), "ragged": (30,)}[choice["layout"]]
    cu_seqlens = int32(0, 9, 9, 30) if choice["layout"] == "ragged" else None
    q = values((*rows, choice["heads"], choice["head_dim"]), dtype)
    q = restrided(q) if choice["strided"] else q
    table = dtype if choice["table"] == "16-bit" else choice["table"]
    angles = torch.outer(torch.arange(64), 100.0 ** -(torch.arange(rotary_dim // 2) / rotary_dim))
    tables, positions = (angles.cos().to(table), angles.sin().to(table)), int32(5, 0, 40)
    given = q.clone()
    out = ops.rotary_q(q, *tables, positions, cu_seqlens, choice["advance"], interleaved, "hopper")
    assert bitwise_equal(q, given) and out.dtype == q.dtype and out.is_contiguous()
    for n in range(3):
        own = slice(cu_seqlens[n], cu_seqlens[n + 1]) if cu_seqlens is not None else n
        exact = reference._rotate(q[own], *tables, positions, interleaved, n, 0, choice["advance"])
        torch.testing.assert_close(out[own].double(), exact, rtol=ULP[dtype], atol=1e-6)


@pytest.mark.parametrize("seqlen_new", [0, 3])
def test_queries_in_the_launch_of_new_keys(seqlen_new: int, simulator, launched: list[str]) -> None:
    """Which there may be none of. The bits of a rotation by torch operators."""
    a = case_of(ROTARY) | {"q": values((3, 4, 2, 64), torch.bfloat16, seed=9)}
    a |= {name: a[name][:, :seqlen_new] for name in "kv"}
    rotated = ops.append_kv(*problem(a, q_advances=True).arguments(), "hopper")
    tables = (a["rotary_cos"], a["rotary_sin"], a["cache_seqlens"])
    assert bitwise_equal(rotated, ops.rotary_q(a["q"], *tables, None, True, False, "cpu"))
    assert launched == ["append_kv_t128"]
