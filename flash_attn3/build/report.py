# SPDX-License-Identifier: BSD-3-Clause
"""What the compiler says of a kernel: its log is a test."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_STACK = 24  # bytes; an index on the stack outside of the loops costs nothing

# By text, since the codes move between versions: serialised, injected or ill-formed wgmma, registers not reallocated.
WARNINGS = re.compile(r"\(C75\d\d\)|'?setmaxnreg'? ignored|wgmma.*serializ|is injected|ill-formed", re.IGNORECASE)


@dataclass(frozen=True)
class Report:
    """Resources of one kernel, and what is wrong with them."""

    seconds: float
    registers: int
    spill_bytes: int
    stack_bytes: int
    complaints: tuple[str, ...]


def parse(log: str, seconds: float) -> Report:
    """From the log of `ptxas -v`, or of NVRTC with the same option."""

    def largest(pattern: str) -> int:
        return max(map(int, re.findall(pattern, log)), default=0)

    stack = largest(r"(\d+) bytes stack frame")
    spills = largest(r"(\d+) bytes spill stores") + largest(r"(\d+) bytes spill loads")
    complaints = [line.strip() for line in log.splitlines() if WARNINGS.search(line)]
    if spills:
        complaints.append(f"{spills} bytes spilled")
    if stack > MAX_STACK:
        complaints.append(f"{stack} bytes of stack, more than {MAX_STACK}")
    return Report(round(seconds, 2), largest(r"Used (\d+) registers"), spills, stack, tuple(complaints))
