# SPDX-License-Identifier: BSD-3-Clause
"""torch.compile and torch.export: no graph break, no recompile for a length, position or batch, the bits of eager."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import flash_attn3
from flash_attn3 import (
    flash_attn_combine,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
    merge_state,
)
from flash_attn3.flash_attn_interface import _flash_attn_backward, _flash_attn_forward
from flash_attn3.testing import bitwise_equal, offsets
from tests.compiling import Compiled, empty_dynamo

pytestmark = pytest.mark.unpoisoned  # Dynamo would trace into the patched torch.empty
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    with empty_dynamo():
        yield


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense(batch: int, s_q: int, s_k: int, h: int = 4, h_kv: int = 2, d: int = 16) -> list[torch.Tensor]:
    shapes = ((batch, s_q, h, d), (batch, s_k, h_kv, d), (batch, s_k, h_kv, d))
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


SIZES = [(2, 5, 7), (3, 8, 8), (4, 33, 65), (7, 6, 129)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "window_size": (3, 0), "return_lse": True},
        {"softcap": 5.0, "softmax_scale": 0.2, "return_max_logits": True, "num_splits": 0},
        {"attention_chunk": 4, "causal": True, "deterministic": True},
    ],
    ids=str,
)
def test_dense(options: dict) -> None:
    compiled = Compiled(lambda q, k, v: flash_attn_func(q, k, v, **options), dynamic=True)
    for batch, s_q, s_k in SIZES:
        compiled.check(*dense(batch, s_q, s_k))
    assert compiled.compilations == 1


def test_dense_with_a_sink_and_without_dynamic_shapes_at_first() -> None:
    """What torch.compile does by itself: one static graph, then one with dynamic sizes."""
    compiled = Compiled(lambda q, k, v, sink: flash_attn_func(q, k, v, causal=True, s_aux=sink, return_lse=True))
    for batch, s_q, s_k in SIZES:
        compiled.check(*dense(batch, s_q, s_k), torch.randn(4, requires_grad=True))
    assert compiled.compilations <= 2


def test_a_window_may_vary_and_a_scale_is_a_constant() -> None:
    """Windows are symbolic integers; an op takes no symbolic float, so each scale compiles, as for torch's SDPA."""
    compiled = Compiled(
        lambda q, k, v, scale, left: flash_attn_func(q, k, v, scale, window_size=(left, 0)), dynamic=True
    )
    for left in (3, 4, 9):
        compiled.check(*dense(2, 5, 7), 0.5, left)
    assert compiled.compilations == 1
    compiled.check(*dense(2, 5, 7), 0.25, 3)
    assert compiled.compilations == 2


