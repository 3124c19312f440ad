# SPDX-License-Identifier: BSD-3-Clause
"""`python -m flash_attn3 info` tells what is there, on machines where little is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flash_attn3
from flash_attn3 import env, info
from flash_attn3.build import nvcc

ROOT = Path(__file__).parents[2]
SECTIONS = {"version", "backends", "gpus", "versions", "nvcc", "caches", "environment"}


def run_info(*options: str, **environment: str) -> str:
    command = [sys.executable, "-m", "flash_attn3", "info", *options]
    variables = {"PATH": "/nowhere", "PYTHONPATH": str(ROOT)} | environment
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=variables)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_json_without_home_compiler_or_gpu() -> None:
    facts = json.loads(run_info("--json", CUDA_VISIBLE_DEVICES=""))
    assert facts.keys() == SECTIONS
    assert facts["version"] == flash_attn3.__version__
    assert facts["backends"].keys() == set(env.BACKENDS)
    assert facts["backends"]["cpu"] == {"available": True, "reason": None}
    for backend in facts["backends"].values():
        assert backend["available"] == (backend["reason"] is None)
    assert facts["gpus"] == []
    assert facts["versions"]["driver"] is None


def test_text_names_every_section_and_reason() -> None:
    text = run_info(CUDA_VISIBLE_DEVICES="", FLASH_ATTN3_CHECK="1")
    for title in SECTIONS - {"version", "gpus"} | {"GPUs"}:
        assert f"\n{title}\n" in text
    assert "serves CUDA tensors" in text
    assert "FLASH_ATTN3_CHECK" in text and "  1  (" in text
    assert "torch sees no CUDA device" in text


def test_environment_lists_what_the_package_declares() -> None:
    assert {variable.name for variable in env.VARIABLES} <= info.environment().keys()


def test_every_variable_read_is_declared() -> None:
    """The sources name no environment variable of ours that `info` does not list."""
    sources = [path.read_text() for path in (ROOT / "flash_attn3").rglob("*.py")]
    named = {name for text in sources for name in re.findall(r"FLASH_ATTN3_[A-Z_]+", text)}
    assert named <= info.environment().keys()


def test_cache_contents(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert info.folder(env.kernel_cache())["files"] == 0
    (tmp_path / "flash_attn3" / "abi").mkdir(parents=True)
    (tmp_path / "flash_attn3" / "abi" / "kernel.cubin").write_bytes(b"x" * 100)
    found = info.folder(env.kernel_cache())
    assert found == {"path": str(tmp_path / "flash_attn3"), "files": 1, "bytes": 100, "contents": ["abi"]}


def test_no_home(monkeypatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(env, "home", lambda: None)
    assert info.folder(env.kernel_cache())["path"] is None
    assert "no HOME" in info.describe_folder(info.folder(None))


@pytest.mark.skipif(os.name != "posix", reason="an executable file")
def test_nvcc_is_found_where_it_is(tmp_path, monkeypatch) -> None:
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert compiler in nvcc.candidates()
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(compiler.parent))
    assert compiler in nvcc.candidates()
