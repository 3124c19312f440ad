# SPDX-License-Identifier: BSD-3-Clause
"""The backward kernels of the Triton backend, compiled for GPUs as the backend would launch them.

The limits are of what the compilers report: shared memory of the architecture, and bytes that a thread keeps in local
memory. The launch that repairs what a NaN spoiled is not held to the latter, for its programs almost always end at
once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from compilation import SHARED_MEMORY, TARGETS, Compiled, compiling_for

from flash_attn3 import env, runtime
from flash_attn3.flash_attn_interface import _flash_attn_backward
from flash_attn3.testing import make_inputs
from flash_attn3.triton.config import block_dim

pytestmark = pytest.mark.skipif(env.triton_interpret(), reason="the interpreter does not compile")
MATRIX_INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
MAX_SPILLED = {64: 128, 128: 256, 256: 640, 512: 640}  # bytes, by the width of a tile
slow = pytest.mark.slow
CASES = [
    *((arch, (128, 128), {}) for arch in TARGETS),
    *(pytest.param(arch, (64, 64), {"softcap": 20.0}, marks=slow) for arch in TARGETS),
    *(pytest.param(arch, (256, 256), {}, marks=slow) for arch in TARGETS),
    *(pytest.param(arch, (192, 128), {"softcap": 20.0}, marks=slow) for arch in ("sm_80", "sm_90")),
    *(pytest.param(arch, (64, 512), {}, marks=slow) for arch in TARGETS),
]


@pytest.fixture
def compile_backward(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Compiled]]:
    """What the launches of one backward compile to for an architecture; its tensors lie on the CPU."""
    monkeypatch.setattr(runtime, "_missing", lambda name, device_type, device_index: None)

    def compile_backward(arch: str, layout: str = "dense", wanted: str = "qkv", **options) -> list[Compiled]:
        scores = {name: options.pop(name) for name in ("softcap", "is_causal", "window_size") if name in options}
        case = make_inputs(layout, **options)
        out = torch.zeros(*case["q"].shape[:-1], case["v"].shape[-1], dtype=case["q"].dtype)
        lse = torch.zeros(out.shape[:-1]).mT.contiguous()
        case |= {f"d{name}": torch.empty_like(case[name]) for name in wanted}
        with compiling_for(arch, importlib.import_module("flash_attn3.triton.bwd")) as compiled:
            _flash_attn_backward(torch.zeros_like(out), out=out, softmax_lse=lse, **case, **scores, backend="triton")
        return compiled

    return compile_backward


@pytest.mark.parametrize(("arch", "head_dims", "scores"), CASES, ids=str)
def test_limits(arch: str, head_dims: tuple[int, int], scores: dict[str, float], compile_backward) -> None:
    sizes = {"batch": 1, "seqlen_q": 64, "seqlen_k": 64, "head_dim": head_dims[0], "head_dim_v": head_dims[1]}
    compiled = compile_backward(arch, **sizes, **scores)
    width = block_dim(max(head_dims))
    # Tiles of 512 columns have too few rows for the instructions of newer GPUs.
    instruction = MATRIX_INSTRUCTION["sm_80" if width > 256 and arch.startswith("sm_") else arch]
    assert {kernel.kernel for kernel in compiled} == {"preprocess_kernel", "dkdv_kernel", "dq_kernel"}
    for kernel in compiled:
        assert kernel.shared <= SHARED_MEMORY[arch], f"{kernel.kernel}: {kernel.shared} bytes of shared memory"
        if kernel.options.get("CAREFUL") is False:
            assert instruction in kernel.assembly
            spilled = f"{kernel.kernel} {kernel.options}: {kernel.spilled} bytes spilled"
            assert kernel.spilled <= MAX_SPILLED[width], spilled


def test_only_what_is_wanted(compile_backward) -> None:
    """A gradient that is not wanted leaves its products out of the kernel: dV alone takes 2 of the 4."""

    def products(wanted: str) -> dict[str, int]:
        compiled = compile_backward("sm_80", wanted=wanted, batch=1, head_dim=64)
        return {kernel.kernel: kernel.assembly.count("mma.sync") for kernel in compiled}

    assert products("v")["dkdv_kernel"] * 2 == products("kv")["dkdv_kernel"]
    assert products("q").keys() == {"preprocess_kernel", "dq_kernel"}


def test_lengths_and_masks_compile_nothing_new(compile_backward) -> None:
    compiled = []
    for seqlen_q, seqlen_k, options in [
        (65, 99, {}),
        (80, 1, {"is_causal": True}),
        (67, 320, {"window_size": (9, 9)}),
    ]:
        batch = seqlen_k % 7 + 1
        compiled += compile_backward("sm_80", "padded", batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, **options)
    assert len({kernel.assembly for kernel in compiled}) == 5  # two of them twice, with and without care