@pytest.mark.parametrize("used", [False, True])
def test_varlen(used: bool) -> None:
    def fn(q, k, v, cu_q, cu_k, max_q, max_k, used_k):
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, seqused_k=used_k, causal=True, return_lse=True)

    compiled = Compiled(fn, dynamic=True)
    for lengths in ((3, 5), (0, 1, 33, 2), (5, 6, 7, 8, 9), (64, 65)):
        extent = int32(*lengths)
        cu, total = offsets(extent), sum(lengths)
        q, k, v = (torch.randn(total, h, 16, requires_grad=True) for h in (4, 2, 2))
        compiled.check(q, k, v, cu, cu, max(lengths), max(lengths), extent // 2 if used else None)
    assert compiled.compilations == 1


@pytest.mark.parametrize("bound", [None, torch.tensor])
def test_varlen_with_bounds_that_are_not_read(bound) -> None:
    def fn(q, k, v, cu, max_q):
        return flash_attn_varlen_func(q, k, v, cu, cu, max_q, max_q, causal=True)

    compiled = Compiled(fn, dynamic=True)
    for lengths in ((3, 5), (9, 33, 2)):
        q, k, v = (torch.randn(sum(lengths), 2, 16, requires_grad=True) for _ in range(3))
        compiled.check(q, k, v, offsets(int32(*lengths)), bound and bound(max(lengths)))
    assert compiled.compilations == 1


def test_packed() -> None:
    qkv = Compiled(lambda qkv: flash_attn_qkvpacked_func(qkv, causal=True), dynamic=True)
    gqa = Compiled(lambda qkv: flash_attn_qkvpacked_func(qkv, num_heads_q=4, return_lse=True), dynamic=True)
    kv = Compiled(lambda q, kv, sink: flash_attn_kvpacked_func(q, kv, s_aux=sink), dynamic=True)
    for batch, s_q, s_k in SIZES[:3]:
        qkv.check(torch.randn(batch, s_q, 3, 4, 16, requires_grad=True))
        gqa.check(torch.randn(batch, s_q, 8, 16, requires_grad=True))
        q, kv_packed = torch.randn(batch, s_q, 4, 16), torch.randn(batch, s_k, 2, 2, 16)
        kv.check(q.requires_grad_(), kv_packed.requires_grad_(), torch.randn(4, requires_grad=True))
    assert [x.compilations for x in (qkv, gqa, kv)] == [1, 1, 1]


@torch.no_grad()
def test_without_gradients_and_into_a_buffer() -> None:
    compiled = Compiled(lambda q, k, v, out: flash_attn_func(q, k, v, out=out), dynamic=True)
    for batch, s_q, s_k in SIZES[:3]:
        q, k, v = (x.detach() for x in dense(batch, s_q, s_k))
        compiled.check(q, k, v, torch.zeros_like(q))
    assert compiled.compilations == 1


# Decode


def decode(q, k, v, k_cache, v_cache, lengths, cos, sin):
    tables = dict(rotary_cos=cos, rotary_sin=sin, rotary_interleaved=False)
    return flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, **tables, cache_seqlens=lengths, causal=True, return_softmax_lse=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("kind", ["tensor", "int"])
@torch.no_grad()
def test_decode_over_positions(kind: str, dtype: torch.dtype) -> None:
    """gpt-fast: a static cache of layout (b, h, s, d), a position that advances, append and rotation in the call."""
    compiled = Compiled(decode)
    tables = [torch.randn(64, 8) for _ in range(2)]
    caches = [torch.zeros(1, 6, 64, 48, dtype=dtype).transpose(1, 2) for _ in range(2)]
    for position in (0, 1, 2, 7, 30, 31, 63):
        q, k, v = (torch.randn(1, 1, 6, 48).to(dtype) for _ in range(3))
        compiled.check(q, k, v, *caches, int32(position) if kind == "tensor" else position, *tables)
    assert compiled.compilations <= (1 if kind == "tensor" else 3)  # an int: 0 and 1 apart, then dynamic


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@torch.no_grad()
def test_prefill_and_batches(dtype: torch.dtype) -> None:
    compiled = Compiled(decode, dynamic=True)
    tables = [torch.randn(64, 8) for _ in range(2)]
    for batch, length in ((2, 5), (3, 2), (4, 33), (2, 17)):
        q, k, v = (torch.randn(batch, length, h, 16).to(dtype) for h in (4, 2, 2))
        caches = [torch.zeros(batch, 64, 2, 16, dtype=dtype) for _ in range(2)]
        compiled.check(q, k, v, *caches, torch.arange(batch).int(), *tables)
    assert compiled.compilations == 1


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@torch.no_grad()
def test_paged_ragged_decode(dtype: torch.dtype) -> None:
    def fn(q, k_pages, v_pages, k, v, cu, table, lengths, metadata):
        return flash_attn_with_kvcache(
            q,
            k_pages,
            v_pages,
            k,
            v,
            cache_seqlens=lengths,
            page_table=table,
            cu_seqlens_q=cu,
            cu_seqlens_k_new=cu,
            max_seqlen_q=8,
            causal=True,
            scheduler_metadata=metadata,
        )

    compiled = Compiled(fn, dynamic=True)
    pages = [torch.randn(12, 4, 2, 16).to(dtype) for _ in range(2)]
    for new in ((3, 1), (1, 1, 6), (2, 0, 1, 3)):
        batch, total = len(new), sum(new)
        q, k, v = (torch.randn(total, h, 16).to(dtype) for h in (4, 2, 2))
        table = torch.randperm(12)[: 3 * batch].view(batch, 3).int()
        lengths = torch.arange(batch).int()
        metadata = get_scheduler_metadata(batch, 8, 12, 4, 2, 16, lengths, page_size=4, causal=True)
        compiled.check(q, *pages, k, v, offsets(int32(*new)), table, lengths, metadata)
    assert compiled.compilations == 1


@torch.no_grad()
def test_cache_without_append() -> None:
    compiled = Compiled(lambda q, k, v, n: flash_attn_with_kvcache(q, k, v, cache_seqlens=n, causal=True), dynamic=True)
    for batch, length in ((2, 3), (3, 9), (4, 31)):
        q, k, v = (x.detach() for x in dense(batch, 2, 32))
        compiled.check(q, k, v, length)
    assert compiled.compilations == 1


# Merging, metadata, the lower-level functions


def test_merging() -> None:
    merge = Compiled(lambda a, la, b, lb: merge_state(a, la, b, lb, lse_layout="sh"), dynamic=True)
    combine = Compiled(lambda out, lse: flash_attn_combine(out, lse, out_dtype=HALF), dynamic=True)
    metadata = Compiled(lambda n: get_scheduler_metadata(n.shape[0], 1, 64, 4, 2, 64, n), dynamic=True)
    for batch, s, _ in SIZES[:3]:
        states = [(torch.randn(batch, s, 4, 16), torch.randn(batch, s, 4)) for _ in range(2)]
        merge.check(*(x.requires_grad_() for state in states for x in state))
        combine.check(torch.randn(3, batch, s, 4, 16), torch.randn(3, batch, s, 4))
        metadata.check(torch.arange(batch).int())
    assert [x.compilations for x in (merge, combine, metadata)] == [1, 1, 1]


def test_lower_level_functions() -> None:
    def both(q, k, v, dout):
        out, lse, *_ = _flash_attn_forward(q, k, v, causal=True)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        softmax_d = _flash_attn_backward(dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, is_causal=True)
        return out, lse, dq, dk, dv, softmax_d

    compiled = Compiled(both, dynamic=True)
    for sizes in SIZES[:3]:
        q, k, v = (x.detach() for x in dense(*sizes))
        compiled.check(q, k, v, torch.randn_like(q))
    assert compiled.compilations == 1


# Models


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(64, 3 * 64)
        self.sink = torch.nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).unbind(2)
        return x + flash_attn_func(q, k, v, causal=True, s_aux=self.sink).flatten(2)


