"""Results as Markdown: for the terminal, the README, and the page of all figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from harness.oracle import OUTPUTS
from harness.providers import NAMES
from harness.workloads import PHASES, Workload

BUSY = 0.2
"""How many processors others may keep busy before a run's setting says so."""

Found = dict[str, Any]
"""Results of a run; see :func:`results.empty`."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def number(value: float) -> str:
    """Return a number in three digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def of_series(found: Found, series: str) -> list[dict[str, Any]]:
    """Return the comparisons of a series."""
    return [record for record in found["losses"] if record["series"] == series]


def leading_precision(found: Found) -> str | None:
    """Return the precision that was measured first: the device's own; None: none was."""
    return next((record["precision"] for record in of_series(found, "workloads")), None)


def providers_in(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return the providers that appear, in their order."""
    return [name for name in NAMES if any(name in record["providers"] for record in records)]


def setting_line(found: Found) -> str:
    """Return where and when a run measured, in one line."""
    setting = found["setting"]
    versions = ", ".join(
        f"{name} {version}" for name, version in setting["versions"].items() if version
    )
    where = setting["device"]
    if setting["type"] == "cpu":
        vectors = setting["vectors"]["extension"] or "no"
        where += f", {setting['threads']} threads, {vectors} kernels"
    if (busy := setting["busy_processors"]) is not None and busy > BUSY:
        where += f" (others kept {busy:.1f} processors busy)"
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
    """Return a row a workload: each provider's time of a forward and backward pass, and ratio."""
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
    """Return a provider's least and largest ratio to a base over workloads, or None."""
    ratios = [
        record["providers"][name]["ratio"][base]["both"]
        for record in records
        if base in record["providers"].get(name, {}).get("ratio", {})
    ]
    return f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else None


def precision_lines(found: Found) -> list[str]:
    """Return a line a precision: the backends' ratios over the workloads, and all errors."""
    leading = leading_precision(found)
    records = of_series(found, "workloads")
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


def steps_table(found: Found) -> str | None:
    """Return a row a training step; None if none was measured."""
    steps = found["steps"]
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
    header = ["step", "images/s", "over `authors`", "over `authors-bf16`", "peak above rest"]
    return table([*header, f"ms: {phases}"], rows)


def startup_table(found: Found) -> str | None:
    """Return a row a backend and state of its caches; None if none was measured."""
    rows = [
        [f'`"{backend}"`', state, *(f"{1e3 * seconds:.0f} ms" for seconds in start.values())]
        for backend, states in found["startup"].items()
        for state, start in states.items()
    ]
    if not rows:
        return None
    names = [name.replace("_", " ") for name in next(iter(found["startup"].values()))["warm"]]
    return table(["backend", "caches", *names], rows)


def summary(found: Found) -> str:
    """Return the most important figures of a run, for the terminal."""
    parts = [setting_line(found)]
    records = of_series(found, "workloads")
    for precision in dict.fromkeys(record["precision"] for record in records):
        parts.append(f"losses, forward and backward, {precision}; x: over eager")
        parts.append(losses_table([r for r in records if r["precision"] == precision]))
        parts.append("the same, shares of the machine's ceiling")
        parts.append(_shares_table([r for r in records if r["precision"] == precision]))
    if (steps := steps_table(found)) is not None:
        parts += ["training steps", steps]
    if (startup := startup_table(found)) is not None:
        parts += ["start-up", startup]
    parts += [f"left out, {why}: {', '.join(what)}" for why, what in found["left_out"].items()]
    return "\n\n".join(parts)


def _shares_table(records: Sequence[dict[str, Any]]) -> str:
    names = providers_in(records)

    def cell(record: dict[str, Any], name: str) -> str:
        share = record["providers"].get(name, {}).get("share_of_ceiling")
        return "" if share is None else f"{share['both']:.0%}"

    rows = [
        [
            Workload(**record["workload"]).sizes,
            f"{number(record['floor_milliseconds']['both'])} ms",
            *(cell(record, name) for name in names),
        ]
        for record in records
    ]
    return table(["images x patches x width", "floor", *(f"`{name}`" for name in names)], rows)


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
    memory = [entry["held_MiB"], entry["peak_MiB"]]
    return [
        f"`{name}`",
        *(number(times[phase]["median"]) for phase in PHASES[:2]),
        f"{number(both['median'])} ({number(both['low'])} to {number(both['high'])})",
        host,
        *ratios,
        f"{entry['share_of_ceiling']['both']:.0%}",
        " / ".join("?" if value is None else f"{value:.1f}" for value in memory),
        f"{max(entry['errors'][output] for output in OUTPUTS):.0e}",
    ]


def _detail(record: dict[str, Any]) -> str:
    workload = Workload(**record["workload"])
    least, ceilings = record["least"]["both"], record["ceilings"]
    floors = record["floor_milliseconds"]
    lines = [
        f"#### {workload.name}, {record['precision']}",
        f"{workload.sizes}, rank {workload.rank}; {record['rounds']} rounds over "
        f"{record['sets']} sets of inputs of {number(record['inputs_MiB'])} MiB. At least "
        f"{number(least['bytes'] / 1e6)} MB and {number(least['operations'] / 1e9)} GFLOP; "
        f"measured ceilings {number(ceilings['bytes_per_second'] / 1e9)} GB/s and "
        f"{number(ceilings['operations_per_second'] / 1e9)} GFLOP/s; so at least "
        f"{number(floors['forward'])} + {number(floors['backward'])} ms.",
    ]
    header = ["", "forward", "backward", "both (quartiles)", "host", "x eager", "x compiled"]
    header += ["of ceiling", "MiB held / peak", "largest error"]
    rows = [_detail_row(name, entry) for name, entry in record["providers"].items()]
    return "\n\n".join([*lines, table(header, rows)])


def details(found: Found) -> str:
    """Return everything that a run measured."""
    parts = [f"## {found['setting']['device']}", setting_line(found)]
    for series, title in (
        ("workloads", "Losses of one layer"),
        ("patches", "Losses against the number of patches"),
        ("widths", "Losses against the width"),
    ):
        records = of_series(found, series)
        if records:
            parts.append(f"### {title}")
            if series == "workloads":
                parts.append("\n".join(precision_lines(found)))
            parts += map(_detail, records)
    if (steps := steps_table(found)) is not None:
        setting, dense = found["steps"]["setting"], found["steps"]["dense_gflops"]
        products = ", ".join(f"`{name}` {number(count)}" for name, count in dense.items())
        parts += [
            "### Training steps",
            f"{setting['teacher']} to {setting['student']} at {setting['image_size']} px, batch "
            f"{setting['batch_size']}, variant {setting['variant']}:",
            steps,
            f"GFLOP of dense products a step: {products}.",
        ]
    if (startup := startup_table(found)) is not None:
        parts += ["### Start-up", startup]
    left = [
        *(f"- `{name}`: {why}." for name, why in found["unavailable"].items()),
        *(f"- {why}: {', '.join(what)}." for why, what in found["left_out"].items()),
    ]
    if left:
        parts += ["### Not measured here", "\n".join(left)]
    return "\n\n".join(parts)
