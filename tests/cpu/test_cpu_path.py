# SPDX-License-Identifier: BSD-3-Clause
"""The cpu backend on dense and ragged tensors, forward and backward, feature by feature against the oracle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import flash_attn3
from flash_attn3 import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func, reference
from flash_attn3.flash_attn_interface import _flash_attn_backward
from flash_attn3.testing import GradCheck, bitwise_equal, call, make_inputs, restrided, values

INF = float("inf")
MEMORY = Path(__file__).parents[2] / "benchmarks" / "memory.py"
attend = partial(call, backend="cpu")
FEATURES = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (20, 10)},
    "left window": {"window_size": (20, -1)},
    "right window": {"window_size": (-1, 10)},
    "diagonal": {"window_size": (0, 0)},
    "causal window": {"window_size": (20, 30), "causal": True},
    "chunk": {"attention_chunk": 48},
    "causal chunk window": {"attention_chunk": 48, "causal": True, "window_size": (20, -1)},
    "softcap": {"softcap": 2.0},
    "causal softcap": {"softcap": 5.0, "causal": True},
    "sink": {"s_aux": torch.tensor([0.5, -INF, 5.0, -40.0])},
    "causal sink softcap": {"s_aux": torch.tensor([0.5, -INF, 5.0, 40.0]), "causal": True, "softcap": 3.0},
    "scale": {"softmax_scale": 0.3},
    "no scale": {"softmax_scale": 0.0, "causal": True},
}
# Row tiles end at 256, blocks of keys at 512.
SIZES = [0, 1, 2, 7, 97, 127, 255, 256, 257, 511, 512, 513]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_dense(feature: str, dtype: torch.dtype) -> None:
    GradCheck(make_inputs("dense", dtype=dtype, seqlen_q=90, seqlen_k=131) | FEATURES[feature]).check(attend)


@pytest.mark.parametrize("layout", ["varlen", "padded"])
@pytest.mark.parametrize("feature", FEATURES)
def test_ragged(feature: str, layout: str) -> None:
    case = make_inputs(layout, batch=5, seqlen_q=70, seqlen_k=90, dtype=torch.float32, strided=True)
    GradCheck(case | FEATURES[feature]).check(attend)


@pytest.mark.parametrize("seqlen_q, seqlen_k", [*zip(SIZES, reversed(SIZES), strict=True), (513, 513), (300, 7)])
@pytest.mark.parametrize("feature", ["full", "causal", "window", "causal chunk window"])
def test_sizes(seqlen_q: int, seqlen_k: int, feature: str) -> None:
    sizes = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "head_dim": 8, "batch": 1}
    GradCheck(make_inputs("dense", dtype=torch.float32, num_heads=2, **sizes) | FEATURES[feature]).check(attend)


@pytest.mark.parametrize("shape", [(3, 4, 1), (1, 8, 8), (1, 16, 2), (3, 6, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_and_heads(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    batch, num_heads, num_heads_kv = shape
    heads = {"batch": batch, "num_heads": num_heads, "num_heads_kv": num_heads_kv}
    GradCheck(make_inputs("dense", dtype=dtype, **heads) | {"causal": True}).check(attend)


@pytest.mark.parametrize("batch, num_heads, num_heads_kv", [(0, 4, 2), (2, 0, 0), (2, 0, 2)])
def test_no_sequences_and_no_heads(batch: int, num_heads: int, num_heads_kv: int) -> None:
    heads = {"num_heads": num_heads, "num_heads_kv": num_heads_kv}
    q, k, v = (x.requires_grad_() for x in make_inputs("dense", batch=batch, **heads).values())
    out, lse = flash_attn_func(q, k, v, return_softmax_lse=True)
    assert out.shape == q.shape and lse.shape == (batch, num_heads, 33)
    grads = torch.autograd.grad([out, lse], [q, k, v], [torch.ones_like(out), torch.ones_like(lse)])
    assert all(bitwise_equal(grad, torch.zeros_like(x)) for grad, x in zip(grads, (q, k, v), strict=True))


HEAD_DIMS = [(8, 8), (96, 96), (192, 128), (256, 256), (64, 256)]


@pytest.mark.parametrize(
    "dims, dtype",
    [*((dims, torch.float32) for dims in HEAD_DIMS), *((dims, torch.bfloat16) for dims in [*HEAD_DIMS, (64, 512)])],
    ids=str,
)
def test_head_dims(dims: tuple[int, int], dtype: torch.dtype) -> None:
    case = make_inputs("dense", dtype=dtype, head_dim=dims[0], head_dim_v=dims[1], strided=True)
    GradCheck(case | {"causal": True}).check(attend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("distribution", ["normal", "paper", "huge"])
def test_long_rows(distribution: str, dtype: torch.dtype) -> None:
    case = make_inputs("dense", batch=1, seqlen_q=160, seqlen_k=1300, dtype=dtype, distribution=distribution)
    GradCheck(case | {"causal": True}, distribution=distribution).check(attend)


@pytest.mark.parametrize("feature", ["full", "causal softcap", "causal sink softcap", "window"])
def test_max_logits(feature: str) -> None:
    check = GradCheck(make_inputs("varlen", batch=4, dtype=torch.float32, seqlen_q=300) | FEATURES[feature])
    plain = attend(check.case)
    out, lse, max_logits = attend(check.case, return_max_logits=True)
    check.check_forward(out, lse, max_logits)
    assert bitwise_equal(out, plain[0]) and bitwise_equal(lse, plain[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed(dtype: torch.dtype) -> None:
    q, k, v = (make_inputs("dense", dtype=dtype, seqlen_q=65)[name] for name in "qkv")
    dout = values(q.shape, dtype, seed=9)

    def gradients(attention, *inputs: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = attention(*leaves, causal=True)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    out, dq, dk, dv = gradients(flash_attn_func, q, k, v)
    qkv = torch.cat([q, k, v], 2)
    packed = gradients(partial(flash_attn_qkvpacked_func, num_heads_q=q.shape[2]), qkv)
    assert bitwise_equal(packed[0], out) and bitwise_equal(packed[1], torch.cat([dq, dk, dv], 2))
    kv = torch.stack([k, v], 2)
    packed = gradients(flash_attn_kvpacked_func, q, kv)
    assert all(bitwise_equal(a, b) for a, b in zip(packed, [out, dq, torch.stack([dk, dv], 2)], strict=True))


@pytest.mark.parametrize("wanted", ["q", "k", "v", "s_aux", "qk", "kv"])
def test_only_some_gradients(wanted: str) -> None:
    names = [wanted] if wanted == "s_aux" else list(wanted)
    case = make_inputs("dense", dtype=torch.float32, seqlen_q=70, sink=True) | {"causal": True, "softcap": 4.0}

    def gradients(names: list[str]) -> dict[str, torch.Tensor]:
        leaves = {name: case[name].clone().requires_grad_() for name in names}
        out, lse = attend(case | leaves)
        loss = (out * values(out.shape, out.dtype)).sum() + lse.masked_fill(lse == -INF, 0.0).sum()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    whole, part = gradients(["q", "k", "v", "s_aux"]), gradients(names)
    assert all(bitwise_equal(part[name], whole[name]) for name in names)


@pytest.mark.parametrize("through", ["out", "lse"])
def test_gradient_through_one_output(through: str) -> None:
    case = make_inputs("dense", dtype=torch.float32, seqlen_q=65, seqlen_k=65, sink=True) | {"causal": True}
    names = ["q", "k", "v", "s_aux"]

    def gradients(attention, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = {name: case[name].to(dtype).requires_grad_() for name in names}
        x = attention(case | leaves)[0 if through == "out" else 1]
        grads = torch.autograd.grad(x, list(leaves.values()), values(x.shape, x.dtype), allow_unused=True)
        return [torch.zeros((), dtype=dtype) if grad is None else grad for grad in grads]

    exact = gradients(lambda case: reference.attention(**case), torch.float64)
    for actual, expected in zip(gradients(attend, torch.float32), exact, strict=True):
        torch.testing.assert_close(actual.double(), expected.expand_as(actual), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_of_a_part_of_a_larger_softmax(grad_dtype: torch.dtype) -> None:
    """Gradients of the halves of the keys, with out and lse of the whole, into strided views of packed tensors."""
    q, k, v = (make_inputs("dense", dtype=torch.bfloat16, seqlen_q=50, seqlen_k=96)[name] for name in "qkv")
    out, lse = flash_attn_func(q, k, v, return_softmax_lse=True)
    dout = values(out.shape, out.dtype)
    whole = [torch.empty_like(x, dtype=torch.float32) for x in (q, k, v)]
    _flash_attn_backward(dout, q, k, v, out, lse, dq=whole[0], dk=whole[1], dv=whole[2])
    parts = []
    for half in (slice(0, 48), slice(48, 96)):
        dq = restrided(torch.full_like(q, torch.nan, dtype=grad_dtype))
        dk, dv = torch.full((*k[:, half].shape[:2], 2, *k.shape[2:]), torch.nan, dtype=grad_dtype).unbind(2)
        _flash_attn_backward(dout, q, k[:, half], v[:, half], out, lse, dq=dq, dk=dk, dv=dv)
        parts.append((dq, dk, dv))
    merged = [
        parts[0][0].float() + parts[1][0].float(),
        *(torch.cat(x, 1).float() for x in list(zip(*parts, strict=True))[1:]),
    ]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if grad_dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for actual, expected in zip(merged, whole, strict=True):
        torch.testing.assert_close(actual, expected, **tolerance)


def test_out_of_any_strides_and_in_fp32() -> None:
    case = make_inputs("dense", dtype=torch.bfloat16, seqlen_q=260, strided=True) | {"causal": True}
    expected = attend(case)
    for out in (
        restrided(torch.full_like(expected[0], torch.nan)),
        expected[0].new_empty(4, 260, 2, 64).permute(2, 1, 0, 3),
    ):
        assert all(bitwise_equal(a, b) for a, b in zip(attend(case, out=out), expected, strict=True))
    unrounded = attend(case, out=torch.full(expected[0].shape, torch.nan))[0]
    assert bitwise_equal(unrounded.bfloat16(), expected[0])


# Exact results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seqlen", [1, 130, 700])
def test_one_visible_key_selects_its_value(dtype: torch.dtype, seqlen: int) -> None:
    case = make_inputs("dense", dtype=dtype, seqlen_q=seqlen, seqlen_k=seqlen, num_heads_kv=4)
    out, lse = attend(case | {"window_size": (0, 0)})
    assert bitwise_equal(out, case["v"])
    scores = (case["q"].double() * case["k"].double()).sum(-1) / 8
    torch.testing.assert_close(lse.double(), scores.transpose(1, 2), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("winner", [0, 300, 511, 512, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_key_far_above_all_others_selects_its_value(dtype: torch.dtype, winner: int) -> None:
    q, k, v = (values((1, n, 1, 64), dtype, seed=n) for n in (260, 1100, 1101))
    q, k, v = q.abs() + 0.5, k.clamp(-1, 1), v[:, :1100]
    k[:, winner] = 50.0
    out = flash_attn_func(q, k, v)
    assert bitwise_equal(out, v[:, winner : winner + 1].expand_as(q).contiguous())


@pytest.mark.parametrize("slope", [3.0, 40.0])
@pytest.mark.parametrize("feature", ["full", "causal sink softcap"])
def test_scores_that_rise_from_tile_to_tile(feature: str, slope: float) -> None:
    """By less and by more than a row may exceed its maximum over earlier tiles."""
    case = make_inputs("dense", dtype=torch.float32, seqlen_q=9, seqlen_k=1600, batch=1) | FEATURES[feature]
    case["q"] = case["q"].abs()
    case["k"] = case["k"] + torch.linspace(0, slope, 1600)[:, None, None] / 16
    GradCheck(case).check(attend)


def test_a_row_far_above_its_first_tile_moves_no_bit_of_others() -> None:
    q, k, v = (values((1, n, 2, 64), torch.float32, seed=n) for n in (300, 1500, 1501))
    changed = q.clone()
    changed[:, 77] *= 1e4
    out, changed_out = (flash_attn_func(x, k, v[:, :1500]) for x in (q, changed))
    others = torch.arange(300) != 77
    assert bitwise_equal(out[:, others], changed_out[:, others])
    assert not bitwise_equal(out[:, 77], changed_out[:, 77])


@pytest.mark.parametrize("seqlen", [1, 64, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_uniform_weights_and_constant_values(dtype: torch.dtype, seqlen: int) -> None:
    q, k = torch.zeros(1, 5, 2, 64, dtype=dtype), values((1, seqlen, 2, 64), dtype)
    v = torch.randint(-4, 5, (1, seqlen, 2, 64)).to(dtype)
    mean = v.double().mean(1, keepdim=True).to(dtype)
    assert bitwise_equal(flash_attn_func(q, k, v) + 0.0, mean.expand_as(q) + 0.0)
    constant = torch.full_like(v, 0.6875)
    assert bitwise_equal(flash_attn_func(q, k, constant), constant[:, :1].expand_as(q).contiguous())


def test_values_scaled_by_a_power_of_two() -> None:
    case = make_inputs("dense", dtype=torch.float32) | {"causal": True}
    assert bitwise_equal(attend(case | {"v": case["v"] * 2.0**40})[0], attend(case)[0] * 2.0**40)


# Values that are not finite, and extreme ones


@pytest.mark.parametrize("poison", [float("nan"), INF, -INF])
@pytest.mark.parametrize("tensor", "qkv")
def test_what_is_not_finite_reaches_only_those_who_see_it(tensor: str, poison: float) -> None:
    case = make_inputs("dense", dtype=torch.float32, seqlen_q=300, seqlen_k=300, num_heads_kv=4) | {"causal": True}
    dirty = {name: case[name].clone() for name in "qkv"}
    dirty[tensor][1, 130, 2, 5] = poison
    (out, lse), (clean, clean_lse) = attend(case | dirty), attend(case)
    touched = torch.zeros(out.shape, dtype=torch.bool)
    touched[1, 130 if tensor == "q" else slice(130, None), 2, 5 if tensor == "v" else slice(None)] = True
    assert bitwise_equal(out[~touched], clean[~touched])
    rows = touched.any(-1).transpose(1, 2)
    assert bitwise_equal(lse[~rows], clean_lse[~rows])
    exact = reference.attention(**case | dirty)
    torch.testing.assert_close(out[touched].double(), exact.out[touched], equal_nan=True, rtol=1e-4, atol=1e-5)


def test_gradients_of_rows_that_do_not_see_nan() -> None:
    case = make_inputs("dense", batch=1, dtype=torch.float32, seqlen_q=300, seqlen_k=300) | {"causal": True}
    dirty = {name: case[name].clone() for name in "kv"}
    for x in dirty.values():
        x[:, 200:] = torch.nan
    rows = {"q": case["q"][:, :200], "k": case["k"][:, :200], "v": case["v"][:, :200], "causal": True}

    def gradients(case: dict, dout: torch.Tensor) -> list[torch.Tensor]:
        leaves = {name: case[name].clone().requires_grad_() for name in "qkv"}
        return torch.autograd.grad(attend(case | leaves)[0], list(leaves.values()), dout)

    dout = values((1, 300, 4, 64), torch.float32)
    dout[:, 200:] = 0.0
    dq, _, _ = gradients(case | dirty, dout)
    torch.testing.assert_close(dq[:, :200], gradients(rows, dout[:, :200])[0])
    assert dq[:, 200:].isnan().all()


@pytest.mark.parametrize("seed", range(3))
def test_causal_prefix_does_not_depend_on_the_suffix(seed: int) -> None:
    case = make_inputs("dense", dtype=torch.float32, seqlen_q=600, seqlen_k=600, head_dim=16, seed=seed)
    changed = {name: case[name].clone() for name in "qkv"}
    for name, x in changed.items():
        x[:, 530:] = {"q": 1e3, "k": 1e3, "v": INF}[name]
    out, changed_out = (attend(case | x, causal=True)[0] for x in ({}, changed))
    assert bitwise_equal(out[:, :530], changed_out[:, :530])


@pytest.mark.parametrize("factor", [1e2, 1e4, 1e15])
def test_huge_scores(factor: float) -> None:
    """The largest one decides, in whichever block of keys it is."""
    q, k, v = (values((1, n, 2, 64), torch.float32, seed=i) for i, n in enumerate((30, 1500, 1500)))
    leaves = [x.clone().requires_grad_() for x in (q * factor, k, v)]
    out, lse = flash_attn_func(*leaves, return_softmax_lse=True)
    exact = reference.attention(q * factor, k, v)
    torch.testing.assert_close(lse.double(), exact.lse, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(out.double(), exact.out, rtol=0.0, atol=1e-6 * factor if factor < 1e4 else 10.0)
    if factor < 1e15:  # beyond, the rounding of lse is as large as the differences of scores
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), leaves))


def test_scores_of_minus_infinity_are_an_empty_row() -> None:
    q, k, v = torch.ones(1, 3, 1, 8), torch.full((1, 600, 1, 8), -INF), torch.ones(1, 600, 1, 8)
    out, lse = flash_attn_func(q, k, v, return_softmax_lse=True)
    assert bitwise_equal(out, torch.zeros_like(q)) and (lse == -INF).all()
    k[:, 555] = 0.0
    out, lse = flash_attn_func(q, k, v, return_softmax_lse=True)
    assert bitwise_equal(out, torch.ones_like(q)) and (lse == 0.0).all()


@pytest.mark.parametrize("sink", [None, torch.zeros(2)], ids=["plain", "sink"])
def test_empty_rows_are_positive_zero(sink: torch.Tensor | None) -> None:
    q, k = torch.randn(1, 31, 2, 16), torch.randn(1, 1, 2, 16)
    out = flash_attn_func(q, k, -k.abs(), causal=True, s_aux=sink)
    assert bitwise_equal(out[:, :30], torch.zeros(1, 30, 2, 16))


@pytest.mark.parametrize("sink", [-1e4, 1e4, 1e30])
def test_extreme_sinks(sink: float) -> None:
    case = make_inputs("dense", dtype=torch.float32, seqlen_k=600) | {"s_aux": torch.full((4,), sink)}
    GradCheck(case).check(attend)


# Contents of index tensors


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"])
@pytest.mark.parametrize("content", [-(2**31), -1, 2**31 - 1])
def test_clamps_are_noted(name: str, content: int) -> None:
    case = make_inputs("padded", dtype=torch.float32)
    case |= {x: case[x].nan_to_num() for x in "qkv"} | {name: case[name].clone()}
    case[name][-1] = content
    out, lse = attend(case)
    with pytest.raises(flash_attn3.FlashAttn3ValueError, match=name):
        flash_attn3.check_errors()
    GradCheck(case).check_forward(out, lse)


# Memory


@pytest.mark.parametrize("seqlen, options", [(32768, []), (8192, ["--backward"])])
def test_memory_grows_with_the_length_only(seqlen: int, options: list[str]) -> None:
    """The score matrix alone would take 4 GiB, 256 MiB."""
    command = [sys.executable, str(MEMORY), "flash", str(seqlen), "--causal", *options]
    environment = os.environ | {"PYTHONPATH": str(MEMORY.parents[1])}
    measured = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(measured.stdout)["extra_mib"] < 48