def test_inductor() -> None:
    block = Block()
    compiled = torch.compile(block, fullgraph=True)
    x = torch.randn(2, 9, 64)
    results = []
    for fn in (block, compiled):
        block.zero_grad()
        out = fn(x)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in block.parameters())])
    for eager, found in zip(*results, strict=True):
        torch.testing.assert_close(eager, found)


@torch.no_grad()
def test_inductor_keeps_the_cache_in_place() -> None:
    def step(q, k, v, k_cache, v_cache, lengths):
        return flash_attn_with_kvcache(q * 2, k_cache, v_cache, k + 1, v, cache_seqlens=lengths, causal=True)

    caches = [torch.zeros(2, 8, 2, 16) for _ in range(4)]
    q, k, v = torch.randn(2, 1, 4, 16), torch.randn(2, 1, 2, 16), torch.randn(2, 1, 2, 16)
    compiled = torch.compile(step, fullgraph=True)
    for position in range(3):
        lengths = int32(position, position + 2)
        expected = step(q, k, v, *caches[:2], lengths)
        assert bitwise_equal(compiled(q, k, v, *caches[2:], lengths), expected)
    assert all(bitwise_equal(a, b) for a, b in zip(caches[:2], caches[2:], strict=True)) and caches[0].any()


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    block, sizes = Block(), {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("s", min=2, max=4096)}
    program = torch.export.export(block, (torch.randn(3, 9, 64),), dynamic_shapes=(sizes,), strict=strict)
    assert torch.ops.flash_attn3.fwd.default in {node.target for node in program.graph.nodes}
    for shape in ((3, 9, 64), (5, 33, 64)):
        x = torch.randn(shape)
        assert bitwise_equal(program.module()(x), block(x))


def test_why_and_errors_under_compile() -> None:
    """A refusal reaches the caller as itself."""
    bad = torch.compile(lambda q, k, v: flash_attn_func(q, k, v, softmax_scale=-1.0), backend="aot_eager")
    with pytest.raises(flash_attn3.FlashAttn3ValueError, match=r"softmax_scale = -1\.0; expected"):
        bad(*dense(2, 5, 7))
