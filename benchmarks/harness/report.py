"""Write the figures of ``benchmarks/results/`` into the README and ``docs/``.

    cd benchmarks
    python -m harness.report [RESULTS.json ...] [--check | --summary [--output FILE]]

Without files it takes all of ``benchmarks/results/``. ``README.md`` gets one table per device
between two marks, ``docs/benchmarks.md`` all figures, ``docs/<device>.svg`` the plots. ``--check``
writes nothing and fails if either page differs; ``--summary`` prints the most important figures and
writes nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import results, tables
from harness.plots import draw
from harness.tables import RunResults

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
BEGIN = "<!-- written by benchmarks/harness/report.py: begin -->"
END = "<!-- written by benchmarks/harness/report.py: end -->"


def readme_section(runs: dict[str, RunResults]) -> str:
    """Return the README's section: setting, one table and the plots of each run.

    Args:
        runs: stem of a results file to its content.
    """
    parts = []
    for name, run in runs.items():
        leading = tables.leading_precision(run)
        parts.append(f"**{tables.setting_line(run)}**")
        records = [r for r in tables.of_series(run, "workloads") if r["precision"] == leading]
        if records:
            rank = records[0]["workload"]["rank"]
            parts.append(
                f"Forward and backward of the losses of one layer, {leading}, rank {rank} "
                "(speed over `eager`):"
            )
            parts.append(tables.losses_table(records))
        parts.append(f"![Speed-ups, and time and memory against patches](docs/{name}.svg)")
    return "\n\n".join(part for part in parts if part)


def page(runs: dict[str, RunResults]) -> str:
    """Return ``docs/benchmarks.md``: all figures; see :func:`readme_section` for ``runs``."""
    head = (
        "# Benchmarks\n\n"
        "Generated from `benchmarks/results/` by `cd benchmarks && python -m harness.report`. "
        "Method and limits: `benchmarks/README.md`. Times are medians in ms; `x eager` is the "
        "speed-up over `eager`; `of roofline` is the roofline time over the measured time."
    )
    return "\n\n".join([head, *(tables.details(run) for run in runs.values())]) + "\n"


def with_section(text: str, section: str) -> str:
    """Return a README with the section between its marks replaced.

    Raises:
        ValueError: the marks are missing, repeated or in the wrong order.
    """
    before, begin, rest = text.partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in inside + after or END in after:
        raise ValueError(f"README.md: expected {BEGIN!r} and then {END!r}, once each")
    return f"{before}{BEGIN}\n\n{section}\n\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, check or print; return 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("files", nargs="*", type=Path, help="default: all committed results")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compare instead of writing")
    mode.add_argument("--summary", action="store_true", help="print instead of writing")
    parser.add_argument("--output", type=Path, help="also write the summary to this file")
    options = parser.parse_args(arguments)
    files = options.files or sorted(RESULTS.glob("*.json"))
    try:
        runs = {path.stem: results.read(path) for path in files}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.summary:
        text = "\n\n".join(tables.summary(run) for run in runs.values())
        print(text)
        if options.output is not None:
            options.output.write_text(text + "\n", encoding="utf-8")
        return 0
    readme = ROOT / "README.md"
    pages = {
        readme: with_section(readme.read_text(encoding="utf-8"), readme_section(runs)),
        ROOT / "docs/benchmarks.md": page(runs),
    }
    if options.check:
        wrong = [
            path.relative_to(ROOT)
            for path, text in pages.items()
            if not path.is_file() or path.read_text(encoding="utf-8") != text
        ]
        for path in wrong:
            print(f"{path}: differs from the results; run python -m harness.report in benchmarks/")
        return int(bool(wrong))
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for name, run in runs.items():
        draw(run, ROOT / "docs" / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
