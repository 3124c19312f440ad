# SPDX-License-Identifier: BSD-3-Clause
"""Budgets that keep the code readable: lines of a file, lines of a function, columns of a line."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 400
MAX_KERNEL_FILE_LINES = 500
MAX_FUNCTION_LINES = 150
MAX_COLUMNS = 120
RETIRED_WORDS = ("nheads", "n_kv_heads", "head_k", "TODO", "FIXME", "XXX")
FOLDERS = ("flash_attn3", "csrc", "hopper", "benchmarks", "tests")
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh"}
FILES = sorted(
    path.relative_to(ROOT)
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in SUFFIXES and "__pycache__" not in path.parts
)


def is_kernel(path: Path) -> bool:
    return path.suffix in {".cu", ".cuh"} or "triton" in path.parts


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file(path: Path) -> None:
    text = (ROOT / path).read_text()
    lines = text.splitlines()
    assert len(lines) <= (MAX_KERNEL_FILE_LINES if is_kernel(path) else MAX_FILE_LINES)
    assert not [number for number, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS]
    assert "SPDX-License-Identifier: BSD-3-Clause" in lines[0] if lines else True
    if path != Path(__file__).relative_to(ROOT):
        assert not [word for word in RETIRED_WORDS if re.search(rf"{word}(?![a-z])", text)]
    if path.suffix == ".py" and not is_kernel(path):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{node.name} is too long"
