# SPDX-License-Identifier: BSD-3-Clause
"""The forward, cache and merge kernels of the Triton backend, compiled for GPUs as the backend would launch them.

The limits are of what the compilers report: shared memory of the architecture, and bytes that a thread keeps in local
memory. The latter are values that loops only read; where a tile of 256 or 512 columns leaves no room for those, more.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compilation import SHARED_MEMORY, TARGETS, Compiled, compiling_for
from triton.backends.compiler import GPUTarget

from flash_attn3 import env, flash_attn_combine, merge_state, runtime
from flash_attn3.problem import AppendProblem
from flash_attn3.testing import call, draft_trees, make_inputs, packed_bits, with_descales

pytestmark = pytest.mark.skipif(env.triton_interpret(), reason="the interpreter does not compile")
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
MATRIX_INSTRUCTION = {
    "sm_80": "mma.sync",
    "sm_86": "mma.sync",
    "sm_90": "wgmma",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}
MAX_SPILLED = {64: 256, 128: 512, 256: 768, 512: 768}  # bytes, by the larger head dim
slow = pytest.mark.slow
FORWARD = [  # query rows fill tiles, or decode
    *((arch, (128, 128), BF16, 100) for arch in TARGETS),
    *(pytest.param(arch, (64, 64), BF16, 100, marks=slow) for arch in ("sm_90", "gfx942")),
    *(pytest.param(arch, (256, 256), BF16, 100, marks=slow) for arch in ("sm_80", "sm_86", "sm_100", "gfx942")),
    *(pytest.param(arch, (128, 128), E4M3, 100, marks=slow) for arch in ("sm_80", "sm_90")),
    *(pytest.param(arch, (128, 128), BF16, 1, marks=slow) for arch in ("sm_90", "gfx942")),
    *(pytest.param(arch, (64, 512), BF16, 1, marks=slow) for arch in ("sm_80", "gfx942")),
]


@pytest.fixture
def compile_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[[], Any]], list[Compiled]]:
    """What the launches of a call compile to for an architecture; its tensors may lie on the CPU."""
    monkeypatch.setattr(runtime, "_missing", lambda name, device_type, device_index: None)
    monkeypatch.setitem(TARGETS, "sm_86", GPUTarget("cuda", 86, 32))  # the smallest shared memory of a GPU with bf16
    monkeypatch.setitem(SHARED_MEMORY, "sm_86", 99 << 10)

    def compile_for(arch: str, fn: Callable[[], Any]) -> list[Compiled]:
        with compiling_for(arch, importlib.import_module("flash_attn3.triton.fwd")) as compiled:
            fn()
        for kernel in compiled:
            assert kernel.shared <= SHARED_MEMORY[arch], f"{kernel.kernel}: {kernel.shared} bytes of shared memory"
        return compiled

    return compile_for


@pytest.mark.parametrize(("arch", "head_dims", "dtype", "seqlen_q"), FORWARD, ids=str)
def test_forward(arch: str, head_dims: tuple[int, int], dtype: torch.dtype, seqlen_q: int, compile_for) -> None:
    d, dv = head_dims
    layout = "dense" if seqlen_q > 1 else "paged"
    sizes = {"seqlen_q": seqlen_q, "seqlen_k": 300, "head_dim": d, "head_dim_v": dv, "page_size": 16}
    case = make_inputs(layout, dtype=dtype, qv=dv > 256, **sizes)
    if dtype == E4M3:
        case = with_descales(case, blocks=True)
    forward, combine = compile_for(arch, lambda: call(case, num_splits=2, backend="triton"))
    assert (forward.kernel, combine.kernel) == ("fwd_kernel", "combine_kernel")
    matrix_instruction = MATRIX_INSTRUCTION[arch] if dv <= 256 else {"gfx942": "v_mfma"}.get(arch, "mma.sync")
    assert matrix_instruction in forward.assembly
    assert forward.spilled <= MAX_SPILLED[max(head_dims)], f"{forward.spilled} bytes spilled"
    assert combine.spilled == 0


@pytest.mark.parametrize("arch", ["sm_80", pytest.param("gfx942", marks=slow)])
def test_draft_trees(arch: str, compile_for) -> None:
    case = make_inputs("paged", seqlen_q=40, seqlen_k=300, head_dim=128)
    case["tree_mask"] = packed_bits(draft_trees(2, 40))
    (forward,) = compile_for(arch, lambda: call(case, backend="triton"))
    assert MATRIX_INSTRUCTION[arch] in forward.assembly
    assert forward.spilled <= MAX_SPILLED[128], f"{forward.spilled} bytes spilled"


@pytest.mark.parametrize(
    ("arch", "head_dim"),
    [("sm_80", 64), *(pytest.param(*case, marks=slow) for case in [("sm_80", 256), ("sm_90", 128), ("gfx942", 128)])],
)
def test_the_number_of_rows_moves_no_bit(arch: str, head_dim: int, compile_for) -> None:
    """Prefill and decode run the same code, or in both a row's scores lie within one warp, which sums them alike."""
    layouts = []
    for seqlen_q in (100, 1):
        case = make_inputs("dense", seqlen_q=seqlen_q, head_dim=head_dim)
        (kernel,) = compile_for(arch, lambda case=case: call(case, backend="triton"))
        layouts.append(
            re.findall(r"mf?ma<{.*?warpsPerCTA = \[(\d+), (\d+)\].*?instrShape = \[([\d, ]+)\]", kernel.layouts)
        )
    assert layouts[0] and len(layouts[0]) == len(layouts[1])
    for (rows, columns, shape), (other_rows, other_columns, other_shape) in zip(*layouts, strict=True):
        assert shape == other_shape and columns == other_columns
        assert columns == "1" or rows == other_rows


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("cache_dtype", [BF16, E4M3], ids=str)
def test_append(arch: str, cache_dtype: torch.dtype, compile_for) -> None:
    k, v, k_new, v_new = (torch.zeros(shape, dtype=BF16) for shape in [(9, 16, 2, 128)] * 2 + [(3, 1, 2, 128)] * 2)
    lengths, table = torch.zeros(3, dtype=torch.int32), torch.zeros(3, 3, dtype=torch.int32)
    angles = torch.zeros(99, 64)
    scales = [torch.ones(3, 2), torch.ones(3, 2)] if cache_dtype == E4M3 else [None, None]
    problem = AppendProblem(
        *(k.to(cache_dtype), v.to(cache_dtype), k_new, v_new, lengths, angles, angles, None, None, table, None),
        *scales,
        q=None,
        cu_seqlens_q=None,
        q_advances=False,
        rotary_interleaved=True,
    )
    backend = runtime.backend("triton")
    (append,) = compile_for(arch, lambda: backend.append_kv(problem, None))
    rotate = backend.rotary_q, (k_new, angles, angles, lengths, None, True, False, torch.empty_like(k_new))
    (rotary,) = compile_for(arch, lambda: rotate[0](*rotate[1]))
    assert append.spilled == rotary.spilled == 0


@pytest.mark.parametrize("arch", TARGETS)
def test_merging(arch: str, compile_for) -> None:
    out, lse = torch.zeros(3, 2, 5, 4, 128), torch.zeros(3, 2, 5, 4)
    (combine,) = compile_for(arch, lambda: flash_attn_combine(out, lse, out_dtype=BF16, backend="triton"))
    states = (out[0].bfloat16(), lse[0].transpose(1, 2).contiguous()) * 2
    (merge,) = compile_for(arch, lambda: merge_state(*states, backend="triton"))
    assert combine.spilled == merge.spilled == 0


def test_lengths_and_masks_compile_nothing_new(compile_for) -> None:
    def calls() -> None:
        for seqlen_q, seqlen_k, options in [
            (65, 99, {}),
            (80, 1, {"causal": True}),
            (67, 320, {"window_size": (9, 9)}),
        ]:
            case = make_inputs("padded", seqlen_q=seqlen_q, seqlen_k=seqlen_k, batch=seqlen_k % 7 + 1) | options
            call(case, backend="triton", max_seqlen_q=seqlen_q, max_seqlen_k=seqlen_k)

    assert len({kernel.assembly for kernel in compile_for("sm_80", calls)}) == 1
