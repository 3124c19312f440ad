# SPDX-License-Identifier: BSD-3-Clause
"""Functions under torch.compile beside themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

from flash_attn3.testing import bitwise_equal


@contextmanager
def empty_dynamo() -> Iterator[None]:
    """No guard that sizes which happened to be equal at first stay equal: what is left are guards of this package."""
    torch._dynamo.reset()
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        yield
    torch._dynamo.reset()


class Compiled:
    """`fn` compiled without graph breaks; compares each call with eager, gradients too, and counts compilations."""

    def __init__(self, fn: Callable, **options) -> None:
        self.fn = fn
        self.compiled = torch.compile(fn, fullgraph=True, backend="aot_eager", **options)

    def check(self, *inputs) -> None:
        results = [self._run(fn, inputs) for fn in (self.fn, self.compiled)]
        assert len(results[0]) == len(results[1])
        for eager, compiled in zip(*results, strict=True):
            assert bitwise_equal(eager, compiled)

    @property
    def compilations(self) -> int:
        return len(_debug_get_cache_entry_list(self.fn))

    @staticmethod
    def _run(fn: Callable, inputs) -> list[torch.Tensor]:
        """Results, gradients, and the inputs afterwards."""
        copies = [
            x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in inputs
        ]
        result = fn(*copies)
        results = [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, torch.Tensor)]
        differentiable = [x for x in results if x.requires_grad]
        if differentiable:
            sum(x.float().cos().sum() for x in differentiable).backward()
        tensors = [x for x in copies if isinstance(x, torch.Tensor)]
        return (
            [x.detach() for x in results]
            + [x.grad for x in tensors if x.grad is not None]
            + [x.detach() for x in tensors]
        )
