# SPDX-License-Identifier: BSD-3-Clause
"""What training runs (F2, F3, F6, F7, F8): packed documents, padded batches, losses on lse, sinks, QK-clip."""

from __future__ import annotations

import math

import pytest
import torch
from paging import cu, int32
from torch import Tensor

from flash_attn3 import flash_attn_func, flash_attn_varlen_func
from flash_attn3.testing import GradCheck, bitwise_equal, call, make_inputs, values

H, H_KV = 4, 2


def packed(total: int, heads: int, heads_kv: int, d: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    shapes = {"q": (total, heads, d), "k": (total, heads_kv, d), "v": (total, heads_kv, d)}
    return {name: values(shape, dtype, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("seed", range(3))
def test_f2_packed_documents(seed: int) -> None:
    """Documents found where position_ids restart; the rows behind the last one get gradient exactly 0."""
    generator = torch.Generator().manual_seed(seed)
    extents = torch.randint(0, 60, (12,), generator=generator).tolist() + [0, 1, 128, 1]
    positions = torch.cat([torch.arange(extent) for extent in extents])
    starts = (positions == 0).nonzero()[:, 0].tolist()
    total, spare = len(positions), 7
    extents = [end - start for start, end in zip(starts, [*starts[1:], total], strict=True)]
    documents = cu([*extents[:3], 0, *extents[3:]])
    case = packed(total + spare, H, H_KV, 64) | dict(cu_seqlens_q=documents, cu_seqlens_k=documents, causal=True)
    GradCheck(case).check(call)

    leaves = {name: case[name].clone().requires_grad_() for name in "qkv"}
    out, _ = call(case | leaves)
    grads = torch.autograd.grad(
        out, list(leaves.values()), torch.full_like(out, math.nan).index_fill(0, torch.arange(total), 1)
    )
    for grad in grads:
        assert bitwise_equal(grad[total:], torch.zeros_like(grad[total:])) and grad.isfinite().all()


def test_f3_padded_batch() -> None:
    """cu_seqlens of the padded layout with the used lengths; NaN in the padding, in dout too."""
    used, extent = [5, 0, 64, 33], 64
    layout, lengths = cu([extent] * 4), int32(*used)
    case = packed(4 * extent, H, H_KV, 64) | dict(cu_seqlens_q=layout, cu_seqlens_k=layout, causal=True)
    case |= dict(seqused_q=lengths, seqused_k=lengths)
    padding = torch.cat([torch.arange(extent) >= length for length in used])
    for name in "qkv":
        case[name][padding] = math.nan
    check = GradCheck(case)
    check.check(call)

    leaves = {name: case[name].clone().requires_grad_() for name in "qkv"}
    out, _ = call(case | leaves)
    assert bitwise_equal(out[padding], torch.zeros_like(out[padding]))
    dout = check.dout.masked_fill(padding[:, None, None], math.nan)
    for grad in torch.autograd.grad(out, list(leaves.values()), dout):
        assert bitwise_equal(grad[padding], torch.zeros_like(grad[padding]))


def z_loss(out: Tensor, lse: Tensor) -> Tensor:
    return lse.square().mean()


def out_and_lse(out: Tensor, lse: Tensor) -> Tensor:
    return (out * values(out.shape, out.dtype, seed=9).to(out)).sum() + lse.square().mean()


@pytest.mark.parametrize("loss", [z_loss, out_and_lse])
def test_f6_loss_on_lse(loss) -> None:
    inputs = make_inputs(batch=2, seqlen_q=65, seqlen_k=65, head_dim=16)
    check = GradCheck(inputs | dict(causal=True))
    leaves = {name: inputs[name].clone().requires_grad_() for name in "qkv"}
    out, lse = flash_attn_func(**leaves, causal=True, return_softmax_lse=True)
    grads = torch.autograd.grad(loss(out, lse), list(leaves.values()), allow_unused=True, materialize_grads=True)
    # The same derivative, entering the oracle as (dout, dlse).
    parts = out.detach().requires_grad_(), lse.detach().requires_grad_()
    derivatives = torch.autograd.grad(loss(*parts), parts, allow_unused=True, materialize_grads=True)
    check.dout, check.dlse = derivatives
    check.check_backward(dict(zip(leaves, grads, strict=True)))
    assert grads[0].abs().max() > 0


@pytest.mark.parametrize("window_size", [(-1, -1), (16, 0)], ids=["full", "window"])
def test_f7_learnable_sinks(window_size: tuple[int, int]) -> None:
    inputs = make_inputs(batch=1, seqlen_q=65, seqlen_k=65, num_heads=64, num_heads_kv=8, head_dim=64, sink=True)
    case = inputs | dict(causal=True, window_size=window_size)
    GradCheck(case).check(call)
    with_sink, lse = call(case)
    without, plain_lse = call({name: x for name, x in case.items() if name != "s_aux"})
    scaled = without.float() * torch.sigmoid(plain_lse - case["s_aux"][:, None]).transpose(1, 2)[..., None]
    torch.testing.assert_close(with_sink.float(), scaled, rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(lse, torch.logaddexp(plain_lse, case["s_aux"][:, None].expand_as(plain_lse)))


def test_f8_qk_clip() -> None:
    """The largest logit of each head, and the same weights rescaled so that it is at most a threshold."""
    inputs = make_inputs(batch=2, seqlen_q=300, seqlen_k=300, num_heads=8, num_heads_kv=2, head_dim=128)
    case = inputs | dict(causal=True, softmax_scale=1.0)
    out, lse, max_logits = call(case, return_max_logits=True)
    GradCheck(case).check_forward(out, lse, max_logits)
    threshold = 20.0
    shrink = (threshold / max_logits.amax(0)).clamp_max(1.0).sqrt()  # (h,), for q and k alike
    groups = shrink.unflatten(0, (2, -1)).amin(1)  # k is shared by the heads of a group
    q = case["q"].float() * groups.repeat_interleave(4)[:, None]
    k = case["k"].float() * groups[:, None]
    clipped = flash_attn_func(q, k, case["v"].float(), causal=True, softmax_scale=1.0, return_max_logits=True)[2]
    assert max_logits.max() > threshold and clipped.max() <= threshold * 1.001


def test_f8_packed_and_empty() -> None:
    case = make_inputs("varlen", batch=5, seqlen_q=40, seqlen_k=70) | dict(causal=True, window_size=(8, 0))
    required = dict.fromkeys(("max_seqlen_q", "max_seqlen_k"))
    out, lse, max_logits = flash_attn_varlen_func(**case, **required, return_max_logits=True)
    GradCheck(case).check_forward(out, lse, max_logits)
