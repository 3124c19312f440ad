# SPDX-License-Identifier: BSD-3-Clause
"""Checkpointing, flat parameters and compiled blocks leave the loss and the gradients of a Llama, bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_models import LAYERS, decoders, padded, tokens

from flash_attn3 import ops
from flash_attn3.integrations import transformers as fa3

fa3.register()


Step = tuple[Tensor, list[Tensor]]  # loss, gradients
KEEP_ATTENTION = functools.partial(create_selective_checkpoint_contexts, [ops.fwd])


def step(run: Callable, parameters: list[Tensor], ids: Tensor) -> Step:
    inputs = padded("right")
    labels = ids.masked_fill(inputs["attention_mask"] == 0, -100)
    loss = run(ids, labels=labels, use_cache=False, **inputs).loss
    loss.backward()
    grads = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return loss.detach(), grads


def equal(got: Step, expected: Step) -> bool:
    return all(map(torch.equal, (got[0], *got[1]), (expected[0], *expected[1])))


@pytest.fixture
def model() -> torch.nn.Module:
    return decoders("llama", "fa3")[0].train()


@pytest.mark.parametrize(
    ("how", "recomputed"),
    [
        (dict(use_reentrant=False), LAYERS),
        (dict(use_reentrant=True), LAYERS),
        (dict(use_reentrant=False, context_fn=KEEP_ATTENTION), 0),
    ],
    ids=["non_reentrant", "reentrant", "selective"],
)
def test_checkpointed_step(model, how, recomputed, calls):
    ids, parameters = tokens(), list(model.parameters())
    expected = step(model, parameters, ids)
    assert calls.take() == (LAYERS, LAYERS)
    model.activation_checkpointing_enable(how)
    assert equal(step(model, parameters, ids), expected)
    assert calls.take() == (LAYERS + recomputed, LAYERS)


def test_parameters_as_views_of_one_tensor(model, calls):
    """As FSDP holds them: the gradient arrives in the flat tensor."""
    ids, parameters = tokens(), dict(model.named_parameters())
    loss, grads = step(model, list(parameters.values()), ids)
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters.values()]).requires_grad_()
    pieces = flat.split([parameter.numel() for parameter in parameters.values()])
    views = {name: piece.view_as(parameters[name]) for name, piece in zip(parameters, pieces, strict=True)}
    run = functools.partial(_functional, model, views)
    assert equal(step(run, [flat], ids), (loss, [torch.cat([grad.flatten() for grad in grads])]))
    assert calls.take() == (2 * LAYERS, 2 * LAYERS)


def _functional(model: torch.nn.Module, parameters: dict[str, Tensor], *args, **kwargs):
    return torch.func.functional_call(model, parameters, args, kwargs)


@pytest.mark.unpoisoned
def test_compiled_blocks(model, calls):
    torch.compiler.reset()
    ids, parameters = tokens(), list(model.parameters())
    expected = step(model, parameters, ids)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    assert equal(step(model, parameters, ids), expected)
    assert calls.take() == (2 * LAYERS, 2 * LAYERS)
