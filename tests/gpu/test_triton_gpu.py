# SPDX-License-Identifier: BSD-3-Clause
"""The Triton backend on a GPU against the oracle, and what only a GPU can show: graphs, streams, no synchronisation."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn3
from flash_attn3 import reference
from flash_attn3.testing import (
    GradCheck,
    assert_lse,
    bitwise_equal,
    call,
    make_inputs,
    pairwise,
    restrided,
    values,
    with_descales,
)

DEVICE, BACKEND = "cuda", "triton"


def moved(case: dict[str, Any], device: str = DEVICE) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.items()}


def attend(case: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) on the CPU, computed by the backend under test; gradients flow through."""
    out, lse = call(moved(case), backend=BACKEND, **options)
    return out.cpu(), lse.cpu()


MASKS = [{}, {"causal": True}, {"window_size": (30, 0)}, {"window_size": (17, 25)}]
SCORES = [{}, {"softcap": 15.0}, {"softmax_scale": 0.3}]
AXES = {
    "head_dims": [(64, 64), (128, 128), (192, 128), (256, 256), (40, 40), (64, 256)],
    "seqlens": [(1, 1), (33, 65), (128, 128), (257, 130), (97, 511)],
    "heads": [(4, 4), (4, 2), (6, 1)],
    "dtype": [torch.bfloat16, torch.float16],
    "mask": MASKS,
    "score": SCORES,
    "sink": [False, True],
}


def named(choice: dict[str, Any]) -> str:
    return "-".join(str(value).replace(" ", "") for value in choice.values())


def drawn(layout: str, choice: dict[str, Any], **more: Any) -> dict[str, Any]:
    (d, dv), (seqlen_q, seqlen_k), (h, h_kv) = choice["head_dims"], choice["seqlens"], choice["heads"]
    sizes = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "num_heads": h, "num_heads_kv": h_kv}
    sizes |= {"head_dim": d, "head_dim_v": dv, "dtype": choice["dtype"], "sink": choice["sink"]}
    return make_inputs(layout, **sizes, **more) | choice["mask"] | choice["score"]


@pytest.mark.parametrize("choice", pairwise(AXES), ids=named)
@pytest.mark.parametrize("layout", ["dense", "varlen", "padded"])
def test_forward_and_backward(layout: str, choice: dict[str, Any]) -> None:
    GradCheck(drawn(layout, choice)).check(attend)


@pytest.mark.parametrize("choice", pairwise(AXES), ids=named)
@pytest.mark.parametrize(("layout", "page_size"), [("cache", 16), ("paged", 1), ("paged", 16), ("paged", 64)])
def test_cache(layout: str, page_size: int, choice: dict[str, Any]) -> None:
    case = drawn(layout, choice, page_size=page_size)
    check = GradCheck(case)
    for num_splits in (1, 3, 0):
        check.check_forward(*attend(case, num_splits=num_splits))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_long_decode(head_dim: int) -> None:
    """Many key blocks and the split heuristic."""
    case = make_inputs("paged", batch=3, seqlen_q=1, seqlen_k=5000, head_dim=head_dim, num_heads=8, page_size=64)
    check = GradCheck(case)
    for num_splits in (0, 1, 7, 64):
        check.check_forward(*attend(case, num_splits=num_splits))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", ["cache", "paged"])
