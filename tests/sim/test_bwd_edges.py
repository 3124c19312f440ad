# SPDX-License-Identifier: BSD-3-Clause
"""Gradients of empty calls, uncovered rows, odd layouts, parts of a softmax, and of what is not finite."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import MASKS, attend, check_gradients, inputs
from torch import Tensor

import flash_attn3
from flash_attn3 import flash_attn_func, flash_attn_qkvpacked_func, hopper, reference
from flash_attn3.flash_attn_interface import _flash_attn_backward
from flash_attn3.testing import GradCheck, assert_bounded, bitwise_equal, make_inputs, poison, restrided, values

SHAPE = "bf16_d64_v64"
SHARING = "bf16_d256_v256"  # warpgroups share keys
NAN, INF = torch.nan, torch.inf


def gradients(case: dict[str, Any], dout: Tensor, dlse: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
    names = [name for name in ("q", "k", "v", "s_aux") if case.get(name) is not None]
    leaves = [case[name].detach().requires_grad_() for name in names]
    out, lse = attend(case | dict(zip(names, leaves, strict=True)), **options)
    outputs, grads = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
    return torch.autograd.grad(outputs, leaves, grads)


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(bitwise_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("empty", ["batch", "seqlen_q", "seqlen_k"])
@pytest.mark.parametrize("sink", [False, True])
def test_empty_calls(empty: str, sink: bool, simulator) -> None:
    case = inputs(SHAPE, sink=sink, **{empty: 0})
    if empty == "seqlen_k":
        return check_gradients(case)
    grads = gradients(case, torch.zeros(case["q"].shape).bfloat16())
    assert all(not grad.any() for grad in grads)


def test_packed_calls_without_sequences_or_keys(simulator) -> None:
    q, none = torch.randn(5, 2, 64).bfloat16(), torch.zeros(0, 2, 64).bfloat16()
    for cu_seqlens in ([0], [0, 0], [0, 5], [2, 4]):
        starts = torch.tensor(cu_seqlens, dtype=torch.int32)
        case = {"q": q, "k": none, "v": none, "cu_seqlens_q": starts, "cu_seqlens_k": torch.zeros_like(starts)}
        dq, dk, dv = gradients(case, torch.randn(5, 2, 64).bfloat16())
        assert not dq.any() and dk.numel() == dv.numel() == 0


@pytest.mark.parametrize("lengths", [[0, 0, 70], [70, 0, 0], [1, 0, 130]])
def test_empty_sequences(lengths: list[int], simulator) -> None:
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    q, k, v = (values((sum(lengths), 2, 64), torch.bfloat16, seed=i) for i in range(3))
    for deterministic in (False, True):
        case = {"q": q, "k": k, "v": v, "cu_seqlens_q": starts, "cu_seqlens_k": starts, "causal": True}
        check_gradients(case, deterministic=deterministic)


@pytest.mark.parametrize("starts", [[3, 60, 60, 150], [0, 0, 140, 141], [150, 150, 150, 190]])
def test_uncovered_rows(starts: list[int], simulator) -> None:
    case = inputs(SHAPE, batch=1, seqlen_q=200, seqlen_k=300)
    case = {name: x[0] for name, x in case.items()}
    cu_seqlens_k = torch.tensor([10, 100, 160, 290], dtype=torch.int32)
    case |= {"cu_seqlens_q": torch.tensor(starts, dtype=torch.int32), "cu_seqlens_k": cu_seqlens_k, "causal": True}
    check_gradients(case)


@pytest.mark.parametrize("shape", [SHAPE, SHARING])
@pytest.mark.parametrize("sizes", [(500, 20), (20, 300)])
def test_many_more_rows_than_keys_or_fewer(sizes: tuple[int, int], shape: str, simulator) -> None:
    case = inputs(shape, seqlen_q=sizes[0], seqlen_k=sizes[1], batch=1) | {"causal": True}
    check_gradients(case)


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("shape", [SHAPE, SHARING])
def test_groups_shared_out(shape: str, group: int, simulator) -> None:
    """A CTA takes all query heads of a group, or a part of them and leaves parts of dk and dv."""
    for sms in (1, 6, 132):
        simulator.configure(f"sms={sms}")
        case = inputs(shape, batch=1, seqlen_q=70, seqlen_k=150, num_heads=group, num_heads_kv=1)
        check_gradients(case | {"causal": True}, deterministic=True)


# Where gradients are written


def test_one_gradient_for_packed_inputs(simulator) -> None:
    qkv = values((2, 70, 8, 64), torch.bfloat16).requires_grad_()
    dout = values((2, 70, 4, 64), torch.bfloat16, seed=1)
    out = flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=4, backend="hopper")
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    q, k, v = qkv.detach().split((4, 2, 2), 2)
    assert bitwise_equal(dqkv, torch.cat(gradients({"q": q, "k": k, "v": v, "causal": True}, dout), 2))


@pytest.mark.parametrize("layout", ["dense", "varlen"])
def test_strides_move_no_bits(layout: str, simulator) -> None:
    """Of inputs, of dout, and of gradients that are written in place; misaligned ones are copied."""
    case = inputs(SHAPE, layout, seqlen_q=70, seqlen_k=150) | {"causal": True}
    dout = values(case["q"].shape, torch.bfloat16, seed=9)
    plain = gradients(case, dout)
    for seed in range(2):
        views = {name: restrided(case[name], seed) for name in "qkv"}
        assert same(gradients(case | views, restrided(dout, seed)), plain)
    shifted = torch.cat([dout.new_zeros(1), dout.reshape(-1)])[1:].view(dout.shape)
    assert same(gradients(case, shifted), plain)
    assert same(
        gradients(case, dout[..., :1, :1].expand(dout.shape)),
        gradients(case, dout[..., :1, :1].expand(dout.shape).contiguous()),
    )


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", [1, 2])
def test_given_gradients(dtype: torch.dtype, offset: int, group: int, simulator) -> None:
    """Written, not added to, in any layout, and what lies between the rows stays as it is."""
    q, k, v, dout = (values((2, 70, heads, 64), torch.bfloat16, seed=heads) for heads in (2 * group, 2, 2, 2 * group))
    out, lse = attend({"q": q, "k": k, "v": v})
    expected = gradients({"q": q, "k": k, "v": v}, dout)
    memory = [torch.full((x.numel() // 64 * 72 + offset,), 7.0, dtype=dtype) for x in (q, k, v)]
    rows = [m[offset:].view(*x.shape[:-1], 72) for m, x in zip(memory, (q, k, v), strict=True)]
    dq, dk, dv = (row[..., :64] for row in rows)
    _flash_attn_backward(dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, backend="hopper")
    for grad, exact, row in zip((dq, dk, dv), expected, rows, strict=True):
        assert bitwise_equal(grad.bfloat16(), exact) and bool((row[..., 64:] == 7.0).all())


def test_ring_of_key_blocks(simulator) -> None:
    """Gradients of parts of the keys, unrounded, from out and lse of the whole."""
    q, k, v, dout = (values((1, 100, heads, 64), torch.bfloat16, seed=heads) for heads in (4, 2, 3, 5))
    v, dout = v[:, :, :2], dout[:, :, :4]
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    exact = reference.attention(*leaves)
    expected = torch.autograd.grad(exact.out, leaves, dout.double())
    eager_leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    eager = reference.attention(*eager_leaves, precision=torch.bfloat16)
    rounded = torch.autograd.grad(eager.out, eager_leaves, dout)
    out, lse = exact.out.detach().float(), exact.lse.detach().float()
    total = torch.zeros_like(q, dtype=torch.float32)
    parts = []
    for keys in (slice(0, 40), slice(40, 41), slice(41, 100)):
        dq, dk, dv = (torch.full(x.shape, NAN) for x in (q, k[:, keys], v[:, keys]))
        _flash_attn_backward(dout, q, k[:, keys], v[:, keys], out, lse, dq=dq, dk=dk, dv=dv, backend="hopper")
        total += dq
        parts.append((dk, dv))
    grads = (total, *(torch.cat(x, 1) for x in zip(*parts, strict=True)))
    for name, grad, true, low in zip("qkv", grads, expected, rounded, strict=True):
        assert_bounded(name, grad, true, low, torch.bfloat16, floor_ratio=3.0)


def test_second_derivatives_are_refused(simulator) -> None:
    leaves = [values((1, 20, 1, 64), torch.bfloat16, seed=i).requires_grad_() for i in range(3)]
    out = flash_attn_func(*leaves, backend="hopper")
    grads = torch.autograd.grad(out.float().square().sum(), leaves, create_graph=True)
    with pytest.raises(flash_attn3.UnsupportedError, match="second"):
        grads[0].float().sum().backward()


@pytest.mark.parametrize("shape", [SHAPE, SHARING])
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
def test_fixed_order(shape: str, mask: str, simulator) -> None:
    """The same bits in every run: also where CTAs run in another order, or many at once."""
    case = inputs(shape, batch=2, seqlen_q=150, seqlen_k=300, num_heads=2, num_heads_kv=2) | MASKS[mask]
    dout = values(case["q"].shape, torch.bfloat16, seed=9)
    simulator.configure("coresident=4")
    first = gradients(case, dout, deterministic=True)
    for seed in range(3):
        simulator.configure(f"policy=random,seed={seed},coresident=4,quantum=50")
        assert same(gradients(case, dout, deterministic=True), first)


# What must not matter, and what must


@pytest.mark.parametrize("layout", ["dense", "varlen", "padded"])
@pytest.mark.parametrize("mask", [{"causal": True}, {"window_size": (12, 3)}], ids=str)
@pytest.mark.parametrize("shape", [SHAPE, SHARING])
def test_what_nobody_sees_has_no_influence(shape: str, layout: str, mask: dict[str, Any], simulator) -> None:
    """Bitwise: queries that see nothing, keys that nobody sees, and the gradients of such rows."""
    case = inputs(shape, layout, seqlen_q=75, seqlen_k=70, num_heads=2, num_heads_kv=1)
    case |= mask | {"s_aux": torch.tensor([0.3, -INF])}
    check = GradCheck(case)

    def of(value: float) -> tuple[Tensor, ...]:
        dout = check.dout.masked_fill(check.blind[..., None, None], value)
        return gradients(poison(case, value), dout, check.dlse.masked_fill(check.blind_lse, value), deterministic=True)

    clean = of(0.0)
    for value in (NAN, INF, -INF):
        assert same(of(value), clean)


@pytest.mark.parametrize("tensor", ["q", "k", "v", "dout", "dlse"])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (30, 0)}], ids=str)
@pytest.mark.parametrize("shape", [SHAPE, SHARING])
def test_a_nan_reaches_those_who_see_it(shape: str, tensor: str, mask: dict[str, Any], simulator) -> None:
    """Exactly the elements that it reaches in fp64 through visible pairs; all others keep their values."""
    case = inputs(shape, batch=1, seqlen_q=100, seqlen_k=100, num_heads=2, num_heads_kv=2)
    case |= {"dout": values(case["q"].shape, torch.bfloat16, seed=5), "dlse": values((1, 100, 2), torch.float32)}
    dirty = case | {tensor: case[tensor].clone()}
    dirty[tensor][0, 50, 1].view(-1)[0] = NAN

    def of(case: dict[str, Tensor], exact: bool) -> tuple[Tensor, ...]:
        leaves = [(case[x].double() if exact else case[x]).detach().requires_grad_() for x in "qkv"]
        arguments = dict(zip("qkv", leaves, strict=True)) | mask
        outputs = reference.attention(**arguments)[:2] if exact else attend(arguments)
        grads = [case["dout"].to(outputs[0].dtype), case["dlse"].mT.to(outputs[1].dtype)]
        return torch.autograd.grad(outputs, leaves, grads)

    visible = reference.visible(100, 100, **mask)
    rows = visible[:, 50] if tensor in "kv" else torch.arange(100) == 50
    keys = visible[rows].any(0)
    clean, spoiled = of(case, True), of(dirty, True)
    for actual, a, b, reached in zip(of(dirty, False), clean, spoiled, (rows, keys, keys), strict=True):
        expected = torch.where(reached[:, None, None], b, a)
        torch.testing.assert_close(actual.double(), expected, rtol=3e-2, atol=3e-2, equal_nan=True)


def test_rows_whose_scores_are_all_minus_infinity(simulator) -> None:
    """They count as empty, though the mask hides nothing from them; not even the NaN of their dout spreads."""
    q, k, v = (values((1, n, 1, 64), torch.bfloat16, seed=n).abs() for n in (40, 70, 71))
    v = v[:, :70]
    k[..., 0] = 1.0
    q[:, 9:12, :, 0] = -INF
    dout = values(q.shape, q.dtype)
    dout[:, 9:12] = NAN
    kept = [x for x in range(40) if x not in (9, 10, 11)]
    dq, dk, dv = gradients({"q": q, "k": k, "v": v}, dout)
    without = gradients({"q": q[:, kept], "k": k, "v": v}, dout[:, kept])
    assert not dq[:, 9:12].any()
    for actual, exact in zip((dq[:, kept], dk, dv), without, strict=True):
        torch.testing.assert_close(actual, exact, rtol=2e-2, atol=2e-3)


def test_rows_with_an_lse_of_minus_infinity_weigh_nothing(simulator) -> None:
    q, k, v, dout = (values((1, 140, 2, 64), torch.bfloat16, seed=i) for i in range(4))
    out, lse = attend({"q": q, "k": k, "v": v})
    lse[..., 5:20] = -INF
    grads = [torch.full_like(x, NAN) for x in (q, k, v)]
    softmax_d = _flash_attn_backward(
        dout, q, k, v, out, lse, dq=grads[0], dk=grads[1], dv=grads[2], deterministic=True, backend="hopper"
    )
    weightless = dout.clone()
    weightless[:, 5:20] = 0.0
    lse = torch.where(lse == -INF, 0.0, lse)
    expected = [torch.full_like(x, NAN) for x in (q, k, v)]
    _flash_attn_backward(
        weightless, q, k, v, out, lse, dq=expected[0], dk=expected[1], dv=expected[2], deterministic=True,
        backend="hopper",
    )  # fmt: skip
    assert not softmax_d[..., 5:20].any() and not grads[0][:, 5:20].any()
    assert same(tuple(grads), tuple(expected))


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_very_small_and_large_lse(shift: float, simulator) -> None:
    """exp(0 - lse) of lanes beyond the end would overflow for lse < -88."""
    q, k, v = (values((1, 37, 2, 64), torch.bfloat16, seed=i) for i in range(3))
    q[..., 0], k[..., 0] = shift, 1.0
    case = {"q": q, "k": k, "v": v, "causal": True, "softmax_scale": 1.0}
    grads = gradients(case, values(q.shape, torch.bfloat16, seed=4))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_any_index_is_memory_safe(name: str, deterministic: bool, simulator) -> None:
    """The simulator refuses an access outside of the tensors. Sequences may overlap here, and race for a row."""
    simulator.configure("races=0,coresident=4")
    case = make_inputs("padded", batch=4, seqlen_q=100, seqlen_k=150, head_dim=64)
    dout = values(case["q"].shape, torch.bfloat16)
    for seed in range(3):
        torch.manual_seed(seed)
        wrong = torch.randint(-(2**31), 2**31 - 1, case[name].shape).int()
        mixed = torch.where(torch.rand(wrong.shape) < 0.5, wrong, case[name])
        for broken in (wrong, mixed):
            gradients(case | {name: broken}, dout, deterministic=deterministic)
            with pytest.raises(flash_attn3.FlashAttn3ValueError, match=name):
                flash_attn3.check_errors()


def test_the_backward_is_ours(simulator, launched: list[str]) -> None:
    case = inputs(SHAPE)
    assert "bwd" in hopper.__all__
    gradients(case, values(case["q"].shape, torch.bfloat16))
    assert [name.split("_d64")[0] for name in launched] == ["fwd_bf16", "bwd_bf16"]
    leaves = {name: case[name].clone().requires_grad_() for name in "qkv"}
    assert flash_attn3.why(flash_attn_func, **leaves, backend="hopper").kernel == ", ".join(launched)
    assert flash_attn3.why(flash_attn_func, **case, backend="hopper").kernel == launched[0]
