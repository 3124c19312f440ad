# SPDX-License-Identifier: BSD-3-Clause
"""`flash_attn_with_kvcache` on the simulator: append, rotate and attend in one call, against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import test_compile
import torch
from cases import BACKEND, named
from test_compile import fresh_dynamo  # noqa: F401

import flash_attn3
from flash_attn3.hopper import launch
from flash_attn3.testing import GradCheck, bitwise_equal, call, make_inputs, pairwise, with_append

CACHES = ("k", "v", "k_new", "v_new")
AXES = {
    "layout": ["cache", "paged"],
    "page_size": [1, 7, 64],
    "dtype": [torch.bfloat16, torch.float16],
    "new": [1, 5, 140],
    "ragged": [False, True],
    "rotary": [(0, True), (64, True), (64, False), (20, False), (48, True)],
    "heads": [(4, 4), (6, 2), (5, 1)],
    "mask": [{}, {"causal": True}, {"window_size": (70, 0)}, {"window_size": (3, 40)}],
    "num_splits": [1, 0, 3],
    "strided": [False, True],
}


def appending(choice: dict[str, Any]) -> dict[str, Any]:
    (rotary_dim, interleaved), (heads, heads_kv) = choice["rotary"], choice["heads"]
    case = make_inputs(
        choice["layout"],
        batch=3,
        seqlen_q=choice["new"],
        seqlen_k=330,
        num_heads=heads,
        num_heads_kv=heads_kv,
        dtype=choice["dtype"],
        least_k=choice["new"],
        strided=choice["strided"],
        page_size=choice["page_size"],
    )
    rotary = dict(rotary_dim=rotary_dim, interleaved=interleaved)
    return with_append(case, choice["new"], ragged=choice["ragged"], **rotary) | choice["mask"]


@pytest.mark.parametrize("choice", pairwise(AXES), ids=named)
def test_append_and_attend(choice: dict[str, Any], simulator, launched: list[str]) -> None:
    case = appending(choice)
    oracle = GradCheck(case)
    plain = {name: case[name].clone() for name in CACHES}
    oracle.check_forward(*call(case, backend=BACKEND, num_splits=choice["num_splits"]))
    assert [name.split("_")[0] for name in launched[:2]] == ["append", "fwd"]  # queries are rotated by the first
    call(case | plain, backend="cpu")  # which writes the same slots
    assert bitwise_equal(case["k"], plain["k"]) and bitwise_equal(case["v"], plain["v"])


def test_a_cache_at_any_address_is_written_in_place(simulator) -> None:
    """Attention reads a copy of it, and says so."""
    choice = {name: values[0] for name, values in AXES.items()} | {"new": 5, "rotary": (64, False)}
    case = appending(choice)
    check = GradCheck(case)
    for name in "kv":
        memory = torch.cat([case[name].new_zeros(1), case[name].flatten()])
        case[name] = memory[1:].view(case[name].shape)
    plain = {name: case[name].clone() for name in CACHES}
    launch._warn_copied.cache_clear()
    with pytest.warns(UserWarning, match="copies k_cache in every call"):
        check.check_forward(*call(case, backend=BACKEND))
    call(case | plain, backend="cpu")
    assert bitwise_equal(case["k"], plain["k"]) and bitwise_equal(case["v"], plain["v"])


def test_what_is_out_of_range_is_named_by_the_next_call(simulator) -> None:
    """Append and attention see the same lengths: nothing of other sequences moves."""
    choice = {name: values[0] for name, values in AXES.items()} | {"new": 5}
    case = appending(choice)
    plain = {name: case[name].clone() for name in CACHES}
    out, lse = call(case, backend=BACKEND)
    full = case | plain | {"seqused_k": case["seqused_k"].clone()}
    full["seqused_k"][1] = case["k"].shape[1] - 2
    broken, broken_lse = call(full, backend=BACKEND)
    with pytest.raises(flash_attn3.FlashAttn3ValueError, match="seqused_k = out of range"):
        call(case, backend=BACKEND)
    others = [0, 2]
    assert bitwise_equal(broken[others], out[others]) and bitwise_equal(broken_lse[others], lse[others])


COMPILED = {
    "paged": lambda: test_compile.test_paged_ragged_decode(torch.bfloat16),
    "decode": lambda: test_compile.test_decode_over_positions("tensor", torch.bfloat16),
    "prefill": lambda: test_compile.test_prefill_and_batches(torch.bfloat16),
}


@pytest.mark.unpoisoned  # Dynamo would trace into the patched torch.empty
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("step", COMPILED)
def test_compiled_steps(step: str, simulator, by_default, launched: list[str]) -> None:
    """One compilation for all positions, lengths and batches, the bits of eager, the cache written in place."""
    COMPILED[step]()
    assert {name.split("_")[0] for name in launched} - {"metadata"} == {"append", "fwd"}