def test_append_and_rotary(layout: str, interleaved: bool) -> None:
    case = make_inputs(layout, seqlen_q=3, seqlen_k=90, head_dim=64)
    shape = (2, 3, 2, 64)
    case |= {"k_new": values(shape, torch.bfloat16, seed=5), "v_new": values(shape, torch.bfloat16, seed=6)}
    case["seqused_k"] = (case["seqused_k"] - 10).clamp_min(int(case.get("leftpad_k", torch.zeros(1)).max()))
    angle = torch.rand(128, 16, generator=torch.Generator().manual_seed(1)) * 6.3
    case |= {"rotary_cos": angle.cos(), "rotary_sin": angle.sin(), "rotary_interleaved": interleaved, "causal": True}
    names = ("seqused_k", "rotary_cos", "rotary_sin")
    index = {name: case[name] for name in ("kv_batch_idx", "page_table") if name in case}
    caches = reference.append(
        case["k"], case["v"], case["k_new"], case["v_new"], *(case[name] for name in names), None, interleaved, **index
    )
    on_device = moved(case)
    out, lse = call(on_device, backend=BACKEND)
    GradCheck(case).check_forward(out.cpu(), lse.cpu())
    assert bitwise_equal(on_device["v"].cpu(), caches[1])
    torch.testing.assert_close(on_device["k"].cpu(), caches[0], rtol=2**-7, atol=0, equal_nan=True)


# Real sizes: the oracle holds the whole score matrix, so it takes the rows in chunks, with the keys up to the last row.

LARGE = [
    ("bf16 causal", {"head_dim": 128}, {"causal": True}),
    ("fp16 full", {"head_dim": 64, "dtype": torch.float16}, {}),
    ("bf16 window", {"head_dim": 128}, {"window_size": (1024, 0)}),
    ("bf16 d256", {"head_dim": 256}, {"causal": True}),
    ("bf16 d192", {"head_dim": 192, "head_dim_v": 128}, {"causal": True, "softcap": 30.0}),
    ("bf16 sink", {"head_dim": 64, "sink": True}, {"causal": True, "window_size": (127, -1)}),
]


@pytest.mark.parametrize(("sizes", "options"), [case[1:] for case in LARGE], ids=[case[0] for case in LARGE])
@pytest.mark.parametrize("distribution", ["normal", "paper"])
def test_large(sizes: dict[str, Any], options: dict[str, Any], distribution: str) -> None:
    seqlen, chunk = 8192, 1024
    heads = {"batch": 1, "num_heads": 4, "num_heads_kv": 2, "seqlen_q": seqlen, "seqlen_k": seqlen}
    case = make_inputs("dense", distribution=distribution, **heads, **sizes) | options
    case = moved(case)
    out, lse = call(case, backend=BACKEND)
    ends_with_row = options.get("causal") or "window_size" in options
    for start in range(0, seqlen, chunk):
        rows, keys = slice(start, start + chunk), slice(0, start + chunk if ends_with_row else seqlen)
        part = case | {"q": case["q"][:, rows], "k": case["k"][:, keys], "v": case["v"][:, keys]}
        GradCheck(part, distribution=distribution).check_forward(out[:, rows], lse[:, :, rows])


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_large_decode(page_size: int, dtype: torch.dtype) -> None:
    """32 sequences of up to 16k keys, GQA 8:1, splits by heuristic; one query token, or four to speculate with."""
    for seqlen_q in (1, 4):
        heads = {"batch": 32, "num_heads": 16, "num_heads_kv": 2, "head_dim": 128, "page_size": page_size}
        case = make_inputs("paged", seqlen_q=seqlen_q, seqlen_k=16384, dtype=dtype, least_k=1, **heads)
        case = moved(case | {"q": case["q"].to(torch.bfloat16), "causal": True})
        if dtype == torch.float8_e4m3fn:
            case = with_descales(case, blocks=True)
        out, lse = call(case, num_splits=0, backend=BACKEND)
        for n in range(32):
            tensors = ("q", "page_table", "seqused_k", "k_descale", "v_descale")
            alone = case | {name: case[name][n : n + 1] for name in tensors if name in case}
            GradCheck(alone).check_forward(out[n : n + 1], lse[n : n + 1])


def test_layout_moves_no_bits() -> None:
    case = moved(make_inputs("dense", seqlen_q=200, seqlen_k=300) | {"causal": True})
    plain = call(case, backend=BACKEND)
    strided = call(case | {name: restrided(case[name], seed) for seed, name in enumerate("qkv")}, backend=BACKEND)
    assert all(bitwise_equal(a, b) for a, b in zip(plain, strided, strict=True))


