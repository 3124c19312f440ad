# SPDX-License-Identifier: BSD-3-Clause
"""How the functions of a peer are called; runs in the peer's process."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from harness import OnColdGpu, on_gpu
from shapes import DecodeShape, Shape, decode_inputs, inputs
from torch import Tensor

if TYPE_CHECKING:
    from peers import Peer


class Worker:
    """Holds one prepared case. A subclass says how it is run."""

    run: Callable[[], dict[str, Tensor]]

    def prepare(self, shape: Shape | DecodeShape, work: str, cold: bool) -> None:
        decode = isinstance(shape, DecodeShape)
        tensors = (decode_inputs if decode else inputs)(shape, "cuda")
        self.run = self.decode(shape, tensors) if decode else self.attend(shape, tensors, work)
        self.stopwatch = OnColdGpu() if cold else on_gpu
        self.run()
        torch.cuda.synchronize()

    def parts(self, wanted: list[tuple[str, tuple]]) -> tuple[bool, list[Any]]:
        """Whether the whole result is finite, and parts of it as fp32 arrays."""
        result = self.run()
        finite = all(bool(x.isfinite().all()) for x in result.values())
        return finite, [result[name][index].float().cpu().numpy() for name, index in wanted]

    def sample(self, iterations: int) -> float:
        return self.stopwatch(self.run, iterations)


class TorchOp(Worker):
    """A library that registers upstream's `fwd`, or one close to it, as a torch op."""

    def __init__(self, peer: Peer, library: Path):
        torch.ops.load_library(str(library))
        self.op = getattr(torch.ops, peer.load["namespace"]).fwd
        self.schema = {argument.name: argument for argument in self.op.default._schema.arguments}

    def attend(self, shape: Shape, tensors: dict[str, Tensor], work: str) -> Callable[[], dict[str, Tensor]]:
        call = {name: tensors[name] for name in "qkv"}
        call |= {"softmax_scale": shape.d**-0.5, "is_causal": shape.causal, "num_splits": 1}
        call |= {"window_size_left": shape.window, "window_size_right": 0 if shape.causal else -1}
        if shape.lengths:
            call |= {f"cu_seqlens_{x}": tensors["cu_seqlens"] for x in "qk"}
            call |= {f"max_seqlen_{x}": max(shape.lengths) for x in "qk"}
        return self.caller(call, lambda out: out)

    def decode(self, shape: DecodeShape, tensors: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Queries packed: every peer has the ragged kernel."""
        starts = torch.arange(shape.b + 1, device="cuda", dtype=torch.int32)
        call = {"q": tensors["q"][:, 0], "k": tensors["k_cache"], "v": tensors["v_cache"], "cu_seqlens_q": starts}
        call |= {"seqused_k": tensors["cache_seqlens"], "page_table": tensors.get("page_table")}
        call |= {"max_seqlen_q": 1, "max_seqlen_k": shape.keys, "softmax_scale": shape.d**-0.5, "num_splits": 0}
        call |= {"is_causal": False, "window_size_left": -1, "window_size_right": -1}
        return self.caller(call, lambda out: out[:, None])

    def caller(self, call: dict[str, Any], leave: Callable[[Tensor], Tensor]) -> Callable[[], dict[str, Tensor]]:
        arguments = {name: call.get(name, NEUTRAL.get(name)) for name in self.schema if self.needed(name, call)}
        return lambda: {"out": leave(self.op(**arguments)[0])}

    def needed(self, name: str, call: dict[str, Any]) -> bool:
        return name in call or not self.schema[name].has_default_value()


# Arguments that mean nothing here, for ops that have no defaults; all others are None.
NEUTRAL = {
    "softcap": 0.0,
    "is_rotary_interleaved": False,
    "sm_margin": 0,
    "cp_world_size": 1,
    "cp_rank": 0,
}


class XlaCall(Worker):
    """A library for JAX's foreign function interface: the one peer with a backward.

    JAX launches on a stream of its own, so the clock of the host is read around many calls.
    """

    def __init__(self, peer: Peer, library: Path):
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        import jax

        self.jax = jax
        symbols = ctypes.CDLL(str(library))
        for name in ("dew_flash3_mha_fwd", "dew_flash3_mha_bwd"):
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(symbols, name)), platform="CUDA")

    def prepare(self, shape: Shape | DecodeShape, work: str, cold: bool) -> None:
        if isinstance(shape, DecodeShape) or shape.lengths or work == "forward+backward":
            raise NotImplementedError("only dense forward and backward are called")
        super().prepare(shape, work, cold)

    def attend(self, shape: Shape, tensors: dict[str, Tensor], work: str) -> Callable[[], dict[str, Tensor]]:
        import numpy as np

        jax, b, s = self.jax, shape.b, shape.s
        q, k, v, dout = (jax.dlpack.from_dlpack(tensors[name]) for name in ("q", "k", "v", "dout"))
        attributes = {
            "softmax_scale": np.float64(shape.d**-0.5),
            "is_causal": shape.causal,
            "window_size_left": np.int64(shape.window),
            "window_size_right": np.int64(0 if shape.causal else -1),
        }

        def fp32(*size: int) -> Any:
            return jax.ShapeDtypeStruct(size, np.float32)

        def like(x: Any) -> Any:
            return jax.ShapeDtypeStruct(x.shape, x.dtype)

        results = [jax.ShapeDtypeStruct(dout.shape, q.dtype), fp32(b, shape.h, s), fp32(1, 1, 1, 1), fp32(1, 1, 1)]
        forward = jax.jit(lambda *x: jax.ffi.ffi_call("dew_flash3_mha_fwd", results)(*x, **attributes))
        out, lse, *_ = forward(q, k, v)
        scratch = fp32(shape.h * (b * s + 128 * (b + 1)))
        gradients = [like(q), like(k), like(v), scratch, scratch]
        backward = jax.jit(lambda *x: jax.ffi.ffi_call("dew_flash3_mha_bwd", gradients)(*x, **attributes))
        if work == "forward":
            self.launch, self.names = (lambda: forward(q, k, v)), ("out",)
        else:
            self.launch, self.names = (lambda: (out, *backward(dout, q, k, v, out, lse))), ("out", "dq", "dk", "dv")
        return lambda: {n: torch.from_dlpack(x) for n, x in zip(self.names, self.launch(), strict=False)}

    def sample(self, iterations: int) -> float:
        start = time.perf_counter()
        for _ in range(iterations):
            result = self.launch()
        self.jax.block_until_ready(result)
        return (time.perf_counter() - start) / iterations


KINDS = {"torch": TorchOp, "xla-ffi": XlaCall}
