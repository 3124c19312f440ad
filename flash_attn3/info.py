# SPDX-License-Identifier: BSD-3-Clause
"""What is installed here, which backends work, and why the others do not: `python -m flash_attn3 info`.

Nothing here needs a GPU, a driver, a compiler, HOME or a writable disk; what is missing is reported as missing.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import __version__, env, extension, runtime, variants
from .build import find, sources, toolchain
from .errors import FlashAttn3Error, ToolchainError

# Read by the package, but owned by others, so they are not in `env.VARIABLES`.
FOREIGN_VARIABLES = {
    "TRITON_CACHE_DIR": "compiled Triton kernels",
    "TRITON_INTERPRET": "1 runs Triton kernels on the CPU, for tests",
}


def collect() -> dict[str, Any]:
    """Everything, as plain JSON values."""
    return {
        "version": __version__,
        "backends": {name: {"available": why is None, "reason": why} for name, why in runtime.backends().items()},
        "gpus": gpus(),
        "versions": versions(),
        "extension": native(),
        "compiler": compiler(),
        "caches": {"flash_attn3": folder(env.kernel_cache()), "triton": folder(triton_cache())},
        "environment": environment(),
    }


def gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    return [
        {
            "name": device.name,
            "capability": f"{device.major}.{device.minor}",
            "memory_gib": round(device.total_memory / 2**30, 1),
            "multiprocessors": device.multi_processor_count,
        }
        for device in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]


def versions() -> dict[str, str | None]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": distribution_version("triton"),
        "driver": nvidia_driver(),
    }


def distribution_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def nvidia_driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(result.stdout.split()), None)


def native() -> dict[str, Any]:
    """`_C`, and the driver that it opens."""
    if reason := extension.unavailable_reason():
        return {"path": None, "reason": reason, "cuda": None, "driver": None, "driver_reason": None}
    module = extension.load()
    driver = driver_reason = None
    try:
        driver = f"{module.driver_path()}, version {dotted(module.driver_version())}"
    except FlashAttn3Error as error:
        driver_reason = str(error)
    state = {"path": module.__file__, "reason": None, "cuda": dotted(module.cuda_version)}
    return state | {"driver": driver, "driver_reason": driver_reason}


def dotted(version: int) -> str:
    """13.0 of 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"


def compiler() -> dict[str, Any]:
    """What would compile a kernel at its first use, and how many kernels are compiled."""
    every = variants.all_variants()
    compiled = sum(find(variant) is not None for variant in every)
    state = {"path": None, "reason": None, "kernels": len(every), "compiled": compiled}
    try:
        sources.cutlass_folder()
        return state | {"path": str(toolchain.find().path)}
    except ToolchainError as error:
        return state | {"reason": str(error)}


def triton_cache() -> Path | None:
    if path := os.environ.get("TRITON_CACHE_DIR"):
        return Path(path)
    return (home := env.home()) and home / ".triton" / "cache"


def folder(path: Path | None) -> dict[str, Any]:
    """Path, number of files, their size, and the names at the top; a missing folder is an empty one."""
    if path is None:
        return {"path": None, "files": 0, "bytes": 0, "contents": []}
    sizes = [size for file in path.rglob("*") if (size := file_size(file)) is not None]
    contents = sorted(entry.name for entry in path.glob("*"))
    return {"path": str(path), "files": len(sizes), "bytes": sum(sizes), "contents": contents}


def file_size(path: Path) -> int | None:
    """None for what is no file, or vanished while we looked."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def environment() -> dict[str, dict[str, str | None]]:
    own = {variable.name: variable.purpose for variable in (*env.VARIABLES, env.PREBUILD)}
    purposes = own | env.PATHS | FOREIGN_VARIABLES
    return {name: {"value": os.environ.get(name), "purpose": why} for name, why in purposes.items()}


def as_json() -> str:
    return json.dumps(collect(), indent=2)


def as_text() -> str:
    facts = collect()
    sections = {
        "backends": [(name, state["reason"] or "available") for name, state in facts["backends"].items()],
        "GPUs": [(gpu["name"], describe_gpu(gpu)) for gpu in facts["gpus"]] or [("none", "torch sees no CUDA device")],
        "versions": [(name, value or "not found") for name, value in facts["versions"].items()],
        "extension": describe_extension(facts["extension"]),
        "compiler": describe_compiler(facts["compiler"]),
        "caches": [(name, describe_folder(cache)) for name, cache in facts["caches"].items()],
        "environment": [
            (name, f"{'unset' if entry['value'] is None else entry['value']}  ({entry['purpose']})")
            for name, entry in facts["environment"].items()
        ],
    }
    width = max(len(name) for rows in sections.values() for name, _ in rows)
    lines = [f"flash_attn3 {facts['version']}"]
    for title, rows in sections.items():
        lines += ["", title, *(f"  {name:{width}}  {value}" for name, value in rows)]
    return "\n".join(lines)


def describe_gpu(gpu: dict[str, Any]) -> str:
    return f"capability {gpu['capability']}, {gpu['multiprocessors']} SMs, {gpu['memory_gib']} GiB"


def describe_extension(state: dict[str, Any]) -> list[tuple[str, str]]:
    if state["reason"]:
        return [("missing", state["reason"])]
    return [
        ("found", f"{state['path']}, built with the headers of CUDA {state['cuda']}"),
        ("driver", state["driver"] or state["driver_reason"]),
    ]


def describe_compiler(state: dict[str, Any]) -> list[tuple[str, str]]:
    found = ("found", state["path"]) if state["path"] else ("none", state["reason"])
    return [found, ("kernels", f"{state['compiled']} of {state['kernels']} compiled")]


def describe_folder(cache: dict[str, Any]) -> str:
    if cache["path"] is None:
        return "none: no HOME"
    return f"{cache['path']}: {cache['files']} files, {cache['bytes'] / 2**20:.1f} MiB"
