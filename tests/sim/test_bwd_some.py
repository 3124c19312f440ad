# SPDX-License-Identifier: BSD-3-Clause
"""Any subset of the gradients: each has the bits that it has among all of them, and no work is done for the others."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import POLICIES, attend, in_order, inputs
from torch import Tensor

import flash_attn3
from flash_attn3 import flash_attn_func, flash_attn_kvpacked_func, variants
from flash_attn3.flash_attn_interface import _flash_attn_backward
from flash_attn3.hopper import launch
from flash_attn3.testing import bitwise_equal, values

SHAPE = "bf16_d64_v64"
SHARING = "bf16_d256_v256"  # warpgroups share keys
NAMES = ("q", "k", "v", "s_aux")
SUBSETS = [subset for n in range(1, 5) for subset in itertools.combinations(NAMES, n)]
PRODUCTS = [subset for subset in SUBSETS if "s_aux" not in subset]
EACH = pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)


def case_of(shape: str, **mask: Any) -> dict[str, Any]:
    """Blocks cut by the mask and whole ones, two query heads for a KV head."""
    return inputs(shape, batch=1, seqlen_q=300, seqlen_k=200, num_heads=2, num_heads_kv=1, sink=True) | mask


def gradients(case: dict[str, Any], wanted: tuple[str, ...], **options: Any) -> tuple[Tensor, ...]:
    leaves = {name: case[name].detach().clone().requires_grad_() for name in wanted}
    case = case | leaves
    dout = case.pop("dout", None)
    out, _ = attend(case, **options)
    return torch.autograd.grad(
        out, list(leaves.values()), values(out.shape, out.dtype, seed=9) if dout is None else dout
    )


def check(case: dict[str, Any], wanted: tuple[str, ...], **options: Any) -> None:
    every = dict(zip(NAMES, gradients(case, NAMES, **options), strict=True))
    for name, grad in zip(wanted, gradients(case, wanted, **options), strict=True):
        torch.testing.assert_close(grad, every[name], rtol=0, atol=0, equal_nan=True)
        assert grad.dtype == every[name].dtype and grad.stride() == every[name].stride()


@EACH
@pytest.mark.parametrize("shape", [SHAPE, SHARING])
def test_the_same_bits(shape: str, wanted: tuple[str, ...], simulator) -> None:
    check(case_of(shape, causal=True), wanted, deterministic=True)


@pytest.mark.parametrize("variant", variants.partial_bwd_variants(), ids=lambda variant: variant.name)
@pytest.mark.slow
def test_the_same_bits_from_every_kernel(variant: variants.BwdVariant, simulator, launched: list[str]) -> None:
    case = case_of(f"{variant.dtype}_d{variant.head_dim}_v{variant.head_dim_v}", causal=True)
    case |= {"softcap": 9.0} if variant.softcap else {}
    wanted = tuple(name for name in "qkv" if getattr(variant, f"d{name}"))
    check(case, wanted, deterministic=True)
    assert launched[-1] == variant.name


@pytest.mark.parametrize("wanted", PRODUCTS, ids="-".join)
@pytest.mark.parametrize("spoiled", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("shape", [SHAPE, SHARING])
def test_what_is_not_finite(shape: str, spoiled: str, wanted: tuple[str, ...], simulator) -> None:
    """Each kernel keeps it from those who do not see it."""
    case = case_of(shape, window_size=(60, 0))
    case["dout"] = values(case["q"].shape, torch.bfloat16, seed=9)
    case[spoiled][0, 90, 0, 3], case[spoiled][0, 130, 0, 5] = torch.nan, torch.inf
    check(case, wanted)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("wanted", [("q",), ("v",), ("k", "v")], ids="-".join)
@pytest.mark.parametrize("shape", [SHAPE, pytest.param(SHARING, marks=pytest.mark.slow)])
def test_policy(shape: str, wanted: tuple[str, ...], policy: str, simulator) -> None:
    case = case_of(shape, causal=True)
    expected = gradients(case, wanted, deterministic=True)
    simulator.configure(in_order(policy))
    for grad, exact in zip(gradients(case, wanted, deterministic=True), expected, strict=True):
        assert bitwise_equal(grad, exact)


def statistics(simulator, case: dict[str, Any], wanted: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """Of the kernels of a backward."""
    before = len(simulator.report()["launches"])
    gradients(case, wanted)
    launches = simulator.report()["launches"][before:]
    return {one["kernel"]: one["statistics"] for one in launches if "bwd" in one["kernel"]}


@EACH
@pytest.mark.parametrize(("shape", "sms"), [(SHAPE, 1), (SHAPE, 132), (SHARING, 132)])
def test_no_work_for_the_others(shape: str, sms: int, wanted: tuple[str, ...], simulator) -> None:
    simulator.configure(f"sms={sms}")
    case = case_of(shape, causal=True)
    every, some = statistics(simulator, case, NAMES), statistics(simulator, case, wanted)

    dq, dk, dv = (name in wanted for name in "qkv")
    main, preprocess, postprocess = "fa3_bwd", "fa3_bwd_preprocess", "fa3_bwd_postprocess"
    assert (main in some) == (dq or dk or dv)
    in_parts = sms > 1  # dk and dv, where two CTAs take a query head each
    assert (postprocess in some) == (dq or "s_aux" in wanted or (in_parts and (dk or dv)))
    if not dq:  # no zeros to add to
        assert some[preprocess]["warp_instructions"] < every[preprocess]["warp_instructions"]
    if main not in some:
        return
    # Scores, and dP for dq and dk; then one product for each gradient.
    assert some[main]["macs"] * 5 == every[main]["macs"] * (1 + (dq or dk) + dq + dk + dv)
    assert some[main]["tma_bytes_out"] == every[main]["tma_bytes_out"] * dq
    kernel = next(v for v in variants.bwd_variants() if v.name.startswith(f"bwd_{shape}"))
    steps = every[main]["macs"] // (5 * kernel.block_m * kernel.block_n * kernel.head_dim)
    ctas = -(-case["k"].shape[1] // kernel.block_n) * (1 + in_parts)
    values_and_delta = ctas * kernel.block_n * kernel.head_dim_v * 2 + steps * kernel.block_m * 4
    assert every[main]["tma_bytes_in"] - some[main]["tma_bytes_in"] == (0 if dq or dk else values_and_delta)


def test_rows_are_not_read_for_dv_alone(simulator) -> None:
    """Its delta would be what they are read for."""
    case = case_of(SHAPE)
    v, k = (statistics(simulator, case, (name,))["fa3_bwd_preprocess"] for name in "vk")
    assert v["warp_instructions"] < k["warp_instructions"]


@pytest.mark.parametrize("wanted", PRODUCTS, ids="-".join)
def test_given_gradients(wanted: tuple[str, ...], simulator, launched: list[str]) -> None:
    q, k, v, dout = (values((2, 70, heads, 64), torch.bfloat16, seed=heads) for heads in (4, 2, 2, 4))
    out, lse = attend({"q": q, "k": k, "v": v})
    every = dict(zip(NAMES, gradients({"q": q, "k": k, "v": v, "dout": dout}, ("q", "k", "v")), strict=False))
    given = {f"d{name}": torch.full_like(every[name], torch.nan) for name in wanted}
    _flash_attn_backward(dout, q, k, v, out, lse, **given, backend="hopper")
    assert all(bitwise_equal(given[f"d{name}"], every[name]) for name in wanted)
    assert launched[-1].endswith("_s22" if len(wanted) == 3 else "_only_" + "".join(given))


@pytest.mark.parametrize("wanted", [("q",), ("kv",), ("s_aux",), ("kv", "s_aux"), ("q", "kv")], ids="-".join)
def test_packed_keys_and_values(wanted: tuple[str, ...], simulator, launched: list[str]) -> None:
    leaves = {"q": values((2, 70, 4, 64), torch.bfloat16), "kv": values((2, 70, 2, 2, 64), torch.bfloat16, seed=1)}
    leaves["s_aux"] = values((4,), torch.bfloat16, seed=2)

    def of(names: tuple[str, ...]) -> dict[str, Tensor]:
        arguments = {name: x.clone().requires_grad_(name in names) for name, x in leaves.items()}
        out = flash_attn_kvpacked_func(**arguments, causal=True, backend="hopper")
        grads = torch.autograd.grad(out, [arguments[name] for name in names], torch.ones_like(out))
        return dict(zip(names, grads, strict=True))

    every = of(tuple(leaves))
    assert all(bitwise_equal(grad, every[name]) for name, grad in of(wanted).items())
    kernel = {("q",): "_only_dq", ("kv",): "_only_dkdv", ("kv", "s_aux"): "_only_dkdv"}.get(wanted, "_s22")
    assert launched[-1].endswith(kernel)


@pytest.mark.parametrize("wanted", PRODUCTS[:-1], ids="-".join)
def test_the_whole_kernel_stands_in_for_one_that_cannot_be_had(wanted, simulator, launched, monkeypatch) -> None:
    unobtainable = launch.unobtainable
    monkeypatch.setattr(launch, "unobtainable", lambda name: "no compiler" if "_only_" in name else unobtainable(name))
    check(case_of(SHAPE, causal=True), wanted, deterministic=True)
    assert launched[-1].endswith("_s22")


def test_why_names_the_kernel_of_what_is_wanted(simulator, launched: list[str]) -> None:
    case = {name: case_of(SHAPE)[name] for name in "qkv"}
    case["q"].requires_grad_()
    out = flash_attn_func(**case, backend="hopper")
    out.float().sum().backward()
    assert flash_attn3.why(flash_attn_func, **case, backend="hopper").kernel == ", ".join(launched)
    assert launched[-1].endswith("_only_dq")
