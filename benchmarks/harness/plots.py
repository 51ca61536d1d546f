"""Plots of a run: speed-ups, and time and memory against the number of patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.tables import RunResults, leading_precision, of_series, providers_in, setting_line
from harness.workloads import Workload

COLOURS = {
    "eager": "#777777",
    "eager-masked": "#aaaaaa",
    "compiled": "#d9a441",
    "compiled-max": "#b5651d",
    "torch": "#5b8db8",
    "cpu": "#2e8b57",
    "triton": "#1b6f4a",
    "cuda": "#7b5ea7",
}


def _draw_bars(axes: Any, records: list[dict[str, Any]]) -> None:
    names = [name for name in providers_in(records) if name != "eager"]
    height = 0.8 / max(1, len(names))
    for index, name in enumerate(names):
        ratios = [
            record["providers"].get(name, {}).get("ratio", {}).get("eager", {}).get("both", 0.0)
            for record in records
        ]
        positions = [row + (index + 0.5) * height - 0.4 for row in range(len(records))]
        bars = axes.barh(positions, ratios, height, color=COLOURS[name], label=name)
        axes.bar_label(bars, [f"{r:.1f}" if r else "" for r in ratios], padding=2, fontsize=7)
    axes.axvline(1.0, color=COLOURS["eager"], linewidth=1)
    axes.set_yticks(range(len(records)), [Workload(**r["workload"]).sizes for r in records])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("speed-up over eager, forward and backward")
    axes.legend(fontsize=7, loc="lower right")


def _draw_lines(axes: Any, records: list[dict[str, Any]], key: str) -> None:
    for name in providers_in(records):
        points = []
        for record in records:
            entry = record["providers"].get(name, {})
            if entry.get("status") == "timed":
                value = entry["milliseconds"]["both"]["median"] if key == "time" else entry[key]
                points.append((record["workload"]["patches"], value))
        if points and all(value is not None for _, value in points):
            axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[name], ms=3, label=name)
    if key == "time":
        roofline = [(r["workload"]["patches"], r["roofline_milliseconds"]["both"]) for r in records]
        axes.plot(*zip(*roofline, strict=True), "k--", linewidth=1, label="roofline")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    patches = [record["workload"]["patches"] for record in records]
    axes.set_xticks(patches, [str(count) for count in patches])
    axes.set_xlabel("patches")
    axes.set_ylabel("ms, forward and backward" if key == "time" else "MiB saved for the backward")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=7)


def draw(run: RunResults, path: Path) -> None:
    """Draw the figure of a run.

    Args:
        run: its results.
        path: an ``.svg`` or ``.png`` file.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    leading = leading_precision(run)
    bars = [r for r in of_series(run, "workloads") if r["precision"] == leading]
    sweep = of_series(run, "patches")
    style = {"svg.hashsalt": "singer-kernels", "svg.fonttype": "none", "font.size": 8}
    with mpl.rc_context(style):
        figure = Figure(figsize=(12, 4), layout="constrained")
        figure.suptitle(setting_line(run), fontsize=9)
        first, second, third = figure.subplots(1, 3)
        first.set_title(f"losses of one layer, {leading}")
        _draw_bars(first, bars)
        if sweep:
            workload = Workload(**sweep[0]["workload"])
            sizes = f"{workload.images} x P x {workload.width}, {sweep[0]['precision']}"
            for axes, key in ((second, "time"), (third, "saved_MiB")):
                axes.set_title(sizes)
                _draw_lines(axes, sweep, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata, dpi=120)
