# SPDX-License-Identifier: BSD-3-Clause
"""Random cases, most of them near a boundary, against the oracle. The same ones each time; with
`--hypothesis-profile explore` new ones, and many more."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_attn3 import FlashAttn3ValueError, check_errors, flash_attn_combine, merge_state, reference
from flash_attn3.testing import GradCheck, bitwise_equal, call, make_inputs, sizes, with_append, with_descales

EFFORT = settings.default.max_examples // 100  # 1 in CI
LONGEST = 200
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
HEADS = st.tuples(st.integers(1, 2), st.integers(1, 3)).map(lambda pair: (pair[0] * pair[1], pair[0]))
EQUAL_HEAD_DIMS = st.sampled_from([(d, d) for d in (16, 48, 64, 80, 96, 128, 192, 208, 256)])
HEAD_DIMS = EQUAL_HEAD_DIMS | st.sampled_from([(192, 128), (144, 112), (64, 256), (16, 96), (64, 16)])
SIDES = st.just(-1) | sizes(LONGEST)
SOMETIMES = st.integers(0, 3).map(lambda number: number == 0)


@st.composite
def cases(draw: st.DrawFn, *layouts: str, least_k: int = 0, **fixed: Any) -> dict[str, Any]:
    """Arguments of `made`; small enough to be read in a report."""
    (num_heads, num_heads_kv), (head_dim, head_dim_v) = draw(HEADS), draw(HEAD_DIMS)
    inputs = dict(
        layout=draw(st.sampled_from(layouts)),
        batch=draw(st.integers(1, 3)),
        seqlen_q=draw(sizes(LONGEST)),
        seqlen_k=draw(sizes(LONGEST, least=least_k)),
        least_k=least_k,
        num_heads=num_heads,
        num_heads_kv=num_heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=draw(DTYPES),
        sink=draw(st.booleans()),
        strided=draw(st.booleans()),
        page_size=draw(st.sampled_from([1, 3, 16, 64, 128])),
        seed=draw(st.integers(0, 1000)),
    )
    options: dict[str, Any] = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["window_size"] = (draw(SIDES), draw(SIDES))
    if draw(SOMETIMES):
        options["attention_chunk"] = draw(sizes(LONGEST, least=1))
    if draw(SOMETIMES):
        options["softcap"] = draw(st.sampled_from([0.5, 5.0, 50.0]))
    if draw(SOMETIMES):
        options["softmax_scale"] = draw(st.sampled_from([0.0, 0.02, 0.5]))
    return {"inputs": inputs | fixed, "options": options}


def made(case: dict[str, Any]) -> dict[str, Any]:
    return make_inputs(**case["inputs"]) | case["options"]


def one_sequence(seqlen_q: int, head_dim: int, head_dim_v: int, dtype: torch.dtype) -> dict[str, Any]:
    """Of one head and one key."""
    inputs = dict(batch=1, seqlen_q=seqlen_q, seqlen_k=1, num_heads=1, num_heads_kv=1)
    return make_inputs(**inputs, head_dim=head_dim, head_dim_v=head_dim_v, dtype=dtype)


def test_one_key_leaves_no_sign_in_rows_that_see_nothing(backend: str) -> None:
    """0 * -v = -0, and with a single key nothing is added to it."""
    case = one_sequence(31, 16, 16, torch.float16) | {"causal": True}
    GradCheck(case).check_forward(*call(case, backend=backend))


@pytest.mark.xfail(
    reason="P = 1: eager torch subtracts dout . v from itself, dout . v - dout . out leaves an ulp of it"
)
def test_gradients_of_one_key_are_within_the_bound_of_eager_torch(backend: str) -> None:
    """Found by `explore`, as are its like with the window (0, 0): the bound is no bound where eager has no error."""
    GradCheck(one_sequence(1, 192, 128, torch.float32)).check(lambda case: call(case, backend=backend))


@settings(max_examples=40 * EFFORT)
@given(case=cases("dense", "varlen", "padded"))
def test_forward_and_backward(case: dict[str, Any], backend: str) -> None:
    GradCheck(made(case)).check(lambda case: call(case, backend=backend))


@settings(max_examples=40 * EFFORT)
@given(case=cases("cache", "paged"), num_splits=st.integers(0, 5))
def test_cache(case: dict[str, Any], num_splits: int, backend: str) -> None:
    inputs = made(case)
    results = call(inputs, backend=backend, num_splits=num_splits, return_max_logits=True)
    GradCheck(inputs).check_forward(*results)


@settings(max_examples=30 * EFFORT)
@given(
    case=cases("cache", "paged", least_k=9),
    seqlen_new=st.integers(1, 9),
    ragged=st.booleans(),
    rotary_dim=st.sampled_from([0, 16, 48, 64]),
    interleaved=st.booleans(),
)
def test_append(
    case: dict[str, Any], seqlen_new: int, ragged: bool, rotary_dim: int, interleaved: bool, backend: str
) -> None:
    inputs = made(case)
    rotary_dim = min(rotary_dim, inputs["q"].shape[-1])
    inputs = with_append(inputs, seqlen_new, ragged=ragged, rotary_dim=rotary_dim, interleaved=interleaved)
    check = GradCheck(inputs)
    check.check_forward(*call(inputs, backend=backend))


@settings(max_examples=30 * EFFORT)
@given(
    case=cases("dense", "varlen", "cache", "paged", dtype=torch.float8_e4m3fn),
    q_dtype=st.sampled_from([torch.float8_e4m3fn, torch.bfloat16, torch.float16]),
    scales=st.sampled_from(["none", "heads", "blocks"]),
)
def test_fp8(case: dict[str, Any], q_dtype: torch.dtype, scales: str, backend: str) -> None:
    inputs = made(case)
    inputs["q"] = inputs["q"].to(q_dtype)
    if scales != "none":
        inputs = with_descales(inputs, blocks=scales == "blocks")
    GradCheck(inputs).check_forward(*call(inputs, backend=backend))


@settings(max_examples=40 * EFFORT)
@given(
    num_splits=st.integers(1, 5),
    shape=st.tuples(st.integers(0, 3), sizes(70), st.integers(1, 3), st.sampled_from([8, 64, 200])),
    empty=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_combine(num_splits: int, shape: tuple[int, ...], empty: float, seed: int, backend: str) -> None:
    torch.manual_seed(seed)
    out_partial, lse_partial = torch.randn(num_splits, *shape), 9 * torch.randn(num_splits, *shape[:-1])
    nothing = torch.rand(lse_partial.shape) < empty
    lse_partial[nothing] = -torch.inf
    out_partial[nothing] = torch.nan
    out, lse = flash_attn_combine(out_partial, lse_partial, backend=backend)
    exact, exact_lse = reference.combine(out_partial, lse_partial)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    if num_splits == 2:
        merged = merge_state(out_partial[0], lse_partial[0], out_partial[1], lse_partial[1], lse_layout="sh")
        torch.testing.assert_close(merged[0].double(), exact, rtol=1e-5, atol=1e-5)


@settings(max_examples=20 * EFFORT)
@given(case=cases("paged", dtype=torch.float16), contents=st.integers(-(2**31), 2**31 - 1), seed=st.integers(0, 99))
def test_any_content_of_index_tensors_is_safe(case: dict[str, Any], contents: int, seed: int, backend: str) -> None:
    """Whatever stands in an index tensor of one sequence, the others keep their bits, and the call returns."""
    inputs = made(case)
    clean = call(inputs, backend=backend)
    victim = seed % len(inputs["q"])
    others = [n for n in range(len(inputs["q"])) if n != victim]
    for name in ("seqused_k", "page_table"):
        dirty = inputs[name].clone()
        dirty[victim] = contents
        results = call(inputs | {name: dirty}, backend=backend)
        assert all(bitwise_equal(a[others], b[others]) for a, b in zip(results, clean, strict=True))
        with contextlib.suppress(FlashAttn3ValueError):
            check_errors()
