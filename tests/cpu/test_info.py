# SPDX-License-Identifier: BSD-3-Clause
"""`python -m flash_attn3 info` tells what is there, on machines where little is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import flash_attn3
from flash_attn3 import env, extension, info, variants
from flash_attn3.build import nvcc, toolchain
from flash_attn3.errors import ToolchainError

ROOT = Path(__file__).parents[2]
SECTIONS = {"version", "backends", "gpus", "versions", "extension", "compiler", "caches", "environment"}


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


def test_compiler_that_would_be_used(monkeypatch) -> None:
    monkeypatch.setattr(toolchain, "find", lambda: nvcc.Nvcc(Path("/opt/bin/nvcc"), Path("/opt/bin/ptxas"), "13.0"))
    monkeypatch.setattr(info, "find", lambda variant: variant if variant is variants.all_variants()[0] else None)
    state = info.compiler()
    assert (state["path"], state["reason"]) == ("/opt/bin/nvcc", None)
    assert (state["compiled"], state["kernels"]) == (1, len(variants.all_variants()))
    assert "/opt/bin/nvcc" in info.as_text() and f"1 of {state['kernels']} compiled" in info.as_text()


def test_no_compiler(monkeypatch) -> None:
    def find() -> None:
        raise ToolchainError("looked everywhere")

    monkeypatch.setattr(toolchain, "find", find)
    assert info.compiler()["reason"] == "looked everywhere"
    assert "looked everywhere" in info.as_text()


def test_extension_and_driver(monkeypatch) -> None:
    def opened() -> str:
        raise ToolchainError("no libcuda")

    module = SimpleNamespace(__file__="/x/_C.so", cuda_version=13020, driver_version=lambda: 12090)
    monkeypatch.setattr(extension, "unavailable_reason", lambda: None)
    monkeypatch.setattr(extension, "load", lambda: module)
    module.driver_path = lambda: "libcuda.so.1"
    assert info.native()["driver"] == "libcuda.so.1, version 12.9"
    assert "/x/_C.so, built with the headers of CUDA 13.2" in info.as_text()
    module.driver_path = opened
    assert (info.native()["driver"], info.native()["driver_reason"]) == (None, "no libcuda")
    assert "no libcuda" in info.as_text()


def test_installed_without_the_extension(tmp_path, monkeypatch) -> None:
    def missing(*args: object) -> None:
        raise ImportError("No module named 'flash_attn3._C'")

    monkeypatch.setattr(extension.importlib, "import_module", missing)
    monkeypatch.setattr(extension, "MISSING", tmp_path / "_C.missing.txt")
    extension.unavailable_reason.cache_clear()
    assert "cannot be loaded (No module named 'flash_attn3._C')" in info.native()["reason"]
    (tmp_path / "_C.missing.txt").write_text("no g++\n")
    extension.unavailable_reason.cache_clear()
    reason = info.native()["reason"]
    extension.unavailable_reason.cache_clear()
    assert reason == "flash_attn3 was installed without _C (no g++); mend that and install it again"
    assert ("missing", reason) in info.describe_extension({"reason": reason})
    with pytest.raises(ToolchainError, match="installed without _C"):
        extension.load()