def test_a_sequence_does_not_see_its_batch() -> None:
    case = moved(make_inputs("varlen", batch=5, seqlen_q=150, seqlen_k=300))
    out, lse = call(case, backend=BACKEND)
    starts_q, starts_k = case["cu_seqlens_q"].tolist(), case["cu_seqlens_k"].tolist()
    for n in range(5):
        rows, keys = slice(starts_q[n], starts_q[n + 1]), slice(starts_k[n], starts_k[n + 1])
        alone = {"q": case["q"][None, rows], "k": case["k"][None, keys], "v": case["v"][None, keys]}
        out_n, lse_n = call(alone, backend=BACKEND)
        assert bitwise_equal(out[rows], out_n[0]) and bitwise_equal(lse[:, rows], lse_n[0])


def test_deterministic_backward_repeats_its_bits() -> None:
    q, k, v = (torch.randn(2, 513, h, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for h in (8, 2, 2))
    dout = torch.randn_like(q)

    def grads() -> tuple[Tensor, ...]:
        out = flash_attn3.flash_attn_func(q, k, v, causal=True, deterministic=True, backend=BACKEND)
        return torch.autograd.grad(out, (q, k, v), dout)

    first = grads()
    for _ in range(3):
        assert all(bitwise_equal(a, b) for a, b in zip(first, grads(), strict=True))


@pytest.mark.parametrize(("batch", "heads"), [(70_000, 1), (1, 70_000)])
def test_more_blocks_than_a_grid_axis_holds(batch: int, heads: int) -> None:
    q, k, v = (torch.randn(batch, 2, heads, 8, device=DEVICE, dtype=torch.float16) for _ in range(3))
    out = flash_attn3.flash_attn_func(q, k, v, causal=True, backend=BACKEND)
    assert bitwise_equal(out[:, 0], v[:, 0])  # the first row sees one key
    last = reference.attention(q[-1:, :, -1:], k[-1:, :, -1:], v[-1:, :, -1:], causal=True).out
    torch.testing.assert_close(out[-1:, :, -1:].double(), last, rtol=2e-3, atol=2e-3)


def test_offsets_beyond_32_bits() -> None:
    """Keys of the last sequence begin 2^31 elements into the tensor."""
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    k = torch.zeros(2, 2**23 + 1, 2, 128, device=DEVICE, dtype=torch.bfloat16)
    k[1].normal_()
    q = torch.randn(2, 1, 2, 128, device=DEVICE, dtype=torch.bfloat16)
    lengths = torch.tensor([1, 100], device=DEVICE, dtype=torch.int32)
    out, lse = flash_attn3.flash_attn_with_kvcache(
        q, k, k, cache_seqlens=lengths, return_softmax_lse=True, backend=BACKEND
    )
    exact = reference.attention(q[1:], k[1:, :100], k[1:, :100])
    torch.testing.assert_close(out[1:].double(), exact.out, rtol=2e-2, atol=2e-2)
    assert_lse(lse[1:], exact.lse)


# Graphs: what is captured once and replayed on new contents equals the eager call, bit for bit.


def replayed(run, buffers: list[Tensor], contents: list[Tensor]) -> list[Tensor]:
    """The results of `run`, captured on the old contents of its buffers, replayed on new ones."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for buffer, content in zip(buffers, contents, strict=True):
        buffer.copy_(content)
    graph.replay()
    return [x.clone() for x in results]


def test_graph_of_forward_and_backward() -> None:
    shapes = [(2, 100, 4, 64), (2, 100, 2, 64), (2, 100, 2, 64), (2, 100, 4, 64)]
    buffers = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for shape in shapes]
    contents = [torch.randn_like(x) for x in buffers]

    def step(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = flash_attn3.flash_attn_func(*leaves, causal=True, deterministic=True, backend=BACKEND)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    from_graph = replayed(functools.partial(step, *buffers), buffers, contents)
    assert all(bitwise_equal(a, b) for a, b in zip(from_graph, step(*contents), strict=True))


@pytest.mark.parametrize("num_splits", [1, 4])
def test_graph_of_decode_with_append(num_splits: int) -> None:
    """New tokens, lengths and page tables in the same buffers."""

    def state(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        sizes = [(3, 1, 4, 64), (3, 1, 2, 64), (3, 1, 2, 64), (24, 16, 2, 64), (24, 16, 2, 64)]
        tensors = [torch.randn(size, generator=generator).bfloat16() for size in sizes]
        lengths = torch.randint(0, 100, (3,), generator=generator).int()
        table = torch.randperm(24, generator=generator).view(3, 8).int()
        return [x.to(DEVICE) for x in (*tensors, lengths, table)]

    def step(q, k, v, k_cache, v_cache, lengths, table) -> list[Tensor]:
        out, lse = flash_attn3.flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            k,
            v,
            cache_seqlens=lengths,
            page_table=table,
            causal=True,
            num_splits=num_splits,
            return_softmax_lse=True,
            backend=BACKEND,
        )
        return [out, lse, k_cache, v_cache]

    buffers, contents = state(0), state(1)
    from_graph = replayed(functools.partial(step, *buffers), buffers, contents)
    assert all(bitwise_equal(a, b) for a, b in zip(from_graph, step(*contents), strict=True))


def test_streams() -> None:
    """The launch goes to the current stream; two streams at once do not disturb each other."""
    cases = [moved(make_inputs("dense", seqlen_q=300, seqlen_k=300, seed=seed)) for seed in range(2)]
    expected = [call(case, backend=BACKEND) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for stream, case in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000)
                doubled = {name: x * 2 if name == "v" else x for name, x in case.items()}
                results.append(call(doubled, backend=BACKEND))
        torch.cuda.synchronize()
        for (out, lse), (out_expected, lse_expected) in zip(results, expected, strict=True):
            assert bitwise_equal(out, out_expected * 2) and bitwise_equal(lse, lse_expected)


def test_nothing_waits_for_the_device(no_sync) -> None:
    q, k, v = (torch.randn(2, 40, h, 64, device=DEVICE, dtype=torch.bfloat16) for h in (4, 2, 2))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    lengths = torch.tensor([3, 9], device=DEVICE, dtype=torch.int32)
    starts = torch.tensor([0, 40, 80], device=DEVICE, dtype=torch.int32)
    caches = [torch.randn(2, 128, 2, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    partial_out, partial_lse = torch.randn(2, 2, 40, 4, 64, device=DEVICE), torch.randn(2, 2, 40, 4, device=DEVICE)

    def everything() -> None:
        out, lse = flash_attn3.flash_attn_func(*leaves, causal=True, return_attn_probs=True, backend=BACKEND)
        torch.autograd.grad(out, leaves, q)
        flash_attn3.flash_attn_varlen_func(*packed, starts, starts, 40, 40, causal=True, backend=BACKEND)
        flash_attn3.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, causal=True, backend=BACKEND)
        flash_attn3.flash_attn_combine(partial_out, partial_lse, backend=BACKEND)
        flash_attn3.merge_state(out.detach(), lse, out.detach(), lse, backend=BACKEND)

    everything()
    with no_sync():
        everything()


def test_chosen_on_a_gpu() -> None:
    q = torch.randn(1, 8, 2, 64, device=DEVICE, dtype=torch.bfloat16)
    assert flash_attn3.why(flash_attn3.flash_attn_func, q, q, q).backend in ("hopper", BACKEND)
    with pytest.raises(flash_attn3.FlashAttn3TypeError, match="bfloat16"):
        flash_attn3.flash_attn_func(*[q.float()] * 3, backend=BACKEND)


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    q = torch.randn(1, 8, 2, 64, device="cuda:1", dtype=torch.bfloat16)
    out = flash_attn3.flash_attn_func(q, q, q, backend=BACKEND)
    assert out.device == q.device
    torch.testing.assert_close(out.double(), reference.attention(q, q, q).out, rtol=2e-2, atol=2e-2)
