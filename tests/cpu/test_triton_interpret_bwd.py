# SPDX-License-Identifier: BSD-3-Clause
"""The Triton backward, interpreted: features in pairs, subsets of gradients, what has no influence and what has."""

from __future__ import annotations

import importlib
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn3
from flash_attn3 import flash_attn_func, reference
from flash_attn3.flash_attn_interface import _flash_attn_backward
from flash_attn3.testing import (
    GradCheck,
    bitwise_equal,
    call,
    make_inputs,
    offsets,
    pairwise,
    poison,
    restrided,
    values,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreted

INF, NAN = math.inf, math.nan
attend = partial(call, backend="triton")
backward = partial(_flash_attn_backward, backend="triton")
AXES = {
    "layout": ["dense", "varlen", "padded"],
    "seqlens": [(1, 1), (64, 128), (100, 70), (31, 140), (5, 0), (0, 5)],
    "heads": [(2, 2), (2, 1), (3, 1)],
    "head_dims": [(64, 64), (40, 40), (96, 96), (192, 128), (8, 8), (256, 256), (64, 256)],
    "dtype": [torch.bfloat16, torch.float16, torch.float32],
    "mask": [
        {},
        {"causal": True},
        {"window_size": (30, 0)},
        {"window_size": (17, 25)},
        {"attention_chunk": 21, "causal": True},
        {"window_size": (70, 3), "attention_chunk": 48},
    ],
    "scores": [{}, {"softcap": 5.0}, {"softmax_scale": 0.3}, {"softmax_scale": 0.0}],
    "sink": [False, True],
    "strided": [False, True],
    "distribution": ["normal", "paper"],
}


def named(choice: dict[str, Any]) -> str:
    return "-".join(str(value).replace(" ", "").replace("torch.", "") for value in choice.values())


@pytest.mark.parametrize("choice", pairwise(AXES), ids=named)
def test_features(choice: dict[str, Any]) -> None:
    (d, dv), (seqlen_q, seqlen_k), (h, h_kv) = choice["head_dims"], choice["seqlens"], choice["heads"]
    sizes = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "num_heads": h, "num_heads_kv": h_kv, "head_dim": d}
    same = {name: choice[name] for name in ("dtype", "sink", "strided", "distribution")}
    batch = 1 if choice["layout"] == "dense" else 2
    case = make_inputs(choice["layout"], batch=batch, head_dim_v=dv, **sizes, **same)
    GradCheck(case | choice["mask"] | choice["scores"], distribution=choice["distribution"]).check(attend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_huge_scores(dtype: torch.dtype) -> None:
    case = make_inputs(
        "dense", batch=1, seqlen_q=70, seqlen_k=130, num_heads=1, num_heads_kv=1, distribution="huge", dtype=dtype
    )
    GradCheck(case | {"causal": True}, distribution="huge").check(attend)


@pytest.mark.parametrize("tiles", [(16, 16), (16, 64), (64, 16), (64, 64), (128, 32)], ids=str)
@pytest.mark.parametrize("mask", [{"causal": True}, {"window_size": (20, 13)}], ids=str)
def test_tiles(tiles: tuple[int, int], mask: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables for GPUs have other tiles than that of the interpreter."""
    bwd = importlib.import_module("flash_attn3.triton.bwd")
    monkeypatch.setattr(bwd, "bwd_config", lambda table, arch, width: bwd.Config(*tiles, 4, 1))
    sizes = {"num_heads": 1, "num_heads_kv": 1, "head_dim": 16, "dtype": torch.float32}
    GradCheck(make_inputs("dense", batch=1, seqlen_q=75, seqlen_k=140, **sizes) | mask).check(attend)


# Which gradients


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels of the backward that were launched since."""
    bwd = importlib.import_module("flash_attn3.triton.bwd")
    names: list[str] = []

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(bwd, name)

        def __getitem__(self, grid):
            names.append(self.name)
            return self.kernel[grid]

    for name in ("preprocess_kernel", "dkdv_kernel", "dq_kernel"):
        monkeypatch.setattr(bwd, name, Recorded(name))
    return names


@pytest.mark.parametrize("wanted", [("q",), ("k",), ("v",), ("s_aux",), ("q", "k"), ("k", "v")], ids=str)
def test_only_what_is_wanted(wanted: tuple[str, ...], launches: list[str]) -> None:
    case = make_inputs("dense", batch=1, seqlen_q=40, dtype=torch.float32, sink=True) | {"causal": True}

    def gradients(*names: str) -> list[Tensor]:
        leaves = {name: case[name].clone().requires_grad_() for name in names}
        out, lse = attend(case | leaves)
        douts = values(out.shape, out.dtype), values(lse.shape, lse.dtype, seed=1)
        return list(torch.autograd.grad([out, lse], list(leaves.values()), douts))

    whole = dict(zip(("q", "k", "v", "s_aux"), gradients("q", "k", "v", "s_aux"), strict=True))
    launches.clear()
    for name, grad in zip(wanted, gradients(*wanted), strict=True):
        assert bitwise_equal(grad, whole[name])
    assert ("dq_kernel" in launches) == ("q" in wanted)
    assert ("dkdv_kernel" in launches) == bool({"k", "v"} & set(wanted))


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_part_of_a_larger_softmax(grad_dtype: torch.dtype) -> None:
    """Halves of the keys with out and lse of the whole, as in ring attention, into strided and packed outputs."""
    q, k, v = (make_inputs("dense", batch=1, seqlen_q=50, seqlen_k=96)[name] for name in "qkv")
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    exact = reference.attention(*leaves)
    dout = values(q.shape, q.dtype)
    expected = torch.autograd.grad(exact.out, leaves, dout.double())
    out, lse = exact.out.detach().bfloat16(), exact.lse.detach().float()
    dq_parts, dk_parts, dv_parts = [], [], []
    for half in (slice(0, 48), slice(48, 96)):
        dq = restrided(torch.full_like(q, NAN, dtype=grad_dtype))
        dk, dv = torch.full((1, 48, 2, 2, 64), NAN, dtype=grad_dtype).unbind(2)
        backward(dout, q, k[:, half], v[:, half], out, lse, dq=dq, dk=dk, dv=dv)
        dq_parts.append(dq)
        dk_parts.append(dk)
        dv_parts.append(dv)
    actual = sum(x.float() for x in dq_parts), torch.cat(dk_parts, 1), torch.cat(dv_parts, 1)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layout", ["dense", "padded"])
def test_strides_move_no_bit(layout: str) -> None:
    """Of dout, out, lse, dlse, the inputs and the gradients, fp32 ones too."""
    case = make_inputs(layout, seqlen_q=40, seqlen_k=70, dtype=torch.float16, num_heads=2) | {"causal": True}
    check = GradCheck(case)
    index = {name: x for name, x in case.items() if name.startswith(("cu_", "seqused"))}
    q, k, v = case["q"], case["k"], case["v"]
    out, lse = (x.detach() for x in attend(case))
    dout, dlse = check.dout.half(), check.dlse

    def gradients(strided: bool, dtype: torch.dtype) -> list[Tensor]:
        view = restrided if strided else torch.clone
        grads = [view(torch.full_like(x, NAN, dtype=dtype)) for x in (q, k, v)]
        stats = [view(x.mT).mT for x in (lse, dlse)]
        names = dict(zip(("dq", "dk", "dv"), grads, strict=True))
        backward(*map(view, (dout, q, k, v, out)), stats[0], **index, is_causal=True, **names, dlse=stats[1])
        return grads

    plain = gradients(False, torch.float16)
    for dtype in (torch.float16, torch.float32):
        for actual, expected in zip(gradients(True, dtype), plain, strict=True):
            assert bitwise_equal(actual.half(), expected)


def test_expanded_dout() -> None:
    q, k, v = (make_inputs("dense", dtype=torch.float16)[name].requires_grad_() for name in "qkv")
    out = flash_attn_func(q, k, v, backend="triton")
    from_sum = torch.autograd.grad(out.sum(), [q, k, v], retain_graph=True)
    from_ones = torch.autograd.grad(out, [q, k, v], torch.ones_like(out))
    assert all(bitwise_equal(a, b) for a, b in zip(from_sum, from_ones, strict=True))


# Sequences


@pytest.mark.parametrize("extents", [[0, 0, 37], [37, 0, 0], [0, 33, 0, 64, 0]], ids=str)
@pytest.mark.parametrize("mask", [{}, {"causal": True}], ids=str)
def test_empty_sequences(extents: list[int], mask: dict[str, Any]) -> None:
    case = {name: values((sum(extents), 2, 32), torch.float32, seed=i) for i, name in enumerate("qkv")}
    cu = offsets(torch.tensor(extents))
    GradCheck(case | mask | {"cu_seqlens_q": cu, "cu_seqlens_k": cu}).check(attend)
    shorter = offsets(torch.tensor(extents).roll(1))
    GradCheck(case | mask | {"cu_seqlens_q": cu, "cu_seqlens_k": shorter}).check(attend)


@pytest.mark.parametrize("max_seqlen", [1, 20, 4000, None])
def test_rows_outside_and_bounds(max_seqlen: int | None) -> None:
    """Poisoned rows before the first and behind the last sequence get zeros; a bound is no part of the meaning."""
    q, k, v, dout = (values((90, 2, 32), torch.float32, seed=i) for i in range(4))
    cu = torch.tensor([7, 40, 75], dtype=torch.int32)
    for x in (q, k, v, dout):
        x[:7] = x[75:] = NAN
    grads = dict(zip(("dq", "dk", "dv"), (torch.full_like(x, NAN) for x in (q, k, v)), strict=True))
    index = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    exact = reference.attention(*leaves, **index)
    rows = slice(7, 75)
    expected = torch.autograd.grad(exact.out[rows], leaves, dout[rows].double())
    out, lse = exact.out.detach().float(), exact.lse.detach().float()
    backward(dout, q, k, v, out, lse, **index, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, **grads)
    for grad, exact_grad in zip(grads.values(), expected, strict=True):
        assert bitwise_equal(grad[:7], torch.zeros_like(grad[:7])) and not grad[75:].any()
        assert grad.isfinite().all()
        if max_seqlen is None or max_seqlen > 40:
            torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"])
@pytest.mark.parametrize("content", [-(2**31), 2**31 - 1])
def test_hostile_lengths(name: str, content: int) -> None:
    """Clamped and noted; the gradients are those of the clamped lengths."""
    case = make_inputs("padded", seqlen_q=20, seqlen_k=30, dtype=torch.float32, num_heads=2, head_dim=16)
    case |= {x: case[x].nan_to_num() for x in "qkv"} | {name: case[name].clone()}
    case[name][-1] = content
    check = GradCheck(case)
    leaves = {x: case[x].clone().requires_grad_() for x in "qkv"}
    out, lse = attend(case | leaves)
    with pytest.raises(flash_attn3.FlashAttn3ValueError, match=name):
        flash_attn3.check_errors()
    grads = torch.autograd.grad([out, lse], list(leaves.values()), [check.dout, check.dlse])
    check.check_backward(dict(zip("qkv", grads, strict=True)), (out.detach(), lse.detach()))
    if name.endswith("_q"):
        with pytest.raises(flash_attn3.FlashAttn3ValueError, match=name):
            flash_attn3.check_errors()


# What must not matter, and what must


@pytest.mark.parametrize("layout", ["dense", "varlen", "padded"])
@pytest.mark.parametrize("mask", [{"causal": True}, {"window_size": (12, 3)}], ids=str)
def test_what_nobody_sees_has_no_influence(layout: str, mask: dict[str, Any]) -> None:
    """Bitwise, on gradients: queries that see nothing, keys that nobody sees, and the gradients of such rows."""
    case = make_inputs(layout, seqlen_q=75, seqlen_k=70, num_heads=2, num_heads_kv=1, head_dim=16, dtype=torch.float16)
    case |= mask | {"s_aux": torch.tensor([0.3, -INF])}
    check = GradCheck(case)

    def gradients(value: float) -> list[Tensor]:
        poisoned = poison(case, value)
        leaves = {name: poisoned[name].requires_grad_() for name in ("q", "k", "v", "s_aux")}
        out, lse = attend(poisoned | leaves)
        dout = check.dout.masked_fill(check.blind[..., None, None], value).half()
        dlse = check.dlse.masked_fill(check.blind_lse, value)
        return list(torch.autograd.grad([out, lse], list(leaves.values()), [dout, dlse]))

    clean = gradients(0.0)
    for value in (NAN, INF, -INF):
        assert all(bitwise_equal(a, b) for a, b in zip(gradients(value), clean, strict=True))


@pytest.mark.parametrize("tensor", ["q", "k", "v", "dout", "dlse"])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (30, 0)}], ids=str)
def test_a_nan_reaches_those_who_see_it(tensor: str, mask: dict[str, Any]) -> None:
    """Exactly the elements that it reaches in fp64 through visible pairs; all others keep their values."""
    sizes = {"batch": 1, "num_heads": 2, "num_heads_kv": 2, "head_dim": 16, "dtype": torch.float32}
    case = make_inputs("dense", seqlen_q=100, seqlen_k=100, **sizes)
    case |= {"dout": values((1, 100, 2, 16), torch.float32, seed=5), "dlse": values((1, 100, 2), torch.float32, seed=6)}
    dirty = case | {tensor: case[tensor].clone()}
    dirty[tensor][0, 50, 1].view(-1)[0] = NAN

    def gradients(case: dict[str, Tensor], attention, dtype: torch.dtype) -> list[Tensor]:
        q, k, v, dout, dlse = (x.to(dtype).requires_grad_() for x in case.values())
        outputs = attention({"q": q, "k": k, "v": v} | mask)[:2]
        return list(torch.autograd.grad(outputs, [q, k, v], [dout, dlse.mT]))

    visible = reference.visible(100, 100, **mask)
    rows = visible[:, 50] if tensor in "kv" else torch.arange(100) == 50
    keys = visible[rows].any(0)
    clean, spoiled = (gradients(x, lambda case: reference.attention(**case), torch.float64) for x in (case, dirty))
    for actual, a, b, reached in zip(
        gradients(dirty, attend, torch.float32), clean, spoiled, (rows, keys, keys), strict=True
    ):
        expected = torch.where(reached[:, None, None], b, a)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_rows_whose_scores_are_all_minus_infinity() -> None:
    """They count as empty, though the mask hides nothing from them; not even the NaN of their dout spreads."""
    q, k, v = (values((1, n, 1, 16), torch.float32, seed=n).abs() for n in (40, 70, 71))
    v = v[:, :70]
    k[..., 0] = 1.0
    q[:, 9:12, :, 0] = -INF
    dout = values(q.shape, q.dtype)
    dout[:, 9:12] = NAN
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = flash_attn_func(*leaves, return_softmax_lse=True, backend="triton")
    assert (lse[..., 9:12] == -INF).all()
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    kept = [x for x in range(40) if x not in (9, 10, 11)]
    leaves = [x.double().requires_grad_() for x in (q[:, kept], k, v)]
    expected = torch.autograd.grad(reference.attention(*leaves).out, leaves, dout[:, kept].double())
    assert bitwise_equal(dq[:, 9:12], torch.zeros(1, 3, 1, 16))
    for actual, exact in zip((dq[:, kept], dk, dv), expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-4, atol=1e-5)


