# SPDX-License-Identifier: BSD-3-Clause
"""The levels of FLASH_ATTN3_CHECK."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
from refusals import MESSAGE

import flash_attn3
from flash_attn3 import FlashAttn3ValueError, debug, env, runtime
from flash_attn3.testing import bitwise_equal, call, make_inputs, with_append, with_descales


@pytest.fixture(params=[1, 2, 3])
def level(request, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(env, "check_level", request.param)
    return request.param


def int32(*elements: int) -> torch.Tensor:
    return torch.tensor(elements, dtype=torch.int32)


@pytest.mark.parametrize("layout", ["dense", "varlen", "padded", "cache", "paged"])
def test_right_calls_pass_and_keep_their_bits(layout: str, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_inputs(layout, dtype=torch.float32, sink=True)
    case |= {"causal": True} | {name: case[name].nan_to_num() for name in ("q", "k", "v")}
    checked = call(case)
    monkeypatch.setattr(env, "check_level", 0)
    assert all(bitwise_equal(a, b) for a, b in zip(checked, call(case), strict=True))


def test_right_append_with_scales_passes(level: int) -> None:
    case = make_inputs("cache", dtype=torch.float8_e4m3fn, least_k=4)
    case = with_append(with_descales(case | {"q": case["q"].to(torch.bfloat16)}, blocks=True), 4)
    finite = {name: case[name].float().nan_to_num().to(case[name].dtype) for name in ("q", "k", "v")}
    call(case | finite)


PAGED = {"cache_seqlens": int32(20, 5), "page_table": int32(3, 0, 7, 1, -1, 7).view(2, 3)}
WRONG = {
    "offsets fall": (dict(cu_seqlens_q=int32(0, 6, 4)), r"cu_seqlens_q\[2\]", "4", r"a value in \[6, 9\]"),
    "offsets start late": (dict(cu_seqlens_q=int32(1, 6, 9)), r"cu_seqlens_q\[0\]", "1", "0"),
    "offsets end late": (dict(cu_seqlens_k=int32(0, 6, 12)), r"cu_seqlens_k\[2\]", "12", r"a value in \[6, 11\]"),
    "used beyond extent": (dict(seqused_k=int32(6, 6)), r"seqused_k\[1\]", "6", r"a value in \[0, 5\]"),
    "used below zero": (dict(seqused_q=int32(-1, 3)), r"seqused_q\[0\]", "-1", r"a value in \[0, 4\]"),
    "bound too low": (dict(max_seqlen_q=4), "max_seqlen_q", "4", "at least 5"),
}
WRONG_CACHE = {
    "length": (dict(cache_seqlens=int32(3, 65)), r"cache_seqlens\[1\]", "65", r"a value in \[0, 64\]"),
    "row": (dict(cache_batch_idx=int32(0, 4)), r"cache_batch_idx\[1\]", "4", r"a value in \[0, 3\]"),
    "padding": (dict(cache_leftpad=int32(-2, 0)), r"cache_leftpad\[0\]", "-2", r"a value in \[0, 64\]"),
    "page": (PAGED | dict(cache_seqlens=int32(130, 5)), r"page_table\[0, 2\]", "7", r"a value in \[0, 3\]"),
}


def refused(fn, arguments: dict, argument: str, value: str, accepted: str) -> None:
    with pytest.raises(
        FlashAttn3ValueError, match=rf"{fn.__name__}: {argument} = {value}; expected {accepted}"
    ) as info:
        fn(**arguments)
    assert info.match(MESSAGE.replace(r"[\w./ ]+", r"[\w./ ,\[\]]+"))


@pytest.mark.parametrize("name", WRONG)
def test_wrong_indices_of_a_ragged_batch(name: str, level: int) -> None:
    change, *expected = WRONG[name]
    right = dict(q=torch.randn(9, 4, 16), k=torch.randn(11, 2, 16), v=torch.randn(11, 2, 16))
    right |= dict(cu_seqlens_q=int32(0, 4, 9), cu_seqlens_k=int32(0, 6, 11), max_seqlen_q=5, max_seqlen_k=6)
    flash_attn3.flash_attn_varlen_func(**right)
    refused(flash_attn3.flash_attn_varlen_func, right | change, *expected)


@pytest.mark.parametrize("name", WRONG_CACHE)
def test_wrong_indices_of_a_cache(name: str, level: int) -> None:
    change, *expected = WRONG_CACHE[name]
    right = dict(q=torch.randn(2, 3, 4, 16), k_cache=torch.randn(4, 64, 2, 16), v_cache=torch.randn(4, 64, 2, 16))
    right |= PAGED if "page_table" in change else dict(cache_seqlens=int32(3, 64), cache_batch_idx=int32(3, 1))
    flash_attn3.flash_attn_with_kvcache(**right)
    refused(flash_attn3.flash_attn_with_kvcache, right | change, *expected)


@pytest.mark.parametrize("value", [-1.0, torch.inf, torch.nan])
def test_wrong_scales(value: float, level: int) -> None:
    x = torch.randn(1, 8, 2, 16).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, value]])
    with pytest.raises(FlashAttn3ValueError, match="flash_attn_func: v_descale = a negative or non-finite element"):
        flash_attn3.flash_attn_func(x, x, x, v_descale=scale)


def test_level_2_reports_what_is_not_finite_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "check_level", 2)
    debug._warn_nonfinite.cache_clear()
    warnings.simplefilter("always")
    q, k, v = torch.randn(3, 1, 8, 2, 16)
    k[0, 3, 1, 5] = torch.inf
    with pytest.warns(UserWarning, match="flash_attn_func: k holds NaN or inf") as caught:
        flash_attn3.flash_attn_func(q, k, v)
    assert [str(w.message).split()[1] for w in caught] == ["k", "out"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flash_attn3.flash_attn_func(q, k, v)


def write_beyond(out: torch.Tensor) -> None:
    memory = out.new_empty(0, dtype=torch.uint8).set_(out.untyped_storage())
    memory[-1] = 0


def shift(out: torch.Tensor) -> None:
    out += 1.0


@pytest.mark.parametrize(
    ("fault", "least_level", "message"),
    [(write_beyond, 2, "out = written out of bounds"), (shift, 3, "out = .* away from fp64 in a sampled row")],
)
def test_faults_are_found(fault, least_level: int, message: str, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = runtime.backend("cpu")
    q = torch.randn(1, 64, 2, 16)
    original = cpu.fwd

    def fwd(*arguments) -> None:
        original(*arguments)
        fault(arguments[1])

    monkeypatch.setattr(cpu, "fwd", fwd)
    if level < least_level:
        flash_attn3.flash_attn_func(q, q, q)
    else:
        with pytest.raises(FlashAttn3ValueError, match=f"flash_attn_func: {message}"):
            flash_attn3.flash_attn_func(q, q, q)


def test_outputs_start_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "check_level", 2)
    monkeypatch.setattr(runtime.backend("cpu"), "fwd", lambda *_: None)
    out, lse = flash_attn3.flash_attn_func(*torch.randn(3, 1, 8, 2, 16), return_softmax_lse=True)
    assert out.isnan().all() and lse.isnan().all()


def test_levels_act_as_none_while_tracing(level: int) -> None:
    q = torch.randn(1, 8, 2, 16)
    compiled = torch.compile(flash_attn3.flash_attn_func, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, q, q), flash_attn3.flash_attn_func(q, q, q))


def test_another_level_is_refused_at_import() -> None:
    environment = os.environ | {"FLASH_ATTN3_CHECK": "4"}
    done = subprocess.run([sys.executable, "-c", "import flash_attn3"], env=environment, capture_output=True, text=True)
    assert (
        done.returncode
        and "environment variable FLASH_ATTN3_CHECK = '4'; expected one of '0', '1', '2', '3'" in done.stderr
    )
