# SPDX-License-Identifier: BSD-3-Clause
"""Which backend serves a problem, and why not the others."""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import torch

from . import env, extension
from .errors import FlashAttn3ValueError, UnsupportedError, message
from .problem import AttentionProblem

MIN_TRITON = (3, 3)  # the first whose kernels take tuples


@dataclass(frozen=True)
class Choice:
    """The backend of a call, and one line for each backend that was not taken."""

    backend: str
    reasons: tuple[str, ...]
    kernel: str = ""  # where choices are recorded


_loaded: dict[str, ModuleType] = {}


def backend(name: str) -> ModuleType:
    """The module that implements `name`; see `cpu` for the functions of a backend."""
    if name not in _loaded:
        _loaded[name] = importlib.import_module(f".{name}", __package__)
    return _loaded[name]


@functools.cache
def _diagnosis(name: str, device_type: str, device_index: int | None) -> str | None:
    why_not = {"hopper": _missing_hopper, "triton": _missing_triton, "cpu": _missing_cpu}[name](
        device_type, device_index
    )
    if why_not is None:
        backend(name)
    return why_not


def _missing(name: str, device_type: str, device_index: int | None) -> str | None:
    """Why this machine cannot run backend `name` on a device, or None; never looks at a problem."""
    return _diagnosis(name, device_type, device_index)


# What torch.compiler.assume_constant_result sets; calling it would import torch._dynamo, a second of CPU time.
_missing._dynamo_marked_constant = True


def _missing_cpu(device_type: str, device_index: int | None) -> str | None:
    return None if device_type in ("cpu", "meta") else "serves CPU tensors only"


def _missing_triton(device_type: str, device_index: int | None) -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}); pip install 'flash_attn3[triton]'"
    if tuple(map(int, triton.__version__.split(".")[:2])) < MIN_TRITON:
        return f"triton {triton.__version__} is too old; needs {'.'.join(map(str, MIN_TRITON))}"
    if device_type == "cpu" and not env.triton_interpret():
        return "serves CPU tensors only under TRITON_INTERPRET=1"
    return None if device_type in ("cuda", "cpu", "meta") else f"does not serve {device_type} tensors"


def _missing_hopper(device_type: str, device_index: int | None) -> str | None:
    if device_type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device_index)
        if capability != (9, 0):
            return f"needs compute capability 9.0; this GPU has {capability[0]}.{capability[1]}"
    elif env.path("FLASH_ATTN3_LIBCUDA") is None:  # else device memory is what that library takes for it
        here = "; torch sees no CUDA device" if device_type == "cuda" else ""
        return f"serves CUDA tensors of a Hopper GPU only{here}"
    return extension.unavailable_reason()


def backends(device_type: str | None = None) -> dict[str, str | None]:
    """Each backend, with the reason why it is unavailable on this machine, or None."""
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: _missing(name, "cpu" if name == "cpu" else device_type, None) for name in env.BACKENDS}


def _candidates(device_type: str) -> tuple[str, ...]:
    return ("hopper", "triton") if device_type == "cuda" else ("cpu",)


def reason(name: str, p: AttentionProblem, needs_grad: bool) -> str | None:
    """Why backend `name` does not serve `p`, or None."""
    device = p.q.device
    return _missing(name, device.type, device.index) or backend(name).unsupported_reason(p, needs_grad)


def named(fn: str, requested: str | None) -> str | None:
    """`requested`, checked."""
    if requested is not None and requested not in env.BACKENDS:
        raise FlashAttn3ValueError(message(fn, "backend", repr(requested), "None or one of " + ", ".join(env.BACKENDS)))
    return requested


def choose(fn: str, p: AttentionProblem, requested: str | None, needs_grad: bool) -> Choice:
    """The backend that serves `p`: the requested one, else the first that can.

    Raises:
        FlashAttn3ValueError: no backend has the requested name.
        UnsupportedError: the requested backend, or every backend, cannot serve the problem.
    """
    requested = named(fn, requested) or env.backend or None
    reasons = []
    for name in _candidates(p.q.device.type) if requested is None else (requested,):
        why_not = reason(name, p, needs_grad)
        if why_not is None:
            if reasons and _is_hopper(p.q.device):
                _warn_fallback(name, reasons[0])
            return _record(Choice(name, tuple(reasons)), p)
        reasons.append(f"{name}: {why_not}")
    device = p.q.device
    raise UnsupportedError(
        message(fn, "backend", repr(requested), f"a backend that serves this call on {device}", "; ".join(reasons))
    )


def for_device(fn: str, device: torch.device, requested: str | None) -> str:
    """The backend of an operation that every backend of `device` has."""
    requested = named(fn, requested) or env.backend or None
    reasons = []
    for name in _candidates(device.type) if requested is None else (requested,):
        why_not = _missing(name, device.type, device.index)
        if why_not is None:
            return name
        reasons.append(f"{name}: {why_not}")
    raise UnsupportedError(
        message(fn, "backend", repr(requested), f"a backend that serves {device}", "; ".join(reasons))
    )


_recorder: list[Choice] | None = None


@contextlib.contextmanager
def recorded_choices() -> Iterator[list[Choice]]:
    """Collect the choices made within, for `why`."""
    global _recorder
    before, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = before


def _record(choice: Choice, p: AttentionProblem) -> Choice:
    if _recorder is not None:
        _recorder.append(replace(choice, kernel=backend(choice.backend).kernel_name(p)))
    return choice


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def _warn_fallback(name: str, why_not: str) -> None:
    warnings.warn(f"flash_attn3 runs on the {name} backend. {why_not}", stacklevel=2)