def test_rows_with_an_lse_of_minus_infinity_weigh_nothing() -> None:
    q, k, v, dout = (values((1, 33, 2, 16), torch.float32, seed=i) for i in range(4))
    out, lse = flash_attn_func(q, k, v, return_softmax_lse=True, backend="triton")
    lse[..., 5:20] = -INF
    grads = [torch.full_like(x, NAN) for x in (q, k, v)]
    softmax_d = backward(dout, q, k, v, out, lse, dq=grads[0], dk=grads[1], dv=grads[2])
    weightless = dout.clone()
    weightless[:, 5:20] = 0.0
    expected = [torch.empty_like(x) for x in (q, k, v)]
    lse = torch.where(lse == -INF, 0.0, lse)
    backward(weightless, q, k, v, out, lse, dq=expected[0], dk=expected[1], dv=expected[2])
    assert not softmax_d[..., 5:20].any() and not grads[0][:, 5:20].any()
    for actual, exact in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_very_small_and_large_lse(shift: float) -> None:
    """exp(0 - lse) of lanes beyond the end would overflow for lse < -88."""
    q, k, v = (values((1, 37, 2, 16), torch.float32, seed=i) for i in range(3))
    q[..., 0], k[..., 0] = shift, 1.0
    leaves = {"q": q, "k": k, "v": v}
    check = GradCheck(leaves | {"causal": True, "softmax_scale": 1.0})
    assert (check.exact.lse * shift > 88 * abs(shift)).all()
    check.check(attend)


@pytest.mark.parametrize("sink", [-1e4, 1e4, 1e30])
def test_extreme_sinks(sink: float) -> None:
    case = make_inputs("dense", batch=1, dtype=torch.float32) | {"s_aux": torch.full((4,), sink)}
    GradCheck(case).check(attend)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_same_bits_in_every_run(deterministic: bool) -> None:
    """The flag changes nothing: no program adds to what another one wrote."""
    case = make_inputs("varlen", seqlen_q=70, num_heads=2, num_heads_kv=1, sink=True) | {"causal": True}
    check = GradCheck(case)
    names = ("q", "k", "v", "s_aux")
    leaves = {name: case[name].requires_grad_() for name in names}
    outputs = attend(case | leaves, deterministic=deterministic)
    runs = [
        torch.autograd.grad(outputs, list(leaves.values()), [check.dout, check.dlse], retain_graph=True)
        for _ in range(2)
    ]
    plain = torch.autograd.grad(attend(case | leaves), list(leaves.values()), [check.dout, check.dlse])
    for a, b, c in zip(*runs, plain, strict=True):
        assert bitwise_equal(a, b) and bitwise_equal(a, c)
