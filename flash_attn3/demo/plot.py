# SPDX-License-Identifier: BSD-3-Clause
"""The one picture of the main job."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, THEIRS = "tab:orange", "tab:blue"


def save(path: Path, title: str, losses: dict[str, list[float]], speeds: dict[str, dict[str, float]]) -> None:
    """losses: name -> curve; speeds: what was timed -> {name: tokens per second}."""
    figure, (left, *right) = plt.subplots(1, 1 + len(speeds), figsize=(11, 4), width_ratios=[2.4, *[1] * len(speeds)])
    styles = [(OURS, "-", 2.5), (THEIRS, "--", 1.2)]
    for (name, curve), (color, style, width) in zip(losses.items(), styles, strict=True):
        left.plot(range(1, len(curve) + 1), curve, label=name, color=color, linestyle=style, linewidth=width)
    left.set(xlabel="step", ylabel="loss (nats per character)", title="training")
    left.legend()
    for axis, (what, values) in zip(right, speeds.items(), strict=True):
        bars = axis.bar(list(values), list(values.values()), color=[OURS, THEIRS])
        axis.bar_label(bars, fmt="{:,.0f}")
        axis.set(title=what, ylabel="tokens/s")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
