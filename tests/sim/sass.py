# SPDX-License-Identifier: BSD-3-Clause
"""Machine code of a kernel, as NVIDIA's disassembler shows it: the loops around its matrix products."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from flash_attn3.build.options import pip_folders

LABEL = re.compile(r"^(\.L_\w+):")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)(.*)")
TARGET = re.compile(r"`\((\.L_\w+)\)")


def disassembler() -> Path | None:
    found = shutil.which("nvdisasm")
    pip = (folder / "bin" / "nvdisasm" for folder in pip_folders())
    return Path(found) if found else next(filter(Path.is_file, pip), None)


def disassemble(cubin: Path) -> list[tuple[str, int | None]]:
    """Opcodes in order, each with the index that it branches to."""
    text = subprocess.run([disassembler(), "-c", cubin], capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    found: list[tuple[str, str | None]] = []
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := INSTRUCTION.match(line):
            target = TARGET.search(instruction[2])
            found.append((instruction[1], target[1] if target else None))
    return [(opcode, labels.get(target)) for opcode, target in found]


def mma_loops(code: Sequence[tuple[str, int | None]], num_mma: int) -> list[list[str]]:
    """The innermost loops with at least so many matrix products, shortest first. A loop ends in a branch backwards."""
    loops = []
    for end, (opcode, start) in enumerate(code):
        if opcode.startswith("BRA") and start is not None and start <= end:
            body = [opcode for opcode, _ in code[start : end + 1]]
            if count(body, "HGMMA") >= num_mma and not count(body, "USETMAXREG"):
                loops.append((start, end, body))
    innermost: list[tuple[int, int, list[str]]] = []
    for start, end, body in sorted(loops, key=lambda loop: loop[1] - loop[0]):
        # What overlaps a shorter one is a loop around it, or the way back from a wait that was laid out elsewhere.
        if all(end < other[0] or other[1] < start for other in innermost):
            innermost.append((start, end, body))
    return [body for _, _, body in innermost]


def count(body: Sequence[str], name: str) -> int:
    """Instructions of this name, with any modifiers behind it."""
    return sum(opcode == name or opcode.startswith(f"{name}.") for opcode in body)
