# SPDX-License-Identifier: BSD-3-Clause
"""How everything is timed: gate, warm-up, then all contestants of a case in turn, round after round.

Medians of interleaved rounds compare well even where the machine is noisy or its clock drifts, because noise and drift
hit all contestants alike.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import machine
import torch
from gate import Expected, judge
from torch import Tensor
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
L2_FLUSH_BYTES = 256 * 2**20  # five times the L2 of an H100
OURS = "flash_attn3"

Stopwatch = Callable[[Callable[[], Any], int], float]  # (run, iterations) -> seconds of one run
Row = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """How long to measure one case: rounds until the budget is spent, but at least and at most so many."""

    warmup: float = 0.5  # seconds, for each contestant
    sample: float = 0.01  # seconds; shorter runs are repeated within one sample
    least_rounds: int = 5
    most_rounds: int = 25
    budget: float = 12.0  # seconds


QUICK = Effort(warmup=0.05, sample=0.002, least_rounds=3, most_rounds=5, budget=1.0)


def on_cpu(run: Callable[[], Any], iterations: int) -> float:
    start = time.perf_counter()
    for _ in range(iterations):
        run()
    return (time.perf_counter() - start) / iterations


def on_one_thread(run: Callable[[], Any], iterations: int) -> float:
    """CPU time, which other processes of the machine do not lengthen; ratios of a single thread."""
    start = time.process_time()
    for _ in range(iterations):
        run()
    return (time.process_time() - start) / iterations


def on_gpu(run: Callable[[], Any], iterations: int) -> float:
    """Back to back between two events: the time of throughput."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(iterations):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / iterations


class OnColdGpu:
    """Each run after L2 was overwritten; the write also gives the host time to enqueue the run."""

    def __init__(self):
        self.flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, run: Callable[[], Any], iterations: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(iterations)]
        for start, end in events:
            self.flush.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


class Contestant(Protocol):
    name: str
    flops: int
    bytes: int

    def check(self, expected: list[Expected], dtype: torch.dtype) -> str | None: ...
    def sample(self, iterations: int) -> float: ...


@dataclass
class Local:
    """A contestant of this process. Without `outputs` it is a yardstick and has nothing to check."""

    name: str
    run: Callable[[], Any]
    stopwatch: Stopwatch
    outputs: Callable[[Any], dict[str, Tensor]] | None = None  # in the layout of the inputs
    flops: int = 0
    bytes: int = 0

    def check(self, expected: list[Expected], dtype: torch.dtype) -> str | None:
        return judge(self.outputs(self.run()), expected, dtype) if self.outputs else None

    def sample(self, iterations: int) -> float:
        return self.stopwatch(self.run, iterations)


