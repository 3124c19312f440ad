# SPDX-License-Identifier: BSD-3-Clause
"""Replayed calls: same bits as checked ones, the same refusals, and nothing kept that must not be."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

import flash_attn3
from flash_attn3 import FlashAttn3TypeError, FlashAttn3ValueError, UnsupportedError, checks, replay
from flash_attn3.testing import bitwise_equal, call, make_inputs, with_append

LAYOUTS = ("dense", "varlen", "padded", "cache", "paged")


@pytest.fixture
def plans_made(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call that was checked, whether a plan came of it; replayed calls add nothing."""
    made: list[bool] = []
    plan = replay._plan

    def counted(*arguments):
        made.append((result := plan(*arguments)) is not None)
        return result

    monkeypatch.setattr(replay, "_plan", counted)
    return made


def odd_case(layout: str, seed: int, least_k: int = 0) -> dict:
    """A case whose sizes no other test uses, so that its plan is new here."""
    return make_inputs(layout, seqlen_q=29, seqlen_k=71, head_dim=24, dtype=torch.float32, seed=seed, least_k=least_k)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_replayed_call_equals_a_checked_one(layout: str, plans_made, monkeypatch) -> None:
    options = {"causal": True, "softcap": 7.0 + LAYOUTS.index(layout)}
    case = odd_case(layout, seed=0)
    call(case, **options)
    assert plans_made == [True]
    other = {name: x.clone() for name, x in case.items()}
    other |= {name: torch.randn_like(case[name]) for name in ("q", "k", "v")}
    replayed = call(other, **options)
    assert plans_made == [True]
    for plans in replay._plans:
        plans.clear()
    checked = call(other, **options)
    assert all(bitwise_equal(a, b) for a, b in zip(replayed, checked, strict=True))


def test_append_and_rotary_are_replayed(plans_made) -> None:
    case = with_append(odd_case("cache", seed=1, least_k=5) | {"causal": True}, 5, rotary_dim=8)
    copies = [{name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in case.items()} for _ in range(2)]
    first, second = (call(copy, softcap=11.0) for copy in copies)
    assert plans_made == [True]
    assert all(bitwise_equal(a, b) for a, b in zip(first, second, strict=True))
    assert bitwise_equal(copies[0]["k"], copies[1]["k"]) and not bitwise_equal(copies[0]["k"], case["k"])


def test_gradients_are_replayed(plans_made) -> None:
    q, k, v = (torch.randn(2, 27, 3, 24, requires_grad=True) for _ in range(3))
    grads = []
    for _ in range(2):
        out = flash_attn3.flash_attn_func(q, k, v, causal=True, softcap=9.0)
        grads.append(torch.autograd.grad(out.sum(), (q, k, v)))
    assert plans_made == [True]
    assert all(bitwise_equal(a, b) for a, b in zip(*grads, strict=True))
    with torch.no_grad():
        assert not flash_attn3.flash_attn_func(q, k, v, causal=True, softcap=9.0).requires_grad
    assert plans_made == [True, True]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda a: a | {"k": a["k"][:, :, :1].expand(-1, -1, 3, -1)[:, :, :3].double()}, FlashAttn3TypeError),
        (lambda a: a | {"k": a["k"][:, :, :2]}, FlashAttn3ValueError),
        (lambda a: a | {"v": a["v"][:, :-1]}, FlashAttn3ValueError),
        (lambda a: a | {"window_size": (3, -2)}, FlashAttn3ValueError),
        (lambda a: a | {"causal": 2}, FlashAttn3ValueError),
        (lambda a: a | {"q": a["q"].to("meta")}, FlashAttn3ValueError),
        (lambda a: a | {"out": a["q"]}, FlashAttn3ValueError),
        (lambda a: a | {"backend": "hopper"}, UnsupportedError),
    ],
    ids=["dtype", "heads", "length", "window", "flag", "device", "memory", "backend"],
)
def test_a_plan_serves_no_other_call(change, error: type[Exception]) -> None:
    arguments = dict(zip("qkv", torch.randn(3, 2, 13, 3, 16), strict=True)) | {"window_size": (3, 2), "causal": False}
    flash_attn3.flash_attn_func(**arguments)
    flash_attn3.flash_attn_func(**arguments)
    with pytest.raises(error):
        flash_attn3.flash_attn_func(**change(arguments))


def test_memory_of_out_is_checked_each_time() -> None:
    q, k, v = torch.randn(3, 2, 13, 3, 16)
    for _ in range(2):
        flash_attn3.flash_attn_func(q, k, v, out=torch.empty_like(q))
    with pytest.raises(FlashAttn3ValueError, match="out = "):
        flash_attn3.flash_attn_func(q, k, v, out=k)


def test_one_tensor_in_two_places() -> None:
    x, y = torch.randn(2, 1, 11, 2, 16)
    expected = flash_attn3.flash_attn_func(x, y.clone(), y.clone())
    for arguments in ((x, x, x), (x, y, y), (y, y, x), (x, y, y.clone())):
        last = flash_attn3.flash_attn_func(*arguments)
    assert bitwise_equal(last, expected)
    assert bitwise_equal(flash_attn3.flash_attn_func(x, y, y), expected)


