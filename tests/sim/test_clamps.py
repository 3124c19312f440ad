# SPDX-License-Identifier: BSD-3-Clause
"""Index tensors that hold what they must not: the call is safe, and a later one raises and names the argument."""

from __future__ import annotations

import pytest
import torch
from cases import attend, inputs

from flash_attn3 import FlashAttn3ValueError, check_errors, status
from flash_attn3.hopper import launch
from flash_attn3.testing import call

SHAPE = "bf16_d64_v64"
WRONG = [  # argument, element, value; lengths are 150 and 40 keys of 160, and 100 and 33 queries of 133
    ("cu_seqlens_q", 0, -1),
    ("cu_seqlens_q", 1, 134),
    ("cu_seqlens_q", 2, 99),
    ("cu_seqlens_q", 2, 2**31 - 1),
    ("cu_seqlens_q", 2, -(2**31)),
    ("cu_seqlens_k", 0, -(2**31)),
    ("cu_seqlens_k", 2, 201),
    ("cu_seqlens_k", 1, 201),
    ("seqused_q", 0, 101),
    ("seqused_q", 1, -1),
    ("seqused_k", 1, 51),
    ("seqused_k", 0, -7),
    ("leftpad_k", 0, 151),
    ("leftpad_k", 1, -1),
]


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def packed() -> dict:
    q, k, v = (torch.randn(rows, 2, 64).bfloat16() for rows in (133, 200, 200))
    lengths = {"seqused_q": int32(100, 33), "seqused_k": int32(150, 40)}
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": int32(0, 100, 133), "cu_seqlens_k": int32(0, 150, 200)} | lengths


def cached() -> dict:
    q, (k, v) = torch.randn(2, 3, 2, 64).bfloat16(), torch.randn(2, 2, 160, 2, 64).bfloat16()
    return {"q": q, "k": k, "v": v, "seqused_k": int32(150, 40), "leftpad_k": int32(10, 0)}


def pending() -> int:
    """The bits that are set, which are then cleared."""
    word = status.device_word(torch.device("cpu"))
    bits = int(word)
    word.zero_()
    return bits


@pytest.mark.parametrize(("argument", "element", "value"), WRONG)
def test_the_next_call_names_the_argument(argument: str, element: int, value: int, simulator) -> None:
    simulator.configure("races=0")  # sequences may overlap
    case = packed() if argument in packed() else cached()
    if argument.startswith("cu_seqlens"):  # extents bound lengths, which then would be named too
        del case["seqused_q"], case["seqused_k"]
    case[argument][element] = value
    attend(case)
    with pytest.raises(FlashAttn3ValueError, match=rf"{argument} = out of range; expected .*earlier call on cpu"):
        attend(case)
    attend(packed())
    check_errors()


@pytest.mark.parametrize("case", [packed, cached])
def test_values_at_the_bounds_are_right(case, simulator) -> None:
    arguments = case()
    attend(arguments)
    check_errors()
    if "leftpad_k" in arguments:
        attend(arguments | {"seqused_k": int32(160, 0), "leftpad_k": int32(160, 0)})
    else:
        attend(arguments | {"cu_seqlens_q": int32(0, 0, 133), "seqused_q": int32(0, 133)})
        attend(arguments | {"cu_seqlens_k": int32(7, 7, 7), "seqused_k": int32(0, 0)})
    check_errors()


@pytest.mark.parametrize("seed", range(6))
def test_the_same_arguments_as_on_the_cpu_backend(seed: int, simulator) -> None:
    simulator.configure("races=0")  # sequences may overlap
    torch.manual_seed(seed)
    case = inputs(SHAPE, "padded", batch=40, seqlen_q=20, seqlen_k=30)
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"):
        if torch.rand(()) < 0.5:
            element = int(torch.randint(len(case[name]), ()))
            case[name][element] += int(torch.randint(-60, 61, ()))
    attend(case)
    noted = pending()
    call(case, backend="cpu")
    assert noted == pending()


def test_calls_without_index_tensors_have_no_word(simulator, monkeypatch) -> None:
    words = []
    run = launch.run
    monkeypatch.setattr(
        launch, "run", lambda prepared, tensors, stream: words.append(tensors[-1]) or run(prepared, tensors, stream)
    )
    attend(inputs(SHAPE))
    attend(packed())
    assert words == [None, status.device_word(torch.device("cpu"))]
