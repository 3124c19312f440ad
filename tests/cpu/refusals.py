# SPDX-License-Identifier: BSD-3-Clause
"""Calls as data: tensors by shape, made real, meta or fake, so that one row tests the verdict on all three."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import flash_attn3
from flash_attn3 import FlashAttn3TypeError, FlashAttn3ValueError, flash_attn_interface

KINDS = ("cpu", "meta", "fake")
MESSAGE = r"(?P<fn>\w+): (?P<argument>[\w./ ]+) = (?P<value>.+?); expected (?P<accepted>.+)"


@dataclass(frozen=True)
class T:
    """A tensor to be made: 16-bit and contiguous unless said."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    view: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
    grad: bool = False
    device: str | None = None

    def make(self, device: str) -> torch.Tensor:
        x = torch.ones(self.shape, device=self.device or device).to(self.dtype)
        return self.view(x).requires_grad_(self.grad)

    def but(self, **changes: Any) -> T:
        return replace(self, **changes)


def t(*shape: int, **options: Any) -> T:
    return T(shape, **options)


def i32(*shape: int, **options: Any) -> T:
    return T(shape, torch.int32, **options)


def f32(*shape: int, **options: Any) -> T:
    return T(shape, torch.float32, **options)


def fp8(*shape: int, **options: Any) -> T:
    return T(shape, torch.float8_e4m3fn, **options)


dense = dict(q=t(2, 5, 4, 16), k=t(2, 7, 2, 16), v=t(2, 7, 2, 16))
packed = dict(q=t(9, 4, 16), k=t(11, 2, 16), v=t(11, 2, 16), cu_seqlens_q=i32(3), cu_seqlens_k=i32(3))
cache = dict(q=t(2, 3, 4, 16), k_cache=t(2, 8, 2, 16), v_cache=t(2, 8, 2, 16), cache_seqlens=i32(2))
new = dict(k=t(2, 3, 2, 16), v=t(2, 3, 2, 16))
pages = dict(k_cache=t(6, 4, 2, 16), v_cache=t(6, 4, 2, 16), page_table=i32(2, 3))
rotary = dict(rotary_cos=f32(32, 8), rotary_sin=f32(32, 8))

CALLS: dict[str, dict[str, Any]] = {
    "flash_attn_func": dense,
    "flash_attn_varlen_func": dict(packed, max_seqlen_q=5, max_seqlen_k=7),
    "flash_attn_qkvpacked_func": dict(qkv=t(2, 5, 3, 4, 16)),
    "flash_attn_kvpacked_func": dict(q=t(2, 5, 4, 16), kv=t(2, 7, 2, 2, 16)),
    "flash_attn_with_kvcache": cache,
    "flash_attn_combine": dict(out_partial=f32(3, 2, 5, 4, 16), lse_partial=f32(3, 2, 5, 4)),
    "merge_state": dict(out_a=t(2, 5, 4, 16), lse_a=f32(2, 4, 5), out_b=t(2, 5, 4, 16), lse_b=f32(2, 4, 5)),
    "get_scheduler_metadata": dict(
        batch_size=2, max_seqlen_q=1, max_seqlen_k=64, num_heads_q=4, num_heads_kv=2, headdim=64, cache_seqlens=i32(2)
    ),
    "_flash_attn_forward": dense,
    "_flash_attn_backward": dict(
        dense, dout=t(2, 5, 4, 16), out=t(2, 5, 4, 16), softmax_lse=f32(2, 4, 5), dq=t(2, 5, 4, 16), dk=t(2, 7, 2, 16)
    ),
}
ATTENTION = tuple(name for name in CALLS if "attn" in name and "combine" not in name)


def function(name: str) -> Callable:
    return getattr(flash_attn_interface if hasattr(flash_attn_interface, name) else flash_attn3, name)


def parameters(name: str) -> list[str]:
    return list(inspect.signature(function(name)).parameters)


@dataclass(frozen=True)
class Bad:
    """`fn` with these arguments instead of its usual ones must be refused, naming argument, value and what is right."""

    argument: str
    value: str
    accepted: str
    changes: dict[str, Any]
    error: type[Exception] = FlashAttn3ValueError
    fn: str = ""

    @property
    def id(self) -> str:
        return f"{self.fn}-{self.argument}-{self.value}"


def bad(argument: str, value: str, accepted: str, error: type[Exception] = FlashAttn3ValueError, **changes: Any) -> Bad:
    return Bad(argument, value, accepted, changes, error)


def type_error(argument: str, value: str, accepted: str, **changes: Any) -> Bad:
    return Bad(argument, value, accepted, changes, FlashAttn3TypeError)


def on(fn: str, rows: list[Bad], base: dict[str, Any] | None = None) -> list[Bad]:
    """The rows as calls of `fn`, with `base` beneath their changes."""
    return [replace(row, fn=fn, changes=(base or {}) | row.changes) for row in rows]


def wherever(rows: list[Bad]) -> list[Bad]:
    """The rows as calls of every attention function that has the arguments."""
    return [row for fn in ATTENTION for row in on(fn, rows) if row.changes.keys() <= set(parameters(fn))]


def make(arguments: dict[str, Any], kind: str) -> dict[str, Any]:
    device = "meta" if kind == "meta" else "cpu"
    return {name: x.make(device) if isinstance(x, T) else x for name, x in arguments.items()}


def contents(arguments: dict[str, Any]) -> dict[str, list[int]]:
    """The bytes beneath each real, dense tensor, also those outside of a view."""
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.device.type == "cpu"}
    return {
        name: torch.empty(0, dtype=torch.uint8).set_(x.detach().untyped_storage()).tolist()
        for name, x in tensors.items()
        if x.layout == torch.strided and not x.is_nested
    }


def refusal(row: Bad, kind: str) -> Exception:
    """What the call raises on tensors of that kind; real tensors must come out as they went in."""
    fn = function(row.fn)
    if kind == "fake":
        with FakeTensorMode(), pytest.raises(row.error) as caught:
            fn(**make(CALLS[row.fn] | row.changes, kind))
        return caught.value
    arguments = make(CALLS[row.fn] | row.changes, kind)
    before = contents(arguments)
    with pytest.raises(row.error) as caught:
        fn(**arguments)
    assert before == contents(arguments), "a refused call changed a tensor"
    return caught.value


def check(row: Bad) -> None:
    """The class is exact, the message complete, and the verdict the same for real, meta and fake tensors."""
    errors = [refusal(row, kind) for kind in KINDS]
    assert {type(error) for error in errors} == {row.error}
    for error in errors:
        found = re.fullmatch(MESSAGE, str(error), re.DOTALL)
        assert found, f"not `<fn>: <argument> = <value>; expected <...>`: {error}"
        assert found["fn"] == row.fn and found["argument"] == row.argument, str(error)
        assert row.value in found["value"] and row.accepted in found["accepted"], str(error)
    assert len({re.sub("meta|cpu", "device", str(error)) for error in errors}) == 1, [str(e) for e in errors]
