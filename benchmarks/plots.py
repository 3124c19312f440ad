# SPDX-License-Identifier: BSD-3-Clause
"""Pictures of the results: TFLOP/s or GB/s of every contestant, and on the CPU ratios to SDPA."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from harness import RESULTS, file_name
from readme_table import YARDSTICKS, Report, best, caption, reports

FIGURES = {
    "fwd": ("tflops", "TFLOP/s"),
    "bwd": ("tflops", "TFLOP/s"),
    "decode": ("gbps", "GB/s"),
    "splitfuse": ("ms", "ms"),
}
PANELS_IN_A_ROW = 4


def by_row(report: Report) -> dict[str, list[dict]]:
    """Label of a row of the table -> its cases."""
    rows: dict[str, list[dict]] = {}
    for case in report["cases"]:
        rows.setdefault(case["row"], []).append(case)
    return rows


def plot_rates(report: Report, path: Path, table: str) -> None:
    """One panel for each row of the table, one line for each contestant."""
    figure_name, unit = FIGURES[table]
    panels = by_row(report)
    height = -(-len(panels) // PANELS_IN_A_ROW)
    figure, axes = plt.subplots(height, PANELS_IN_A_ROW, figsize=(16, 3.2 * height), squeeze=False)
    lines = {}
    for axis, (label, cases) in zip(axes.flat, panels.items(), strict=False):
        names = dict.fromkeys(row["contestant"] for case in cases for row in case["rows"] if figure_name in row)
        names = [name for name in names if figure_name != "ms" or name not in YARDSTICKS]  # which do other work
        for name in names:
            points = {
                case["column"]: row[figure_name]
                for case in cases
                for row in case["rows"]
                if row["contestant"] == name and figure_name in row
            }
            style = lines[name].get_color() if name in lines else f"C{len(lines)}"
            (lines[name],) = axis.plot(list(points), list(points.values()), marker="o", markersize=3, color=style)
        axis.set(title=label, ylabel=unit, ylim=(0, None))
        axis.tick_params(axis="x", labelsize=7)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=len(lines))
    finish(figure, caption(report), path)


def plot_ratios(report: Report, path: Path) -> None:
    """How many times faster than SDPA, one bar for each case."""
    ratios = {}
    for case in report["cases"]:
        ours, theirs = best(case["rows"], "ms", ours=True), best(case["rows"], "ms", ours=False)
        if ours and theirs:
            ratios[f"{case['row']}, {case['column']}"] = theirs / ours
    figure, axis = plt.subplots(figsize=(10, 1 + 0.18 * len(ratios)))
    axis.barh(list(ratios), list(ratios.values()), color=["C2" if ratio >= 1 else "C3" for ratio in ratios.values()])
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(xlabel="times faster than SDPA", xscale="log")
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=7)
    axis.margins(y=0.01)
    finish(figure, caption(report), path)


def finish(figure: plt.Figure, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=9)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(path)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="JSON in, PNG out")
    args = p.parse_args()
    for bench, found in reports(args.results).items():
        for report in found:
            path = (args.results / file_name(bench, report["device"], quick=False)).with_suffix(".png")
            for table in dict.fromkeys(case["table"] for case in report["cases"]):
                part = report | {"cases": [case for case in report["cases"] if case["table"] == table]}
                picture = path if table == bench else path.with_stem(f"{path.stem}-{table}")
                if table in FIGURES:
                    plot_rates(part, picture, table)
                elif table == "cpu":
                    plot_ratios(part, picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
