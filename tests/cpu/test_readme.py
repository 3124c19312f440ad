# SPDX-License-Identifier: BSD-3-Clause
"""What README.md and CONTRIBUTING.md say is so: their code runs, their files exist, their tables are up to date."""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest
import readme_table
import support
import torch

from flash_attn3 import runtime

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")}


def blocks(page: str, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return [code for found, code in fenced if found == language]


SYSTEMS = ("SGLang", "vLLM", "DeepSpeed-FastGen", "gpt-fast", "S-LoRA")


def serving_engines(page: str = README) -> list[str]:
    """The code of the section for serving engines, a block for each system."""
    (section,) = re.findall(r"^## For serving engines\n(.*?)^## ", page, re.DOTALL | re.MULTILINE)
    assert re.findall(r"^\*\*([\w-]+)\.\*\*", section, re.MULTILINE) == list(SYSTEMS)
    return blocks(section, "python")


@pytest.mark.unpoisoned  # Dynamo would trace into the patched torch.empty
def test_python_blocks_run_one_after_the_other() -> None:
    first, *others = [code for code in blocks(README, "python") if "integrations" not in code]
    names: dict = {}
    exec(first, names)
    assert names["out"].shape == (2, 1024, 16, 64)
    for code in others:
        names |= {name: torch.full((), torch.nan) for name in ("out", "buffer")}
        exec(code, names)
        assert names["out"].isfinite().all() or names["buffer"].isfinite().all()
    assert set(serving_engines()) < set(others) and len(serving_engines()) == len(SYSTEMS)
    assert names["lengths"].tolist() == [3, 3]
    assert names["cache_k"][:, :3].ne(0).any(-1).all() and not names["cache_k"][:, 3:].any()


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    text = PAGES[page]
    named = re.findall(r"(?:tests|benchmarks|flash_attn3)/[\w/.]+", text) + re.findall(r"\bin `(\w+\.py)`", text)
    for path in {name.rstrip("./") for name in named} - {"benchmarks/results"}:
        assert (ROOT / path).exists() or (ROOT / "flash_attn3" / path).exists(), path


def test_layers_are_where_the_readme_says() -> None:
    (way,) = [block for block in blocks(README, "") if "AttentionProblem" in block]
    for path in re.findall(r"\w+\.py|\b\w+/", way):
        assert (ROOT / "flash_attn3" / path).exists(), path


def test_tables_are_up_to_date() -> None:
    pytest.importorskip("triton")
    assert readme_table.write(README, readme_table.reports(readme_table.RESULTS)) == README, (
        "run python benchmarks/readme_table.py"
    )


def test_support_is_what_the_backend_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported_reason(p, needs_grad: bool) -> str | None:
        return "has no softcap" if p.softcap else "has no gradient" if needs_grad else None

    monkeypatch.setitem(runtime._loaded, "cpu", types.SimpleNamespace(unsupported_reason=unsupported_reason))
    assert support.cell("cpu", (support.dense(), support.ragged())) == "forward"
    assert support.cell("cpu", (support.dense(softcap=3.0),)) == "no"
    with pytest.raises(ValueError, match="split the row"):
        support.cell("cpu", (support.dense(), support.dense(softcap=3.0)))
    monkeypatch.setattr(runtime._loaded["cpu"], "unsupported_reason", lambda p, needs_grad: None)
    assert support.cell("cpu", (support.dense(),)) == "forward, backward"
    assert support.cell("cpu", (support.cached(),)) == "forward"


def test_the_table_of_support_reads_no_data() -> None:
    for asks in support.FEATURES.values():
        for ask in asks:
            p = ask(False)
            assert all(x.is_meta for x in vars(p).values() if isinstance(x, torch.Tensor))
