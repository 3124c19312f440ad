# SPDX-License-Identifier: BSD-3-Clause
"""Where and on what a figure was measured."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import flash_attn3
from flash_attn3 import info

ROOT = Path(__file__).parents[1]
GPU_STATE = ("clocks.sm", "clocks.max.sm", "temperature.gpu", "power.draw", "power.limit")


def output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def commit() -> str | None:
    """The commit, marked where code differs from it."""
    head = output_of("git", "rev-parse", "HEAD")
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no", "--", "flash_attn3", "csrc", "hopper")
    return f"{head}-modified" if head and changed else head


def processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} {'thread' if threads == 1 else 'threads'}"


def gpu_state() -> dict[str, str] | None:
    """Clocks, temperature and power of this moment; None without nvidia-smi."""
    found = output_of("nvidia-smi", f"--query-gpu={','.join(GPU_STATE)}", "--format=csv,noheader")
    return dict(zip(GPU_STATE, found.splitlines()[0].split(", "), strict=True)) if found else None


def describe(device: str) -> dict[str, Any]:
    return {
        "device": device_name(device),
        "commit": commit(),
        "flash_attn3": flash_attn3.__version__,
        **info.versions(),
        "gpu_before": gpu_state() if device == "cuda" else None,
    }
