"""The plots of ``make bench``, from ``results.json``; ``compare.py`` runs it in an environment with matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from compare import Session, load
from matplotlib import pyplot
from participants import PARTICIPANTS
from report import LENGTHS, MESSAGE_BYTES, exponent

COLOURS = {"floor": "#8a8a8a", "ours": "#1a7f37", "peer": "#b3541e"}
MARKS = "osD^vPX*"


def growth(session: Session, out: Path) -> None:
    """Bytes stored over messages, both logarithmic: a slope of 1 is linear, of 2 quadratic."""
    figure, axes = pyplot.subplots(figsize=(9.5, 5))
    for index, who in enumerate(PARTICIPANTS):
        points = [(steps, session.median(who.name, "conversation", "stored", steps)) for steps in LENGTHS]
        known = [(steps, stored) for steps, stored in points if stored]
        if "conversation" not in who.workloads or who.is_postgres or not known:
            continue
        slope = exponent(session, who.name)
        label = who.name if slope is None else f"{who.name} ({slope:.2f})"
        axes.plot(*zip(*known, strict=True), marker=MARKS[index % len(MARKS)], color=COLOURS[who.group], label=label)
    axes.plot(
        LENGTHS, [steps * MESSAGE_BYTES for steps in LENGTHS], ":", color="black", label="the messages themselves"
    )
    axes.set(xscale="log", yscale="log", xlabel="messages of 1 KB", ylabel="bytes stored")
    axes.set_xticks(LENGTHS, [str(steps) for steps in LENGTHS])
    axes.legend(fontsize="small", title="exponent in brackets", loc="center left", bbox_to_anchor=(1, 0.5))
    _finish(figure, axes, out / "growth.svg")


def bars(session: Session, out: Path, workload: str, title: str, name: str, per_second: bool) -> None:
    """One bar for each participant that stores locally."""
    rows = []
    for who in PARTICIPANTS:
        seconds = session.median(who.name, workload, "seconds")
        if seconds and not who.is_postgres and "no-store" not in who.options:
            rows.append((who.name, 1 / seconds if per_second else seconds * 1e3, COLOURS[who.group]))
    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.36 * len(rows)))
    drawn = axes.barh([row[0] for row in rows], [row[1] for row in rows], color=[row[2] for row in rows])
    axes.bar_label(drawn, fmt="{:,.0f}" if per_second else "{:.2f}", padding=3, fontsize="small")
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set(xlabel=title)
    _finish(figure, axes, out / name)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    figure.tight_layout()
    # Without a date and random ids, so that the same results give the same file.
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    print(f"written: {path.name}")


def main() -> None:
    out = Path(sys.argv[1])
    matplotlib.rcParams["svg.hashsalt"] = "surefoot"
    session = load(out)
    growth(session, out)
    bars(session, out, "small", "ms for a step (1 KB replaced, 200 steps)", "steps.svg", per_second=False)
    bars(session, out, "concurrent", "durable steps in a second, 50 runs at once", "concurrent.svg", per_second=True)


if __name__ == "__main__":
    main()
