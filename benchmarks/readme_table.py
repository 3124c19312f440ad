# SPDX-License-Identifier: BSD-3-Clause
"""Write the tables of a README from the JSON files of the benchmarks and from the backends themselves.

Each table stands between `<!-- table:NAME -->` and `<!-- /table -->`, where NAME is a benchmark or `support`. A cell is
never typed by hand; what was not measured reads `not measured`. Files of `--quick` runs are not used.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import support
from harness import OURS, RESULTS

NOT_MEASURED = "not measured"
MARKED = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
YARDSTICKS = ("cuBLAS", "copy")

Report = dict[str, Any]
Rows = list[dict[str, Any]]


def reports(folder: Path) -> dict[str, list[Report]]:
    """benchmark -> its reports, one for each device."""
    found: dict[str, list[Report]] = {}
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text())
        if not report["quick"]:
            found.setdefault(report["bench"], []).append(report)
    return found


def best(rows: Rows, figure: str, ours: bool) -> float | None:
    """The best of ours, or of all others."""
    better = min if figure in ("ms", "mib") else max
    values = [
        row[figure]
        for row in rows
        if figure in row and row["contestant"].startswith(OURS) == ours and row["contestant"] not in YARDSTICKS
    ]
    return better(values) if values else None


def versus(figure: str, form: str) -> Callable[[Rows], str]:
    """The figure of ours, and in brackets its ratio to the best peer's."""

    def cell(rows: Rows) -> str:
        ours, theirs = best(rows, figure, ours=True), best(rows, figure, ours=False)
        if ours is None:
            return NOT_MEASURED
        return form.format(ours) + (f" ({ours / theirs:.2f})" if theirs else "")

    return cell


def faster(rows: Rows) -> str:
    """How many times faster than the peer, or that the peer has no figure; for memory, MiB of both."""
    extra = [best(rows, "mib", ours) for ours in (True, False)]
    if None not in extra:
        return "{:.0f} MiB, SDPA {:.0f} MiB".format(*extra)
    ours, theirs = best(rows, "ms", ours=True), best(rows, "ms", ours=False)
    if ours is None:
        return NOT_MEASURED
    if theirs is None:
        refused = [f"{row['contestant']}: {row['status'].split(':')[0]}" for row in rows if row["status"] != "ok"]
        return f"{ours:.0f} ms ({', '.join(refused) or 'no peer'})"
    return f"{theirs / ours:.2f}"


def bandwidth(rows: Rows) -> str:
    """GB/s against the best peer, and the share of what a copy reached in the same run."""
    copy = [row["gbps"] for row in rows if row["contestant"] == "copy" and "gbps" in row]
    ours = best(rows, "gbps", ours=True)
    against = versus("gbps", "{:.0f}")(rows)
    return against if ours is None or not copy else f"{against}, {ours / copy[0]:.0%} of copy"


def microseconds(rows: Rows) -> str:
    ours = best(rows, "ms", ours=True)
    return f"{ours * 1e3:.0f} us" if ours else NOT_MEASURED


CELLS = {
    "cpu": faster,
    "fwd": versus("tflops", "{:.0f}"),
    "bwd": versus("tflops", "{:.0f}"),
    "decode": bandwidth,
    "splitfuse": microseconds,
    "host": microseconds,
}


def table(name: str, found: list[Report]) -> str:
    """Of the cases that belong into table `name`: a benchmark may fill several."""
    parts = [report | {"cases": [case for case in report["cases"] if case["table"] == name]} for report in found]
    parts = [one_table(part, CELLS[name]) for part in parts if part["cases"]]
    return "\n\n".join(parts) if parts else NOT_MEASURED


def one_table(report: Report, cell: Callable[[Rows], str]) -> str:
    """Rows and columns in the order in which the cases were measured."""
    cells = {(case["row"], case["column"]): cell(case["rows"]) for case in report["cases"]}
    columns = list(dict.fromkeys(column for _, column in cells))
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for row in dict.fromkeys(row for row, _ in cells):
        lines.append(f"| {row} | {' | '.join(cells.get((row, column), '') for column in columns)} |")
    return "\n".join([caption(report), "", *lines])


def caption(report: Report) -> str:
    versions = ", ".join(f"{name} {report[name]}" for name in ("driver", "torch", "triton") if report.get(name))
    device = ", ".join(filter(None, (report["device"], report.get("clock"))))
    commit = str(report["commit"])
    commit = commit[:10] + commit[40:]  # what follows the hash says that code differed from it
    return f"{device}; {versions}; commit {commit}; {report['started'][:10]}:"


def write(text: str, found: dict[str, list[Report]]) -> str:
    """The text with all marked tables renewed."""

    def renew(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        if name == "support":
            return f"{start}{support.table()}\n{end}"
        if name not in CELLS:
            raise SystemExit(f"table:{name}: expected support or one of {', '.join(CELLS)}")
        return f"{start}{table(name, [report for reports in found.values() for report in reports])}\n{end}"

    return MARKED.sub(renew, text)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--readme", type=Path, default=RESULTS.parents[1] / "README.md")
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    p.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a table is out of date")
    args = p.parse_args()
    text = args.readme.read_text()
    renewed = write(text, reports(args.results))
    if args.check:
        return int(renewed != text)
    args.readme.write_text(renewed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