@dataclass
class Entry:
    """Who takes part in a case, and the result they must come to; `absent`: who could not, and why."""

    contestants: list[Contestant]
    expected: list[Expected]
    dtype: torch.dtype
    absent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One cell of a table."""

    table: str
    row: str
    column: str
    measure: Callable[[Effort], list[Row]]

    @property
    def name(self) -> str:
        return f"{self.table}: {self.row}, {self.column}"


def timed(build: Callable[[], Entry]) -> Callable[[Effort], list[Row]]:
    """The measurement of a case whose contestants race."""

    def measure(effort: Effort) -> list[Row]:
        entry = build()
        refused = dict(entry.absent)
        for contestant in entry.contestants:
            if reason := refusal(contestant, entry):
                refused[contestant.name] = reason
        fit = [contestant for contestant in entry.contestants if contestant.name not in refused]
        rows = [summary(contestant, samples) for contestant, samples in zip(fit, race(fit, effort), strict=True)]
        return rows + [{"contestant": name, "status": reason} for name, reason in refused.items()]

    return measure


def refusal(contestant: Contestant, entry: Entry) -> str | None:
    """Why this contestant gets no figure, or None."""
    try:
        wrong = contestant.check(entry.expected, entry.dtype)
    except Exception as error:  # whatever a peer or a compiler raises, the others still run
        return unavailable(error)
    return f"wrong: {wrong}" if wrong else None


def unavailable(error: Exception) -> str:
    return f"unavailable: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def race(contestants: list[Contestant], effort: Effort) -> list[list[float]]:
    """Seconds of each sample of each contestant; who starts a round changes."""
    iterations = [warm_up(contestant, effort) for contestant in contestants]
    samples: list[list[float]] = [[] for _ in contestants]
    start = time.perf_counter()
    for number in range(effort.most_rounds):
        if number >= effort.least_rounds and time.perf_counter() - start > effort.budget:
            break
        for turn in range(len(contestants)):
            i = (turn + number) % len(contestants)
            samples[i].append(contestants[i].sample(iterations[i]))
    return samples


def warm_up(contestant: Contestant, effort: Effort) -> int:
    """The number of runs that fill a sample, once the contestant is warm."""
    start = time.perf_counter()
    seconds = contestant.sample(1)
    while time.perf_counter() - start < effort.warmup:
        seconds = contestant.sample(1)
    return min(1000, max(1, round(effort.sample / seconds)))


def summary(contestant: Contestant, samples: list[float]) -> Row:
    low, middle, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else samples * 3
    row = {
        "contestant": contestant.name,
        "status": "ok",
        "ms": middle * 1e3,
        "spread": (high - low) / middle,
        "samples": len(samples),
    }
    if contestant.flops:
        row["tflops"] = contestant.flops / middle / 1e12
    if contestant.bytes:
        row["gbps"] = contestant.bytes / middle / 1e9
    return row


def parser(description: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--quick", action="store_true", help="few small shapes, short samples: does it work, not how fast")
    p.add_argument("--list", action="store_true", help="name the cases and stop")
    p.add_argument("--only", default="", metavar="REGEX", help="cases whose name has a match of REGEX")
    p.add_argument("--seconds", type=float, default=Effort.budget, help="to spend on the rounds of one case")
    p.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="folder of the JSON file")
    return p


def main(bench: str, cases: list[Case], device: str, args: argparse.Namespace, **facts: Any) -> int:
    """0; 1 if a result of ours was wrong; 2 if the device is missing. The file names every case, measured or not."""
    chosen = {case.name: case for case in cases if re.search(args.only, case.name)}
    if args.list:
        print(*chosen, sep="\n")
        return 0
    if device == "cuda" and not torch.cuda.is_available():
        print(f"bench_{bench}: needs a CUDA GPU, and torch sees none", file=sys.stderr)
        return 2
    effort = QUICK if args.quick else Effort(budget=args.seconds)
    measured = {case.name: {"table": case.table, "row": case.row, "column": case.column, "rows": []} for case in cases}
    report = {"bench": bench, "quick": args.quick, "started": now(), **machine.describe(device), **facts}
    report["cases"] = list(measured.values())
    path = args.out / file_name(bench, report["device"], args.quick)
    with tqdm(chosen.items(), unit="case") as progress:
        for name, case in progress:
            progress.set_postfix_str(name)
            measured[name]["rows"] = rows = case.measure(effort)
            tqdm.write(in_words(case, rows))
            save(path, report | {"gpu_after": machine.gpu_state() if device == "cuda" else None})
    print(f"{path}: {len(chosen)} cases")
    wrong = any(row["contestant"].startswith(OURS) and row["status"].startswith("wrong") for row in all_rows(report))
    return int(wrong)


def all_rows(report: dict[str, Any]) -> list[Row]:
    return [row for case in report["cases"] for row in case["rows"]]


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def file_name(bench: str, device: str, quick: bool) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{bench}-{slug}{'-quick' if quick else ''}.json"


def save(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def in_words(case: Case, rows: list[Row]) -> str:
    width = max(len(row["contestant"]) for row in rows)
    return "\n".join([case.name, *(f"  {row['contestant']:{width}}  {figures(row)}" for row in rows)])


def figures(row: Row) -> str:
    if row["status"] != "ok":
        return row["status"]
    units = {"ms": "{:10.3f} ms", "spread": "+-{:4.0%}", "tflops": "{:8.2f} TFLOP/s", "gbps": "{:8.1f} GB/s"}
    units |= {"mib": "{:10.1f} MiB"}
    return "  ".join(form.format(row[name]) for name, form in units.items() if name in row)