def test_plans_keep_no_tensor_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_PLANS", 4)
    alive = []
    for length in range(1, 12):
        q = torch.randn(1, length, 1, 8)
        alive.append(weakref.ref(flash_attn3.flash_attn_func(q, q, q)))
        alive.append(weakref.ref(q))
        del q
    gc.collect()
    assert not [ref for ref in alive if ref() is not None]


def test_bounds_may_grow_without_new_checks(plans_made) -> None:
    case = odd_case("varlen", seed=3)
    results = [call(case, max_seqlen_q=29, max_seqlen_k=bound, softcap=3.5) for bound in (71, 72, 4096)]
    assert plans_made == [True]
    assert all(bitwise_equal(result[0], results[0][0]) for result in results)
    with pytest.raises(FlashAttn3ValueError, match="max_seqlen_k = -1"):
        call(case, max_seqlen_q=29, max_seqlen_k=-1, softcap=3.5)


@pytest.mark.parametrize("threads", [8])
def test_threads(threads: int) -> None:
    cases = [make_inputs("dense", seqlen_q=19 + i, seqlen_k=41, dtype=torch.float32, seed=i) for i in range(4)]
    expected = [call(case, causal=True) for case in cases]
    wrong: list[int] = []

    def work(index: int) -> None:
        for turn in range(20):
            i = (index + turn) % len(cases)
            if not bitwise_equal(call(cases[i], causal=True)[0], expected[i][0]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_negated_views_and_dual_tensors_are_not_mistaken() -> None:
    q, k, v = torch.randn(3, 1, 9, 2, 16)
    flash_attn3.flash_attn_func(q, k, v)
    negated = torch.complex(torch.zeros_like(q), q).conj().imag
    assert negated.is_neg()
    assert bitwise_equal(flash_attn3.flash_attn_func(negated, k, v), flash_attn3.flash_attn_func(-q, k, v))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(k, torch.ones_like(k))
        with pytest.raises(UnsupportedError, match="flash_attn_func: k = a dual tensor; expected no tangent"):
            flash_attn3.flash_attn_func(q, dual, v)


def test_modes_see_the_op() -> None:
    q = torch.randn(1, 9, 2, 16)
    flash_attn3.flash_attn_func(q, q, q)
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    with Mode():
        flash_attn3.flash_attn_func(q, q, q)
    assert "flash_attn3.fwd.default" in seen


def test_host_time_of_a_replayed_call_has_no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 9, 2, 16)
    flash_attn3.flash_attn_func(q, q, q, softcap=1.25)
    monkeypatch.setattr(checks.Checks, "__init__", None)
    flash_attn3.flash_attn_func(q, q, q, softcap=1.25)


def test_a_key_holds_all_that_checks_look_at() -> None:
    def keys(*args, state=(True,), **kwargs) -> bytes | None:
        return of(args, kwargs, state)

    of = replay._call_key(("q", "k", "v", "causal", "max_seqlen_q"))
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    different = [
        keys(x, y),
        keys(x, x),
        keys(x, y, state=(False,)),
        keys(x, k=y),
        keys(x, v=y),
        keys(x, y, x),
        keys(x, y, y),
        keys(x.half(), y),
        keys(x.bfloat16(), y),
        keys(x.transpose(0, 1), y),
        keys(x.transpose(0, 1).contiguous(), y),
        keys(x.clone().requires_grad_(), y),
        keys(x.to("meta"), y),
        keys(x[0], y),
        keys(x[:1, :1, :1].expand(2, 3, 4), y),
        keys(x.to_sparse(), y),  # has strides of 0 too
        *(keys(x, value) for value in (None, 1, True, 0, False, 0.0, 1.0, "1", "", (), (1,), (True,), (1, 1), (None,))),
        keys(x, 2**62),
        keys(x, -1),
    ]
    assert None not in different
    assert len(set(different)) == len(different)
    assert keys(x, y) == keys(y, x) == keys(x.clone(), torch.nn.Parameter(y, requires_grad=False))
    assert keys(x, y, x) == keys(y, x, y)
    bounds = [keys(x, max_seqlen_q=bound) for bound in (0, 1, 2**31 - 1)]
    assert len(set(bounds)) == 1
    assert keys(x, max_seqlen_q=-1) == keys(x, max_seqlen_q=2**31) != bounds[0]
    assert keys(x, y, x, True, 5) == keys(x, y, x, True, 6) != keys(x, y, x, True, True)


def test_what_a_key_cannot_hold_is_checked_each_time() -> None:
    of = replay._call_key(("q", "k"))
    x = torch.randn(3, 4)

    class Subclass(torch.Tensor):
        pass

    nested = torch.nested.nested_tensor([x, x])
    for value in (2**63, [1], ((1,),), (x,), x.as_subclass(Subclass), x.to_sparse_csr(), nested, object(), 1j, {}):
        assert of((x, value), {}, ()) is None
    assert of((x, x, x), {}, ()) is None
    assert of((x,), {"k": x}, ()) is not None
