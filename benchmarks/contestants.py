# SPDX-License-Identifier: BSD-3-Clause
"""The implementations that race, each in the layout that suits it best."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from harness import OURS, Local, Stopwatch
from shapes import BACKWARD, BOTH, FORWARD, Composition, DecodeShape, Shape
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attn3
from flash_attn3 import runtime

WORK = {"forward": FORWARD, "backward": BACKWARD, "forward+backward": BOTH}


@dataclass(frozen=True)
class Implementation:
    """`attend` takes q, k, v in its own layout; `enter` and `leave` convert from and to that of the inputs."""

    name: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    enter: Callable[[Tensor], Tensor] = lambda x: x
    leave: Callable[[Tensor], Tensor] = lambda x: x


def backends() -> list[str]:
    """Those of ours that run on the device at hand."""
    return [name for name, missing in runtime.backends().items() if missing is None and name != "cpu"]


def flash(shape: Shape, tensors: dict[str, Tensor], backend: str, **options: Any) -> Implementation:
    name = ", ".join([f"{OURS} {backend}", *options])
    options |= {"causal": shape.causal, "window_size": (shape.window, -1), "backend": backend}
    if not shape.lengths:
        return Implementation(name, lambda q, k, v: flash_attn3.flash_attn_func(q, k, v, **options))
    extents, most = tensors["cu_seqlens"], max(shape.lengths)
    return Implementation(
        name,
        lambda q, k, v: flash_attn3.flash_attn_varlen_func(q, k, v, extents, extents, most, most, **options),
    )


def sdpa(shape: Shape, name: str = "SDPA", backend: SDPBackend | None = None) -> Implementation:
    """Contiguous (b, heads, s, d), no mask tensor where `is_causal` says it all; ragged lengths padded beforehand."""
    mask = sdpa_mask(shape)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend) if backend else nullcontext():
            causal = shape.causal and mask is None
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask_on(q.device), is_causal=causal, enable_gqa=gqa
            )

    def mask_on(device: torch.device) -> Tensor | None:
        return masks.setdefault(device, mask.to(device)) if mask is not None else None

    masks: dict[torch.device, Tensor] = {}
    gqa = shape.h != shape.h_kv
    return Implementation(name, attend, lambda x: heads_first(shape, x), lambda x: heads_last(shape, x))


def sdpa_mask(shape: Shape) -> Tensor | None:
    """What `is_causal` cannot say: a window, or which keys are padding (hidden from all real rows if causal)."""
    if shape.window >= 0:
        return torch.ones(shape.s, shape.s, dtype=torch.bool).tril().triu(-shape.window)
    if shape.lengths and not shape.causal:
        used = torch.arange(max(shape.lengths)) < torch.tensor(shape.lengths)[:, None]
        return used[:, None, None]
    return None


def heads_first(shape: Shape, x: Tensor) -> Tensor:
    if shape.lengths:
        x = torch.nn.utils.rnn.pad_sequence(x.split(shape.lengths), batch_first=True)
    return x.transpose(1, 2).contiguous()


def heads_last(shape: Shape, x: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    if not shape.lengths:
        return x
    return torch.cat([row[:length] for row, length in zip(x, shape.lengths, strict=True)])


def contestant(
    implementation: Implementation, work: str, shape: Shape, tensors: dict[str, Tensor], stopwatch: Stopwatch
) -> Local:
    backward = work != "forward"
    q, k, v = leaves = [implementation.enter(tensors[name]).detach().requires_grad_(backward) for name in "qkv"]
    dout = implementation.enter(tensors["dout"])
    kept = implementation.attend(q, k, v) if work == "backward" else None

    def run() -> tuple[Tensor, ...]:
        out = implementation.attend(q, k, v) if kept is None else kept
        if not backward:
            return (out,)
        return (out, *torch.autograd.grad(out, leaves, dout, retain_graph=kept is not None))

    def outputs(result: tuple[Tensor, ...]) -> dict[str, Tensor]:
        named = zip(("out", "dq", "dk", "dv"), result, strict=False)
        return {name: implementation.leave(x.detach()) for name, x in named}

    return Local(implementation.name, run, stopwatch, outputs, flops=shape.flops(WORK[work]))


def flash_decode(shape: DecodeShape, tensors: dict[str, Tensor], backend: str) -> Callable[[], Tensor]:
    return lambda: flash_attn3.flash_attn_with_kvcache(**tensors, backend=backend)


def flash_composition(shape: Composition, tensors: dict[str, Tensor], backend: str) -> Callable[[], Tensor]:
    options = {"max_seqlen_q": max(shape.new), "causal": True, "backend": backend}
    return lambda: flash_attn3.flash_attn_with_kvcache(**tensors, **options)


def sdpa_decode(shape: DecodeShape, tensors: dict[str, Tensor], backend: SDPBackend | None = None):
    """Pages are gathered first, within the time measured: SDPA knows no page table."""
    q = tensors["q"].transpose(1, 2)

    def cache(name: str) -> Tensor:
        held = tensors[name]
        if shape.page_size:
            held = held[tensors["page_table"]].flatten(1, 2)[:, : shape.keys]
        return held.transpose(1, 2)

    def run() -> Tensor:
        with sdpa_kernel(backend) if backend else nullcontext():
            out = F.scaled_dot_product_attention(
                q, cache("k_cache"), cache("v_cache"), enable_gqa=shape.h != shape.h_kv
            )
        return out.transpose(1, 2)

    return run


def decode_contestant(name: str, run: Callable[[], Tensor], stopwatch: Stopwatch, **counts: int) -> Local:
    """`counts`: bytes or flops of a run."""

    def without_grad() -> Tensor:
        with torch.no_grad():
            return run()

    return Local(name, without_grad, stopwatch, lambda out: {"out": out}, **counts)


def cublas(stopwatch: Stopwatch, size: int = 8192) -> Local:
    """What the chip gives today: a large bf16 product of random values."""
    a, b = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    return Local("cuBLAS", lambda: a @ b, stopwatch, flops=2 * size**3)


def device_copy(stopwatch: Stopwatch, size: int = 2**30) -> Local:
    source, target = torch.empty(2, size, device="cuda", dtype=torch.int8).random_()
    return Local("copy", lambda: target.copy_(source), stopwatch, bytes=2 * size)
