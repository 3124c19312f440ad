# SPDX-License-Identifier: BSD-3-Clause
"""`why` and `warmup`: the choice of a backend in words, without a launch, and a call that leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import flash_attn3
from flash_attn3 import FlashAttn3ValueError, UnsupportedError, flash_attn_func, flash_attn_with_kvcache, runtime, why
from flash_attn3.testing import bitwise_equal


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions of the cpu backend that ran."""
    ran: list[str] = []
    backend = runtime.backend("cpu")

    def counted(name: str, function: Callable) -> Callable:
        return lambda *arguments: (ran.append(name), function(*arguments))[1]

    for name in ("fwd", "bwd", "append_kv", "rotary_q"):
        monkeypatch.setattr(backend, name, counted(name, getattr(backend, name)))
    return ran


def decode(device: str = "cpu") -> dict:
    q, k = torch.randn(2, 1, 4, 16, device=device), torch.randn(2, 1, 2, 16, device=device)
    cache_k, cache_v = torch.randn(2, 2, 32, 2, 16, device=device)
    lengths = torch.tensor([3, 9], dtype=torch.int32, device=device)
    return {"q": q, "k_cache": cache_k, "v_cache": cache_v, "k": k, "v": k, "cache_seqlens": lengths, "causal": True}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_why_launches_and_writes_nothing(device: str, launches: list[str]) -> None:
    step = decode(device)
    before = step["k_cache"].clone()
    found = why(flash_attn_with_kvcache, **step)
    assert found.backend == "cpu" and found.function == "flash_attn_with_kvcache"
    assert not launches and (device == "meta" or bitwise_equal(step["k_cache"], before))


def test_why_takes_fake_tensors() -> None:
    with FakeTensorMode():
        q = torch.randn(2, 8, 4, 16)
    assert why(flash_attn_func, q, q, q, causal=True).backend == "cpu"


def test_why_names_what_stands_against_other_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_candidates", lambda device_type: ("hopper", "triton", "cpu"))
    q = torch.randn(2, 8, 4, 16)
    found = why(flash_attn_func, q, q, q)
    assert [reason.split(":")[0] for reason in found.reasons] == ["hopper", "triton"]
    lines = str(found).splitlines()
    assert lines[0].startswith("flash_attn_func runs on the cpu backend (")
    assert lines[1:] == [f"  not {reason}" for reason in found.reasons]


def test_why_raises_what_the_call_raises() -> None:
    q = torch.randn(2, 8, 4, 16)
    with pytest.raises(FlashAttn3ValueError, match="flash_attn_func: window_size = "):
        why(flash_attn_func, q, q, q, window_size=(1, 2, 3))
    with pytest.raises(UnsupportedError, match="flash_attn_func: backend = 'hopper'; expected a backend that serves"):
        why(flash_attn_func, q, q, q, backend="hopper")


def test_why_knows_of_gradients() -> None:
    step = decode()
    step["q"].requires_grad_()
    with pytest.raises(UnsupportedError, match="requires grad"):
        why(flash_attn_with_kvcache, **step)


def test_warmup_runs_forward_and_backward_and_leaves_nothing(launches: list[str]) -> None:
    q, k, v = (torch.randn(2, 8, 4, 16, requires_grad=True) for _ in range(3))
    flash_attn3.warmup(flash_attn_func, q, k, v, causal=True)
    assert launches == ["fwd", "bwd"] and q.grad is None
    step = decode()
    before = {name: x.clone() for name, x in step.items() if isinstance(x, torch.Tensor)}
    flash_attn3.warmup(flash_attn_with_kvcache, **step)
    assert launches[2:] == ["append_kv", "fwd"]
    assert all(bitwise_equal(step[name], x) for name, x in before.items())


def test_an_old_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton, "__version__", "3.2.0")
    assert runtime._missing_triton("cuda", 0) == "triton 3.2.0 is too old; needs 3.3"


def test_why_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(2, 8, 4, 64, device="meta", dtype=torch.float16)
    monkeypatch.setattr(runtime, "_missing", lambda *_: None)
    found = why(flash_attn_func, q, q, q, backend="hopper")
    first, tile = str(found).splitlines()
    assert first == f"flash_attn_func runs on the hopper backend ({found.kernel})."
    assert found.kernel.startswith("fwd_fp16_d64_v64_")
    assert tile.startswith("  64 x 128 tiles of queries and keys, 72 KB of shared memory: ")
