# SPDX-License-Identifier: BSD-3-Clause
"""Logits, losses and gradients of tiny transformers models on `attn_implementation="fa3"`, against eager attention."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_models import (
    CASES,
    DECODERS,
    LAYERS,
    LENGTH,
    SMALL,
    VOCAB,
    copies,
    decoders,
    one_by_one,
    packed,
    packed_offsets,
    padded,
    real,
    tokens,
)

from flash_attn3.integrations import transformers as fa3

TOLERANCE = 1e-5
MATTERS = 1e-3

fa3.register()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", DECODERS)
def test_decoder_logits(name, case, calls):
    eager, ours = decoders(name, "eager", "fa3")
    ids, inputs = tokens(), CASES[case]()
    with torch.no_grad():
        expected, got = eager(ids, **inputs).logits, ours(ids, **inputs).logits
        assert calls.take() == (LAYERS, 0)
        assert got.isfinite().all()
        assert (got - expected)[real(inputs)].abs().max() <= TOLERANCE
        if case in ("left", "packed"):
            unmasked = ours(ids, position_ids=torch.arange(LENGTH)[None]).logits
            assert (unmasked - expected)[real(inputs)].abs().max() > MATTERS, "the case tests nothing"


@pytest.mark.parametrize("given", ["positions", "offsets"])
@pytest.mark.parametrize("name", DECODERS)
def test_packed_documents_do_not_see_each_other(name, given, calls):
    if (name, given) == ("gpt_oss", "positions"):
        pytest.skip("GPT-OSS does not hand position_ids to its mask, with any attn_implementation")
    eager, ours = decoders(name, "eager", "fa3")
    ids, inputs = tokens(1), packed(1)
    if given == "offsets":
        inputs |= packed_offsets()
    with torch.no_grad():
        assert (ours(ids, **inputs).logits - one_by_one(eager, ids)).abs().max() <= TOLERANCE
    assert calls.take() == (LAYERS, 0)


@pytest.mark.parametrize("name", DECODERS)
def test_unpadded_rows_do_not_depend_on_padding(name, calls):
    (ours,) = decoders(name, "fa3")
    ids, inputs = tokens(), padded("left")
    with torch.no_grad():
        alone = ours(ids[:1, 5:]).logits
        assert (ours(ids, **inputs).logits[:1, 5:] - alone).abs().max() <= TOLERANCE
    assert calls.take() == (2 * LAYERS, 0)


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("mistral", dict(sliding_window=None)),
        ("gemma2", dict(attn_logit_softcapping=None)),
        ("gpt_oss", dict(sliding_window=4)),
    ],
)
def test_features_matter_to_the_logits(name, feature):
    """Guards the comparisons above: without its window or softcap a model is another one."""
    (ours,) = decoders(name, "fa3")
    (other,) = decoders(name, "fa3", **feature)
    other.load_state_dict(ours.state_dict())
    ids = tokens()
    with torch.no_grad():
        assert (ours(ids).logits - other(ids).logits).abs().max() > MATTERS


ENCODERS = {
    "bert": ("Bert", dict(SMALL)),
    "modernbert": ("ModernBert", dict(SMALL, local_attention=8, global_attn_every_n_layers=2, pad_token_id=0)),
    "bart": (
        "Bart",
        dict(vocab_size=VOCAB, d_model=64, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=4)
        | dict(decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, init_std=0.1),
    ),
}


@pytest.mark.parametrize("case", ["plain", "left", "right"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_hidden_states(name, case, calls):
    family, options = ENCODERS[name]
    special = dict(cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)
    model_class, config_class = getattr(transformers, f"{family}Model"), getattr(transformers, f"{family}Config")
    eager, ours = copies(model_class, config_class, "eager", "fa3", **options, **special)
    ids, inputs = tokens(), CASES[case]()
    inputs.pop("position_ids", None)
    kept = real(inputs)
    if name == "bart":
        inputs["decoder_input_ids"], kept = ids[:, :9], torch.ones(2, 9, dtype=torch.bool)
    with torch.no_grad():
        expected, got = eager(ids, **inputs)[0], ours(ids, **inputs)[0]
    assert calls.take() == (3 * LAYERS if name == "bart" else LAYERS, 0)
    assert (got - expected)[kept].abs().max() <= TOLERANCE


def test_vit_hidden_states(calls):
    options = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    options.update(image_size=32, patch_size=8, initializer_range=0.1)
    eager, ours = copies(transformers.ViTModel, transformers.ViTConfig, "eager", "fa3", **options)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert (ours(image)[0] - eager(image)[0]).abs().max() <= TOLERANCE
    assert calls.take() == (LAYERS, 0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", DECODERS)
def test_training_step(name, case, calls):
    models = decoders(name, "eager", "fa3")
    ids, inputs = tokens(), CASES[case]()
    labels = ids.masked_fill(~real(inputs), -100)
    labels[:, 1:].masked_fill_(~real(inputs)[:, :-1], -100)  # the first real token is predicted by a padding row
    losses = []
    for model in models:
        losses.append(model.train()(ids, labels=labels, **inputs).loss)
        losses[-1].backward()
    assert calls.take() == (LAYERS, LAYERS)
    assert abs(losses[0] - losses[1]) <= TOLERANCE
    for (parameter, expected), (_, got) in zip(*(model.named_parameters() for model in models), strict=True):
        if expected.grad is not None or got.grad is not None:
            assert (got.grad - expected.grad).abs().max() <= TOLERANCE, parameter


@pytest.mark.parametrize("case", ["plain", "left"])
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bf16_is_as_good_as_eager(how, case, calls):
    eager, ours, exact = decoders("llama", "eager", "fa3", "eager")
    ids, inputs = tokens(), CASES[case]()
    if how == "weights":
        eager.bfloat16(), ours.bfloat16()
    with torch.no_grad():
        expected = exact(ids, **inputs).logits
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            errors = [(model(ids, **inputs).logits - expected)[real(inputs)].norm() for model in (eager, ours)]
    assert calls.take() == (LAYERS, 0)
    assert errors[1] <= 1.5 * errors[0]
