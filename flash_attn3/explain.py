# SPDX-License-Identifier: BSD-3-Clause
"""`why` tells which backend a call takes; `warmup` makes its first run a fast one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from . import runtime, variants


@dataclass(frozen=True)
class Explanation:
    """The answer of `why`; printed, it is a few lines of text."""

    function: str
    backend: str
    kernel: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.function} runs on the {self.backend} backend ({self.kernel})."]
        lines += [f"  {note}" for note in variants.notes(self.kernel)]
        return "\n".join(lines + [f"  not {reason}" for reason in self.reasons])


def why(fn: Callable, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend serves `fn(*args, **kwargs)`, and why not the ones before it.

    Tensors may be real, meta or fake; nothing is launched and nothing is written.

    Raises:
        FlashAttn3Error: what the call itself would raise before it launches.
    """
    fakes = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)]
    mode = fakes[0].fake_mode if fakes else FakeTensorMode()
    with mode, runtime.recorded_choices() as choices:
        fake_args, fake_kwargs = tree_map_only(Tensor, lambda x: _faked(mode, x), (args, kwargs))
        fn(*fake_args, **fake_kwargs)
    choice = choices[-1]
    return Explanation(getattr(fn, "__name__", str(fn)), choice.backend, choice.kernel, choice.reasons)


def _faked(mode: FakeTensorMode, x: Tensor) -> Tensor:
    return x if isinstance(x, FakeTensor) else mode.from_tensor(x)


def warmup(fn: Callable, *args: Any, **kwargs: Any) -> None:
    """Compile, load and allocate what `fn(*args, **kwargs)` needs, and its backward if an input requires grad.

    The call runs on copies of the tensors, so caches stay as they are.
    """
    args, kwargs = tree_map_only(Tensor, _copied, (args, kwargs))
    result = fn(*args, **kwargs)
    out = result[0] if isinstance(result, tuple) else result
    if out.requires_grad:
        out.sum().backward()


def _copied(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)
