# SPDX-License-Identifier: BSD-3-Clause
"""Checks of single arguments. Each raises with the function, the argument, its value and what is accepted."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .errors import FlashAttn3Error, FlashAttn3TypeError, FlashAttn3ValueError, UnsupportedError, message

INT32_MAX = 2**31 - 1
MAX_FLOAT32 = torch.finfo(torch.float32).max
HALF_DTYPES = (torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn
SINK_DTYPES = (torch.float32, *HALF_DTYPES)


def named(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def received(value: Any) -> str:
    """A value as messages show it; the contents of a tensor are never read."""
    return f"a {value.dtype} tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def as_index(value: Any) -> int | None:
    """`operator.index`, or None for what is no integer: bool, tensors and arrays among others.

    A size that is symbolic, while tracing, stays so: its index would be a guard on its value.
    """
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if isinstance(value, (bool, Tensor)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


class Checks:
    """The checks of one public function; `names` translates internal names into that function's own."""

    def __init__(self, fn: str, names: dict[str, str] | None = None):
        self.fn = fn
        self.names = names or {}

    def name(self, argument: str) -> str:
        return self.names.get(argument, argument)

    def fail(
        self,
        argument: str,
        value: Any,
        expected: str,
        hint: str = "",
        error: type[FlashAttn3Error] = FlashAttn3ValueError,
    ) -> NoReturn:
        raise error(message(self.fn, self.name(argument), value, expected, hint))

    def fail_type(self, argument: str, value: Any, expected: str, hint: str = "") -> NoReturn:
        self.fail(argument, value, expected, hint, FlashAttn3TypeError)

    def unsupported(self, argument: str, value: Any, expected: str, hint: str = "") -> NoReturn:
        self.fail(argument, value, expected, hint, UnsupportedError)

    # Scalars

    def flag(self, argument: str, value: Any) -> bool:
        """bool, numpy bool, or 0 / 1."""
        if value is True or value is False:
            return value
        number = int(value) if type(value).__name__ in ("bool", "bool_") else as_index(value)
        if number is None:
            self.fail_type(argument, received(value), "a bool")
        if number not in (0, 1):
            self.fail(argument, number, "a bool, 0 or 1")
        return bool(number)

    def any_flag(self, **flags: Any) -> bool:
        """Whether one is set; all are checked."""
        return True in [self.flag(argument, value) for argument, value in flags.items()]

    def integer(self, argument: str, value: Any, low: int, high: int | None = INT32_MAX) -> int:
        """An integer, also of numpy, in [low, high]."""
        expected = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
        number = as_index(value)
        if number is None:
            self.fail_type(argument, received(value), expected)
        if number < low or (high is not None and number > high):
            self.fail(argument, number, expected)
        return number

    def real(self, argument: str, value: Any, hint: str = "") -> float:
        """A real number that is finite and >= 0 as float32."""
        expected = "a finite number >= 0 (as float32)"
        if isinstance(value, (Tensor, bool)) or not isinstance(value, numbers.Real):
            hint = "Reading a tensor would synchronise: pass a Python float" if isinstance(value, Tensor) else ""
            self.fail_type(argument, received(value), expected, hint)
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
        if not 0.0 <= value <= MAX_FLOAT32:
            self.fail(argument, value, expected, hint)
        return value

    def window(self, argument: str, value: Any) -> tuple[int, int]:
        """(left, right), each >= 0 or -1 for unbounded; None is unbounded."""
        if value is None:
            return (-1, -1)
        expected = "a pair (left, right) of integers >= -1"
        if not isinstance(value, (tuple, list)):
            self.fail_type(argument, received(value), expected)
        if len(value) != 2:
            self.fail(argument, repr(value), expected)
        left, right = value
        return self.window_side(argument, left), self.window_side(argument, right)

    def window_side(self, argument: str, value: Any) -> int:
        """Keys visible to one side; None, -1 and what no sequence reaches are unbounded."""
        side = -1 if value is None else self.integer(argument, value, -1, None)
        return side if side <= INT32_MAX else -1

    def bound(self, argument: str, value: Any, default: int) -> int:
        """A max_seqlen: an integer, a 0-dim integer tensor (read only when that is free), or None."""
        if value is None:
            return default
        if isinstance(value, Tensor):
            if value.ndim != 0 or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
                self.fail_type(argument, received(value), "an int or a 0-dim integer tensor")
            if value.device.type != "cpu" or type(value) is not Tensor or torch.compiler.is_compiling():
                return default  # device, fake and traced tensors
            value = int(value)
        return self.integer(argument, value, 0)

    # Tensors

    def tensor(
        self, argument: str, value: Any, dtypes: tuple[torch.dtype, ...] | None = None, hint: str = ""
    ) -> Tensor:
        """A dense tensor of one of `dtypes`."""
        if not isinstance(value, Tensor):
            self.fail_type(argument, type(value).__name__, "a torch.Tensor")
        if value.is_nested or value.layout != torch.strided or value.is_quantized:
            kind = "nested" if value.is_nested else "quantised" if value.is_quantized else str(value.layout)
            self.fail_type(argument, f"a {kind} tensor", "a dense strided tensor")
        if dtypes is not None and value.dtype not in dtypes:
            self.fail_type(argument, str(value.dtype), f"dtype {named(dtypes)}", hint)
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
            self.unsupported(argument, "a dual tensor", "no tangent", "Forward-mode gradients are not implemented")
        return value

    def shape(self, argument: str, value: Tensor, *expected: tuple[str, int | None], like: str = "") -> None:
        """Rank and sizes; a size of None is free."""
        fits = value.ndim == len(expected) and all(
            size is None or size == actual for (_, size), actual in zip(expected, value.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join(letter if size is None else f"{letter}={size}" for letter, size in expected)
            trailing = "," if len(expected) == 1 else ""
            self.fail(
                argument,
                f"shape {tuple(value.shape)}",
                f"shape ({wanted}{trailing})" + (f" to match {like}" if like else ""),
            )

    def device(self, argument: str, value: Tensor, like: Tensor) -> None:
        if value.device != like.device:
            self.fail(argument, f"on device {value.device}", f"device {like.device}, that of the other tensors")

    def index(
        self, argument: str, value: Any, shape: tuple[tuple[str, int | None], ...], like: Tensor
    ) -> Tensor | None:
        """An int32 tensor on the device of `like`; copied when it is not contiguous."""
        if value is None:
            return None
        self.tensor(argument, value, (torch.int32,), "Convert with .to(torch.int32)")
        self.shape(argument, value, *shape)
        self.device(argument, value, like)
        return value.contiguous()

    def unit_stride(self, argument: str, value: Tensor) -> None:
        """For tensors that are written in place and so cannot be copied."""
        if value.shape[-1] > 1 and value.stride(-1) != 1:
            self.fail(argument, f"strides {value.stride()}", "last stride 1")

    def no_grad(self, hint: str, **tensors: Tensor | None) -> None:
        """None of `tensors` may require grad while grad mode is on."""
        if torch.is_grad_enabled():
            for argument, value in tensors.items():
                if isinstance(value, Tensor) and value.requires_grad:
                    self.unsupported(argument, "a tensor that requires grad", "no gradient through this call", hint)

    def writable(self, argument: str, out: Tensor, inputs: dict[str, Tensor | None]) -> None:
        """`out` is written: its elements are distinct bytes, and none belongs to an input. Unknown while tracing."""
        if torch.compiler.is_compiling():
            return
        extent = 1
        for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
            if size > 1 and stride < extent:
                self.fail(
                    argument,
                    f"strides {out.stride()} of shape {tuple(out.shape)}",
                    "a tensor without overlap in itself",
                )
            extent += (size - 1) * stride if size > 1 else 0
        if out.numel() == 0:
            return
        if any(torch._C._functorch.is_batchedtensor(x) for x in (out, *inputs.values()) if x is not None):
            self.unsupported(argument, "a tensor under vmap", "no vmap over calls that write into their arguments")
        for name, value in inputs.items():
            if value is not None and value.numel() and _overlap(out, value):
                other = self.name(name)
                self.fail(argument, f"a tensor in the memory of {other}", f"memory apart from {other}")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the bytes from first to last element meet; without memory (meta, fake) those of one storage can."""
    if _address(a) == 0 and not torch._C._is_alias_of(a, b):
        return False
    (first, end), (other_first, other_end) = _span(a), _span(b)
    return first < other_end and other_first < end


def _span(x: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and the end of `x`."""
    first = x.storage_offset()
    last = first + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return _address(x) + first * x.element_size(), _address(x) + (last + 1) * x.element_size()


def _address(x: Tensor) -> int:
    storage = x.untyped_storage()
    return 0 if storage.device.type == "meta" else storage.data_ptr()
