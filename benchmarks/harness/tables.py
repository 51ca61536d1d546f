"""Markdown tables of a run: for the terminal, the README and ``docs/benchmarks.md``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from harness.oracle import OUTPUTS
from harness.providers import NAMES
from harness.workloads import PHASES, Workload

BUSY = 0.2
"""Processors kept busy by other processes above which :func:`setting_line` reports them."""

RunResults = dict[str, Any]
"""Content of a results file; see :func:`results.empty`."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def number(value: float) -> str:
    """Return a number with three significant digits, or as an integer."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def of_series(run: RunResults, series: str) -> list[dict[str, Any]]:
    """Return the comparisons of a series."""
    return [record for record in run["losses"] if record["series"] == series]


def leading_precision(run: RunResults) -> str | None:
    """Return the precision that was measured first, the device's main one; None: no losses."""
    return next((record["precision"] for record in of_series(run, "workloads")), None)


def providers_in(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return the providers that appear in the records, in the order of ``NAMES``."""
    return [name for name in NAMES if any(name in record["providers"] for record in records)]


def setting_line(run: RunResults) -> str:
    """Return machine, versions and date of a run, in one line."""
    setting = run["setting"]
    versions = ", ".join(
        f"{name} {version}" for name, version in setting["versions"].items() if version
    )
    where = setting["device"]
    if setting["type"] == "cpu":
        isa = setting["cpu_capability"]["extension"] or "no"
        where += f", {setting['threads']} threads, {isa} kernels"
    if (busy := setting["busy_processors"]) is not None and busy > BUSY:
        where += f" (other processes kept {busy:.1f} processors busy)"
    return f"{where}; {versions}; {setting['date']}"


def _time_cell(entry: dict[str, Any] | None, base: str = "eager") -> str:
    if entry is None:
        return ""
    if entry["status"] != "timed":
        return entry["status"]
    cell = f"{number(entry['milliseconds']['both']['median'])} ms"
    ratio = entry["ratio"].get(base)
    return cell if ratio is None else f"{cell} ({ratio['both']:.2f}x)"


def losses_table(records: Sequence[dict[str, Any]]) -> str:
    """Return a row per workload: time of forward and backward, and speed-up, of each provider."""
    names = providers_in(records)
    header = ["images x patches x width", *(f"`{name}`" for name in names)]
    rows = [
        [
            Workload(**record["workload"]).sizes,
            *(_time_cell(record["providers"].get(name)) for name in names),
        ]
        for record in records
    ]
    return table(header, rows)


def ratio_range(records: Sequence[dict[str, Any]], name: str, base: str) -> str | None:
    """Return the smallest and largest speed-up of a provider over a baseline, or None."""
    ratios = [
        record["providers"][name]["ratio"][base]["both"]
        for record in records
        if base in record["providers"].get(name, {}).get("ratio", {})
    ]
    return f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else None


def precision_lines(run: RunResults) -> list[str]:
    """Return a line per precision: range of the backends' speed-ups, and largest errors."""
    leading = leading_precision(run)
    records = of_series(run, "workloads")
    lines = []
    for precision in dict.fromkeys(record["precision"] for record in records):
        of_precision = [record for record in records if record["precision"] == precision]
        parts, errors = [], []
        for name in providers_in(of_precision):
            timed = [r["providers"][name] for r in of_precision if _is_timed(r, name)]
            if timed:
                largest = max(max(entry["errors"].values()) for entry in timed)
                errors.append(f"`{name}` {largest:.0e}")
            ranges = {base: ratio_range(of_precision, name, base) for base in ("eager", "compiled")}
            if name.startswith(("eager", "compiled")) or ranges["eager"] is None:
                continue
            part = f"`{name}` {ranges['eager']} times as fast as `eager`"
            if ranges["compiled"] is not None:
                part += f", {ranges['compiled']} as `compiled`"
            parts.append(part)
        # The README has a table of the leading precision.
        ratios = "" if precision == leading else f"{'; '.join(parts)}. "
        lines.append(f"- {precision}: {ratios}Largest relative errors: {', '.join(errors)}.")
    return lines


def _is_timed(record: dict[str, Any], name: str) -> bool:
    return record["providers"].get(name, {}).get("status") == "timed"


def steps_table(run: RunResults) -> str | None:
    """Return a row per training step; None if none was measured."""
    steps = run["steps"]
    if not steps:
        return None
    rows = []
    for name, errors in steps["error_in_tolerances"].items():
        row = steps["results"].get(name)
        if row is None:
            if name in steps["peak_MiB"] or not name.endswith("fp64"):
                rows.append([f"`{name}`", f"wrong: {errors}", "", "", "", ""])
            continue
        ratios = [
            f"{row['ratio_to'][base]:.2f}x" if base in row["ratio_to"] else ""
            for base in ("authors", "authors-bf16")
        ]
        peak = steps["peak_MiB"].get(name)
        phases = ", ".join(number(value) for value in row["milliseconds"].values())
        rows.append(
            [
                f"`{name}`",
                f"{row['images_per_second']:.1f}",
                *ratios,
                "" if peak is None else f"{peak:.0f} MiB",
                phases,
            ]
        )
    phases = ", ".join(next(iter(steps["results"].values()), {}).get("milliseconds", {}))
    header = ["step", "images/s", "over `authors`", "over `authors-bf16`", "peak memory"]
    return table([*header, f"ms: {phases}"], rows)


def startup_table(run: RunResults) -> str | None:
    """Return a row per backend and state of its kernel cache; None if none was measured."""
    rows = [
        [f'`"{backend}"`', state, *(f"{1e3 * seconds:.0f} ms" for seconds in start.values())]
        for backend, states in run["startup"].items()
        for state, start in states.items()
    ]
    if not rows:
        return None
    names = [name.replace("_", " ") for name in next(iter(run["startup"].values()))["warm"]]
    return table(["backend", "kernel cache", *names], rows)


def summary(run: RunResults) -> str:
    """Return the main tables of a run, for the terminal."""
    parts = [setting_line(run)]
    records = of_series(run, "workloads")
    for precision in dict.fromkeys(record["precision"] for record in records):
        parts.append(f"losses, forward and backward, {precision} (speed-up over eager)")
        parts.append(losses_table([r for r in records if r["precision"] == precision]))
        parts.append("roofline time over measured time")
        parts.append(_roofline_table([r for r in records if r["precision"] == precision]))
    if (steps := steps_table(run)) is not None:
        parts += ["training steps", steps]
    if (startup := startup_table(run)) is not None:
        parts += ["start-up", startup]
    parts += [f"left out, {why}: {', '.join(what)}" for why, what in run["left_out"].items()]
    return "\n\n".join(parts)


def _roofline_table(records: Sequence[dict[str, Any]]) -> str:
    names = providers_in(records)

    def cell(record: dict[str, Any], name: str) -> str:
        fraction = record["providers"].get(name, {}).get("fraction_of_roofline")
        return "" if fraction is None else f"{fraction['both']:.0%}"

    rows = [
        [
            Workload(**record["workload"]).sizes,
            f"{number(record['roofline_milliseconds']['both'])} ms",
            *(cell(record, name) for name in names),
        ]
        for record in records
    ]
    return table(["images x patches x width", "roofline", *(f"`{name}`" for name in names)], rows)


def _detail_row(name: str, entry: dict[str, Any]) -> list[str]:
    if entry["status"] != "timed":
        return [f"`{name}`", f"{entry['status']}: {entry['reason']}", *[""] * 8]
    times = entry["milliseconds"]
    both = times["both"]
    host = number(times["host"]["median"]) if "host" in times else ""
    ratios = [
        f"{entry['ratio'][base]['both']:.2f}x" if base in entry["ratio"] else ""
        for base in ("eager", "compiled")
    ]
    memory = [entry["saved_MiB"], entry["peak_MiB"]]
    return [
        f"`{name}`",
        *(number(times[phase]["median"]) for phase in PHASES[:2]),
        f"{number(both['median'])} ({number(both['low'])} to {number(both['high'])})",
        host,
        *ratios,
        f"{entry['fraction_of_roofline']['both']:.0%}",
        " / ".join("?" if value is None else f"{value:.1f}" for value in memory),
        f"{max(entry['errors'][output] for output in OUTPUTS):.0e}",
    ]


def _detail(record: dict[str, Any]) -> str:
    workload = Workload(**record["workload"])
    cost, rates = record["roofline_cost"]["both"], record["peak_rates"]
    roofline = record["roofline_milliseconds"]
    lines = [
        f"#### {workload.name}, {record['precision']}",
        f"{workload.sizes}, rank {workload.rank}; {record['rounds']} rounds over "
        f"{record['sets']} sets of inputs of {number(record['inputs_MiB'])} MiB. Roofline: "
        f"{number(cost['bytes'] / 1e6)} MB and {number(cost['operations'] / 1e9)} GFLOP at the "
        f"measured {number(rates['bytes_per_second'] / 1e9)} GB/s and "
        f"{number(rates['operations_per_second'] / 1e9)} GFLOP/s take "
        f"{number(roofline['forward'])} + {number(roofline['backward'])} ms.",
    ]
    header = ["", "forward", "backward", "both (quartiles)", "host", "x eager", "x compiled"]
    header += ["of roofline", "MiB saved / peak", "largest error"]
    rows = [_detail_row(name, entry) for name, entry in record["providers"].items()]
    return "\n\n".join([*lines, table(header, rows)])


def details(run: RunResults) -> str:
    """Return all tables of a run."""
    parts = [f"## {run['setting']['device']}", setting_line(run)]
    for series, title in (
        ("workloads", "Losses of one layer"),
        ("patches", "Losses against the number of patches"),
        ("widths", "Losses against the width"),
    ):
        records = of_series(run, series)
        if records:
            parts.append(f"### {title}")
            if series == "workloads":
                parts.append("\n".join(precision_lines(run)))
            parts += map(_detail, records)
    if (steps := steps_table(run)) is not None:
        setting, dense = run["steps"]["setting"], run["steps"]["dense_gflops"]
        products = ", ".join(f"`{name}` {number(count)}" for name, count in dense.items())
        parts += [
            "### Training steps",
            f"{setting['teacher']} to {setting['student']} at {setting['image_size']} px, batch "
            f"{setting['batch_size']}, variant {setting['variant']}:",
            steps,
            f"GFLOP of matrix products and convolutions per step: {products}.",
        ]
    if (startup := startup_table(run)) is not None:
        parts += ["### Start-up", startup]
    left = [
        *(f"- `{name}`: {why}." for name, why in run["unavailable"].items()),
        *(f"- {why}: {', '.join(what)}." for why, what in run["left_out"].items()),
    ]
    if left:
        parts += ["### Not measured here", "\n".join(left)]
    return "\n\n".join(parts)
