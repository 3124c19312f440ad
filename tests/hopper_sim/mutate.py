# SPDX-License-Identifier: BSD-3-Clause
"""Mutation testing: change one synchronisation of a kernel at a time, and see whether the simulator notices.

`mutants()` lists the changes of a PTX text, `policies()` the schedules that a kernel is run under, and `survey()` runs
every mutant until one schedule ends in an alarm, a hang or a wrong result. A warning is an alarm too: the kernel itself
should give none. Those that survive have to stand, with the reason, in mutants/KERNEL.txt.

A mutant is named after what is changed and the text of its source line, not its number: the list outlives edits of
other lines.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .driver import Driver, Instruction

FOLDER = Path(__file__).parent / "mutants"
HARDWARE_LAYER = "sm90"  # folder of functions of one instruction each
CLASSES = ("equivalent", "not executed", "not visible in PTX", "redundant", "unknown")

# Deletes a whole instruction.
DELETED = (
    r"fence\.proxy\.async|fence\.mbarrier_init|fence\.(acq_rel|sc)|membar",
    r"bar(rier)?\.(cta\.)?(sync|arrive)|bar\.warp\.sync|barrier\.cluster\.(arrive|wait)",
    r"wgmma\.(fence|commit_group|wait_group)",
    r"mbarrier\.(init|arrive)|cp\.async(\.bulk)?\.(commit_group|wait_group|wait_all)",
    r"setmaxnreg|griddepcontrol",
)
DELETE = re.compile("|".join(DELETED))

# Literals of 64 bits with the fields of a swizzled matrix descriptor.
DESCRIPTOR = re.compile(r"-?\b\d{16,20}\b")

# A prepared kernel: runs once under the options in force, and says whether its result was right.
Run = Callable[[], bool]
Prepare = Callable[[str], Run]


@dataclass(frozen=True)
class Mutant:
    change: str  # "delete bar.sync"
    place: str  # the text of the source line
    copy: int  # of this line, which inlining and unrolling repeat, from 1 on
    line: int  # of the PTX
    ptx: str

    @property
    def name(self) -> str:
        return f"{self.change} at `{self.place}` #{self.copy}"


@dataclass
class Survey:
    caught: dict[str, str] = field(default_factory=dict)  # mutant -> the policy that caught it and how
    survivors: list[Mutant] = field(default_factory=list)


def operands(text: str) -> tuple[str, list[str]]:
    """Guard with opcode, and the operands split at the commas outside brackets."""
    match = re.match(r"((?:@\S+\s+)?\S+)\s*(.*)", text, re.DOTALL)
    assert match
    return match[1], re.split(r",\s*(?![^\[{]*[\]}])", match[2]) if match[2] else []


def replaced(text: str, index: int, change: str, amount: int) -> str:
    """The instruction with `change` (add.u32, xor.b32, shr.u32) applied to one 32-bit operand."""
    head, args = operands(text)
    block = f"{{ .reg .b32 changed; {change} changed, {args[index]}, {amount}; {head} "
    return block + ", ".join([*args[:index], "changed", *args[index + 1 :]]) + "; }"


def weakened(text: str) -> Iterator[tuple[str, str]]:
    """Pairs of a name and the text that stands for `text` and its semicolon."""
    head, args = operands(text)
    opcode = head.split()[-1]
    if ".try_wait" in opcode or ".test_wait" in opcode:
        guard = head.removesuffix(opcode)
        yield "pass", f"{guard}setp.eq.u32 {args[0]}, 0, 0;"
        if ".parity" in opcode:
            yield "flip parity of", replaced(text, 2, "xor.b32", 1)
    elif "wait_group" in opcode:
        yield "allow one more in", f"{head} {int(args[0]) + 1};"
        if ".bulk" in opcode and ".read" not in opcode:
            yield "only wait for reads in", f"{head}.read {args[0]};"
    elif opcode.startswith("mbarrier.init"):
        yield "count + 1 in", replaced(text, 1, "add.u32", 1)
        yield "count - 1 in", replaced(text, 1, "add.u32", -1)
    elif ".expect_tx" in opcode:
        last = len(args) - 1
        yield "16 bytes more in", replaced(text, last, "add.u32", 16)
        yield "16 bytes less in", replaced(text, last, "add.u32", -16)
        yield "half the bytes in", replaced(text, last, "shr.u32", 1)
    elif re.match(r"bar(rier)?\.(cta\.)?(sync|arrive)", opcode) and len(args) == 2:
        yield "count + 32 in", replaced(text, 1, "add.u32", 32)
        yield "count - 32 in", replaced(text, 1, "add.u32", -32)
    elif re.match(r"bar(rier)?\.(cta\.)?red\.(or|and)\.pred", opcode):
        yield "no barrier in", f"mov.pred {args[0]}, {args[-1]};"
    elif ".multicast::cluster" in opcode:
        yield (
            "first block left out of",
            f"{{ .reg .b16 some; and.b16 some, {args[3]}, -2; {head} "
            + ", ".join([*args[:3], "some", *args[4:]])
            + "; }",
        )
    for order in (".acquire", ".release"):
        if re.match(r"(ld|st|atom|red)\.", opcode) and order in opcode:
            yield f"no {order} in", text.replace(order, ".relaxed") + ";"


def halved_stride(text: str) -> str | None:
    """The instruction with half the stride in a constant that is a matrix descriptor, if it has one."""
    for match in DESCRIPTOR.finditer(text):
        value = int(match[0]) % (1 << 64)
        stride = value >> 32 & 0x3FFF
        if value >> 62 and stride > 1 and not value >> 46 & 0xFFFF & ~0xC000:
            changed = value & ~(0x3FFF << 32) | stride // 2 << 32
            return text.replace(match[0], str(changed - (1 << 64) if match[0][0] == "-" else changed)) + ";"
    return None


def changes(instructions: list[Instruction]) -> Iterator[tuple[str, Instruction, int, str]]:
    """Name, first instruction, end of the text that goes, and the text that comes."""
    for n, instruction in enumerate(instructions):
        opcode = operands(instruction.text)[0].split()[-1]
        end = instruction.end + 1  # with the semicolon
        if DELETE.match(opcode):
            yield f"delete {opcode}", instruction, end, ""
        for name, text in weakened(instruction.text):
            yield f"{name} {opcode}", instruction, end, text
        if text := halved_stride(instruction.text):
            yield "half the stride of a descriptor", instruction, end, text
        following = instructions[n + 1] if n + 1 < len(instructions) else None
        if opcode.startswith("fence.proxy.async") and following and re.match(r"bar(rier)?\.sync", following.text):
            swapped = f"{following.text}; {instruction.text};"
            yield f"{opcode} after the barrier", instruction, following.end + 1, swapped


def mutants(driver: Driver, ptx: str, kernel: str, sources: Path) -> list[Mutant]:
    """Every change of a synchronisation of one kernel, whose source files lie in `sources`."""
    instructions = [i for i in driver.instructions(ptx) if i.kernel == kernel]
    copies: Counter[tuple[str, str]] = Counter()
    found = []
    for change, first, end, text in changes(instructions):
        line = place(first.source, sources)
        copies[change, line] += 1
        breaks = "\n" * ptx[first.begin : end].count("\n")  # what follows keeps its line
        changed = ptx[: first.begin] + text.replace("\n", " ") + breaks + ptx[end:]
        found.append(Mutant(change, line, copies[change, line], first.line, changed))
    return found


def place(chain: str, sources: Path) -> str:
    """The text of the innermost line, of those inlined into each other, that is not part of the hardware layer."""
    for entry in chain.split(" < "):
        name, _, number = entry.rpartition(":")
        file = sources / name
        if file.is_relative_to(sources) and file.is_file() and file.parent.name != HARDWARE_LAYER:
            return file.read_text().splitlines()[int(number) - 1].strip()
    return "?"


def executed_lines(driver: Driver, run: Run) -> set[int]:
    driver.configure("reset,coverage=1")
    run()
    launches = driver.report()["launches"]
    return {int(line) for launch in launches for line, count in launch["statistics"]["coverage"].items() if count}


def policies(driver: Driver, run: Run, warps: int) -> list[str]:
    """The standard schedules: some of them depend on the sites of asynchronous copies that the kernel runs."""
    driver.reset()
    run()
    launches = driver.report()["launches"]
    sites = sorted({int(line) for launch in launches for line in launch["statistics"]["async_sites"]})
    budget = 50 * sum(launch["statistics"]["warp_instructions"] for launch in launches) + 100_000
    groups = [0xF << first for first in range(0, warps, 4)]
    starved = [*groups, *(sum(groups) & ~group for group in groups), 1, 1 << warps - 1]
    chosen = [
        "policy=eager",
        "policy=random,seed=1",
        "policy=lazy,order=newest",
        "policy=lazy,order=oldest",
        "policy=random,seed=2,quantum=20,elect=random",
        "first_try_fails=1",
        "late=reads",
        "late=writes",
        "elect=last",
        "cta_order=backward,coresident=2",
        *(f"delay={site}" for site in sites),
        *(f"starve={mask}" for mask in starved[:8]),
    ]
    return [f"reset,{policy},quiet=1,budget={budget}" for policy in chosen]


def alarm(driver: Driver, run: Run, policy: str) -> str | None:
    """What one run under a policy ends in, if not in the right result."""
    driver.reset()
    driver.configure(policy)
    try:
        right = run()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    warnings = [warning for launch in driver.report()["launches"] for warning in launch["warnings"]]
    if right and warnings:
        return f"warning {warnings[0]['kind']}: {warnings[0]['message']}"
    return None if right else "wrong result"


def survey(driver: Driver, prepare: Prepare, changed: Iterable[Mutant], schedules: list[str]) -> Survey:
    result = Survey()
    for mutant in changed:
        try:
            run = prepare(mutant.ptx)
        except RuntimeError as error:
            result.caught[mutant.name] = f"load: {error}"
            continue
        for policy in schedules:
            if found := alarm(driver, run, policy):
                result.caught[mutant.name] = f"{policy}: {found}"
                break
        else:
            result.survivors.append(mutant)
    return result


class Known:
    """The survivors in mutants/KERNEL.txt: "class | mutant | proof"; without "#copy" a line is for all copies."""

    def __init__(self, kernel: str) -> None:
        path = FOLDER / f"{kernel}.txt"
        self.classes: dict[str, str] = {}
        for line in path.read_text().splitlines():
            if line and not line.startswith("#"):
                group, _, rest = line.partition(" | ")
                name, _, proof = rest.rpartition(" | ")
                if group not in CLASSES or not name or not proof:
                    raise ValueError(f"{path}: a class of {CLASSES}, a mutant and a proof are needed: {line}")
                self.classes[name] = group

    def group(self, mutant: Mutant) -> str | None:
        return self.classes.get(mutant.name) or self.classes.get(self.line(mutant))

    def unused(self, mutants: Iterable[Mutant]) -> set[str]:
        """Entries for which there is no mutant any more."""
        return self.classes.keys() - {name for mutant in mutants for name in (mutant.name, self.line(mutant))}

    @staticmethod
    def line(mutant: Mutant) -> str:
        return mutant.name.rpartition(" #")[0]
