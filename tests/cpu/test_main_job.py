# SPDX-License-Identifier: BSD-3-Clause
"""`python -m flash_attn3`: passes on correct attention, says so, and fails on wrong attention."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flash_attn3 import __main__ as command
from flash_attn3 import api, cache_api, demo

SMALL = ["--device", "cpu", "--steps", "6", "--tokens", "6"]
SMALLEST = ["--device", "cpu", "--steps", "2", "--tokens", "3"]
CHECKS = ("gradients before training", "loss curves", "learning", "gradients after training", "generated tokens")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other take minutes where other processes hold the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_passes_and_leaves_a_plot(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "flash_attn3", *SMALL, "--out", str(tmp_path / "new")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    for name in CHECKS:
        assert f"[ok] {name}: " in result.stdout
    assert "All checks passed." in result.stdout
    assert "6 steps" in result.stdout and "48 of 48 equal" in result.stdout
    assert "step/s" in result.stderr, "no progress bar"
    assert (tmp_path / "new" / "flash_attn3.png").read_bytes().startswith(b"\x89PNG")
    for line in ("training  flash_attn3", "decoding  with cache"):
        assert line in result.stdout


@pytest.mark.parametrize(
    ("wrong", "failing"),
    [
        ({"causal": False}, "gradients before training"),
        ({"softmax_scale": 0.9 * 32**-0.5}, "gradients before training"),
        ({"window_size": (200, 0)}, "gradients before training"),
    ],
    ids=str,
)
def test_fails_on_wrong_training_attention(monkeypatch, tmp_path, capsys, wrong: dict, failing: str) -> None:
    right = api.flash_attn_func
    wrapped = functools.wraps(right)(lambda *args, **kwargs: right(*args, **kwargs | wrong))
    monkeypatch.setattr(api, "flash_attn_func", wrapped)
    assert command.main([*SMALLEST, "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert f"[FAILED] {failing}" in out
    assert "All checks passed" not in out and "FAILED: " in out.splitlines()[-1]


@pytest.mark.parametrize("wrong", [{"rotary_interleaved": True}, {"window_size": (8, 0)}], ids=str)
def test_fails_on_wrong_decoding(monkeypatch, tmp_path, capsys, wrong: dict) -> None:
    right = cache_api.flash_attn_with_kvcache
    monkeypatch.setattr(cache_api, "flash_attn_with_kvcache", lambda *a, **kwargs: right(*a, **kwargs | wrong))
    assert command.main([*SMALLEST, "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if "[FAILED]" in line] and "[FAILED] generated tokens" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tokens", "100000"], "--tokens 100000; expected at most"),
        (["--backend", "hopper"], "hopper: serves CUDA tensors"),
    ],
)
def test_what_cannot_run_says_why(tmp_path, capsys, arguments: list[str], expected: str) -> None:
    assert command.main(["--device", "cpu", *arguments, "--out", str(tmp_path)]) == 2
    assert expected in capsys.readouterr().err


def test_missing_extras_are_named(monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert command.main(SMALL) == 2
    error = capsys.readouterr().err
    assert "matplotlib and tqdm missing; pip install 'flash_attn3[demo]'" in error
