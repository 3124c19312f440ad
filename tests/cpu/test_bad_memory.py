# SPDX-License-Identifier: BSD-3-Clause
"""What only the tensor itself shows: its device, its kind, and memory that an output shares with an input."""

from __future__ import annotations

import re
from contextlib import nullcontext

import pytest
import torch
from refusals import CALLS, KINDS, dense, f32, function, i32, make, new, pages, rotary, t
from torch._subclasses.fake_tensor import FakeTensorMode

import flash_attn3
from flash_attn3 import FlashAttn3TypeError, FlashAttn3ValueError

SCALES = dict(q_descale=f32(2, 2), k_descale=f32(2, 2), v_descale=f32(2, 2))
E4M3 = {name: x.but(dtype=torch.float8_e4m3fn) for name, x in dense.items()}
FULL_CALLS = [
    ("flash_attn_func", dict(s_aux=f32(4), out=t(2, 5, 4, 16))),
    ("flash_attn_func", dict(q=t(2, 5, 4, 64), k=t(2, 7, 2, 64), v=t(2, 7, 2, 256), qv=t(2, 5, 4, 256))),
    ("flash_attn_func", E4M3 | SCALES),
    ("flash_attn_varlen_func", dict(seqused_q=i32(2), seqused_k=i32(2), scheduler_metadata=i32(9))),
    ("flash_attn_varlen_func", dict(cp_world_size=2, cp_tot_seqused_k=i32(2))),
    ("flash_attn_kvpacked_func", dict(s_aux=f32(4))),
    ("flash_attn_with_kvcache", pages | new | rotary | dict(rotary_seqlens=i32(2), cache_leftpad=i32(2))),
    (
        "flash_attn_with_kvcache",
        dict(cache_batch_idx=i32(2), q=t(6, 4, 16), cu_seqlens_q=i32(3), tree_mask=i32(2, 3, 1)),
    ),
    ("flash_attn_with_kvcache", dict(k=t(6, 2, 16), v=t(6, 2, 16), cu_seqlens_k_new=i32(3))),
    ("flash_attn_combine", dict(out=f32(2, 5, 4, 16))),
    ("merge_state", dict(out=t(2, 5, 4, 16), lse_out=f32(2, 4, 5))),
    ("get_scheduler_metadata", dict(cu_seqlens_q=i32(3), cache_leftpad=i32(2), cu_seqlens_k_new=i32(3))),
    ("_flash_attn_backward", dict(dlse=f32(2, 4, 5), dv=t(2, 7, 2, 16), s_aux=f32(4), dsink=f32(4))),
]


@pytest.mark.parametrize("fn, extra", FULL_CALLS)
def test_one_tensor_on_another_device(fn: str, extra: dict) -> None:
    arguments = CALLS[fn] | extra
    elsewhere = make(arguments, "meta")
    for name in [name for name, x in arguments.items() if hasattr(x, "make")]:
        mixed = make(arguments, "cpu") | {name: elsewhere[name]}
        with pytest.raises(FlashAttn3ValueError, match=rf"{fn}: \w+ = on device \w+; expected device \w+") as caught:
            function(fn)(**mixed)
        assert {"cpu", "meta"} <= set(re.findall(r"\w+", str(caught.value)))


def jagged() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(n, 4, 16, dtype=torch.bfloat16) for n in (2, 5)], layout=torch.jagged)


def quantised() -> torch.Tensor:
    return torch._empty_affine_quantized([2, 5, 4, 16], scale=1.0, zero_point=0, dtype=torch.quint8)


@pytest.mark.parametrize("unusual, kind", [(jagged, "nested"), (quantised, "quantised")])
@pytest.mark.parametrize("name", ["q", "k", "v", "s_aux", "out"])
def test_kind_of_tensor(name: str, unusual, kind: str) -> None:
    with pytest.raises(FlashAttn3TypeError, match=f"flash_attn_func: {name} = a {kind} tensor; expected a dense"):
        flash_attn3.flash_attn_func(**make(dense, "cpu") | {name: unusual()})


def shared(kind: str, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Tensors of one storage, each starting where the one before it has its last element."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    storage = torch.ones(sum(sizes), device="meta" if kind == "meta" else "cpu").to(dtype)
    starts = [sum(sizes[:i]) - i for i in range(len(sizes))]
    return [storage[i : i + n].view(shape) for i, n, shape in zip(starts, sizes, shapes, strict=True)]


HALF, FLOAT = torch.bfloat16, torch.float32
OVERLAPS = [
    ("flash_attn_func", "out", "q", HALF, {}),
    ("flash_attn_func", "out", "k", HALF, {}),
    ("flash_attn_func", "out", "v", HALF, {}),
    ("flash_attn_func", "out", "s_aux", FLOAT, {"s_aux": f32(4)}),
    ("flash_attn_varlen_func", "out", "q", HALF, {}),
    ("flash_attn_with_kvcache", "out", "k_cache", HALF, {}),
    ("flash_attn_with_kvcache", "out", "v", HALF, new),
    ("flash_attn_with_kvcache", "out", "rotary_sin", FLOAT, new | rotary),
    ("flash_attn_combine", "out", "lse_partial", FLOAT, {}),
    ("merge_state", "out", "out_b", HALF, {}),
    ("merge_state", "lse_out", "lse_a", FLOAT, {}),
    ("merge_state", "lse_out", "out", FLOAT, {}),
    ("_flash_attn_backward", "dq", "q", HALF, {}),
    ("_flash_attn_backward", "dv", "dout", HALF, {}),
]
SHAPES = {
    "flash_attn_func": (2, 5, 4, 16),
    "flash_attn_varlen_func": (9, 4, 16),
    "flash_attn_with_kvcache": (2, 3, 4, 16),
    "flash_attn_combine": (2, 5, 4, 16),
    "merge_state": (2, 5, 4, 16),
    "lse_out": (2, 4, 5),
    "dq": (2, 5, 4, 16),
    "dv": (2, 7, 2, 16),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fn, output, name, dtype, extra", OVERLAPS)
def test_output_shares_bytes_with_an_input(fn, output, name, dtype, extra, kind) -> None:
    with FakeTensorMode() if kind == "fake" else nullcontext():
        arguments = make(CALLS[fn] | extra, kind)
        shape = SHAPES.get(output) or SHAPES[fn]
        other = tuple(arguments[name].shape) if name in arguments else SHAPES[fn]
        arguments[output], arguments[name] = shared(kind, dtype, shape, other)
        with pytest.raises(
            FlashAttn3ValueError,
            match=f"{fn}: {output} = a tensor in the memory of {name}; expected memory apart from {name}",
        ):
            function(fn)(**arguments)


def test_two_tensors_on_one_buffer() -> None:
    buffer = bytearray(2 * 5 * 4 * 16 * 4)
    q, out = (torch.frombuffer(buffer, dtype=torch.float32).view(2, 5, 4, 16) for _ in range(2))
    with pytest.raises(FlashAttn3ValueError, match=r"flash_attn_func: out = .* apart from q"):
        flash_attn3.flash_attn_func(q, q.clone(), q.clone(), out=out)


def test_neighbours_in_one_storage_are_apart() -> None:
    packed = torch.randn(4, 2, 5, 4, 16)
    q, k, v, out = packed
    expected = flash_attn3.flash_attn_func(q, k, v)
    assert flash_attn3.flash_attn_func(q, k, v, out=out) is out
    assert torch.equal(out, expected)
