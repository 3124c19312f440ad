# SPDX-License-Identifier: BSD-3-Clause
"""torch's `scaled_dot_product_attention` on this package: `register()`, then torch's own switch.

The switch replaces the kernels of torch's flash attention ops, forward and backward, on the CPU and on CUDA. What this
package does not serve (a mask tensor, dropout, fp64, odd head dims) goes on to the kernel that was there before: both
compute the same function, and their (out, logsumexp) serve either backward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..api import flash_attn_func
from ..checks import HALF_DTYPES, Checks
from ..flash_attn_interface import _flash_attn_backward

MAX_HEAD_DIM = 256


def register() -> None:
    """Offer this package to torch as the flash attention implementation "flash_attn3". Activates nothing.

    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl
    from flash_attn3.integrations import sdpa

    sdpa.register()
    activate_flash_attention_impl("flash_attn3")  # F.scaled_dot_product_attention now runs on flash_attn3
    restore_flash_attention_impl()
    """
    try:
        from torch.nn.attention import register_flash_attention_impl
    except ImportError:
        expected = "a torch with torch.nn.attention.register_flash_attention_impl"
        Checks("register").unsupported("torch", torch.__version__, expected)
    register_flash_attention_impl("flash_attn3", register_fn=activate)


class Handle:
    """Keeps the kernels replaced, until `remove()`."""

    def __init__(self) -> None:
        self._library: torch.library.Library | None = torch.library.Library("aten", "IMPL")

    def replace(self, op: str, key: str, kernel: Callable) -> None:
        """Run `kernel(*arguments)` for `op`, and the kernel before it when that returns None."""
        previous = torch.library.get_kernel(f"aten::{op}", key)

        def replaced(keys: torch.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
            result = kernel(*args, **kwargs)
            return previous.call_boxed(keys, *args, **kwargs) if result is None else result

        self._library.impl(op, replaced, key, with_keyset=True)

    def remove(self) -> None:
        self._library = None


def activate() -> Handle:
    """Replace the kernels now. torch calls this in `activate_flash_attention_impl`."""
    name = "_scaled_dot_product_flash_attention"
    kernels = [(f"{name}_for_cpu", "CPU", _forward_cpu), (f"{name}_for_cpu_backward", "CPU", _backward_cpu)]
    if torch.backends.cuda.is_built():
        kernels += [(name, "CUDA", _forward_cuda), (f"{name}_backward", "CUDA", _backward_cuda)]
    handle = Handle()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # of a replacement, which is the aim
        for op, key, kernel in kernels:
            handle.replace(op, key, kernel)
    return handle


def _forward_cpu(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    if attn_mask is not None or not _serves(query, key, value, dropout_p, scale):
        return None
    out, lse = _forward(query, key, value, is_causal, scale)
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2)  # (b, h, s_q), rows before heads in memory


def _backward_cpu(grad_out, query, key, value, out, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
    if attn_mask is not None or not _serves(query, key, value, dropout_p, scale):
        return None
    grads = [torch.empty_permuted(x.shape, (0, 2, 1, 3), dtype=x.dtype) for x in (query, key, value)]
    return _backward(grad_out, query, key, value, out, lse.contiguous(), is_causal, scale, *grads)


def _forward_cuda(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    if return_debug_mask or not _serves(query, key, value, dropout_p, scale):
        return None
    out, lse = _forward(query, key, value, is_causal, scale)
    seed, offset = (query.new_zeros(shape, dtype=torch.uint64) for shape in ((2,), ()))
    return out, lse, None, None, query.shape[2], key.shape[2], seed, offset, query.new_empty(0)


def _backward_cuda(
    grad_out, query, key, value, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, seed, offset, *, scale=None
):
    if not _serves(query, key, value, dropout_p, scale):
        return None
    grads = [torch.empty_like(x) for x in (query, key, value)]
    return _backward(grad_out, query, key, value, out, lse, is_causal, scale, *grads)


def _serves(query: Tensor, key: Tensor, value: Tensor, dropout_p: float, scale: float | None) -> bool:
    dtypes = (*HALF_DTYPES, torch.float32) if query.device.type == "cpu" else HALF_DTYPES
    tensors = (query, key, value)
    head_dim = query.shape[3]
    return (
        not dropout_p
        and (scale is None or 0 <= scale < float("inf"))
        and query.dtype in dtypes
        and all(x.dtype == query.dtype and x.shape[3] == head_dim and x.stride(3) == 1 for x in tensors)
        and 0 < head_dim <= MAX_HEAD_DIM
        and head_dim % 8 == 0
    )


def _arguments(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None):
    """q, k, v (b, s, h, d), and keywords. torch aligns a causal mask at the first row and key, we at the last ones."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if not is_causal:
        return (q, k, v), dict(softmax_scale=scale)
    num_keys = min(q.shape[1], k.shape[1])  # that some row sees
    window = (-1, q.shape[1] - num_keys)
    return (q, k[:, :num_keys], v[:, :num_keys]), dict(softmax_scale=scale, window_size=window)


@torch.no_grad()
def _forward(query, key, value, is_causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """out in the memory layout of query, lse (b, h, s_q)."""
    tensors, options = _arguments(query, key, value, is_causal, scale)
    out = torch.empty_like(query)
    _, lse = flash_attn_func(*tensors, **options, out=out.transpose(1, 2), return_softmax_lse=True)
    return out, lse


def _backward(grad_out, query, key, value, out, lse, is_causal: bool, scale: float | None, dq, dk, dv):
    (q, k, v), options = _arguments(query, key, value, is_causal, scale)
    for grad in (dk, dv):
        grad[:, :, k.shape[1] :] = 0
    grads = dict(dq=dq, dk=dk[:, :, : k.shape[1]], dv=dv[:, :, : k.shape[1]])
    _flash_attn_backward(
        grad_out.transpose(1, 2),
        q,
        k,
        v,
        out.transpose(1, 2),
        lse,
        **{name: grad.transpose(1, 2) for name, grad in grads.items()},
        **options,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk, dv
