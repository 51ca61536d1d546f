"""What every benchmark shares: options, the results they are written to, and the closing table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.providers import unavailable_reason
from harness.replay import replay
from harness.session import Session
from harness.tables import summary
from harness.workloads import Point, workloads

COLUMNS = ["median", "iqr", "min", "rounds"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of ``benchmarks/README.md``."""
    group = parser.getgroup("singer-kernels' benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: the GPU, if there is one")
    group.addoption("--quick", action="store_true", help="tiny sizes: to see that all works")
    group.addoption(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="begin no measurement after that; default: 290 on a CPU, 350 on a GPU",
    )
    group.addoption(
        "--results",
        type=Path,
        metavar="PATH",
        help="write results there: a file, or a folder, in which the device names it",
    )


SESSION = pytest.StashKey[Session]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin the run."""
    # The plugin would show ten columns, as wide as two screens.
    config.option.benchmark_columns = config.option.benchmark_columns or COLUMNS
    config.stash[SESSION] = Session(config)


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> Iterator[Session]:
    """Return the run of the benchmarks; what it measured is written at its end."""
    session = pytestconfig.stash[SESSION]
    yield session
    session.save()


@pytest.fixture
def measure_losses(request: pytest.FixtureRequest, session: Session, benchmark: Any) -> Any:
    """Return what measures a provider of the losses on a point, beside all others of the run."""

    def measure(point: Point, provider: str) -> None:
        reason = unavailable_reason(provider, session.device, point)
        if reason is not None:
            session.found["unavailable"][provider] = reason
            pytest.skip(f"{provider}: {reason}")
        together = {
            item.callspec.params["provider"]: None
            for item in request.session.items
            if getattr(item, "originalname", None) == request.node.originalname
            and item.callspec.params["point"] == point
        }
        # What ratios are taken to is measured even if it was not selected.
        names = dict.fromkeys(["eager", *together])
        record, seconds = session.losses(
            point, [n for n in names if unavailable_reason(n, session.device, point) is None]
        )
        entry = record["providers"][provider]
        if entry["status"] != "timed":
            pytest.fail(f"{provider} is {entry['status']}: {entry['reason']}", pytrace=False)
        sizes = point.workload.sizes
        benchmark.group = f"losses: {point.workload.name} ({sizes}), {point.precision.name}"
        replay(benchmark, seconds[provider], entry)

    return measure


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a benchmark its points, in the sizes of the device."""
    points = getattr(metafunc.module, "points", None)
    if points is not None and "point" in metafunc.fixturenames:
        session = metafunc.config.stash[SESSION]
        chosen = points(session.device.type, session.quick)
        metafunc.parametrize("point", chosen, ids=[point.label for point in chosen])


def _place(item: pytest.Item) -> int:
    """Return when a benchmark's turn comes: the most telling first, for the time may end."""
    order = ("bench_losses", "bench_steps", "bench_scaling", "bench_startup")
    leading = workloads(item.config.stash[SESSION].device.type)[0].precision
    point = item.callspec.params.get("point") if hasattr(item, "callspec") else None
    is_leading = point is None or point.precision == leading
    return order.index(item.module.__name__) if is_leading else len(order)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the benchmarks."""
    here = Path(__file__).parent
    mine = [item for item in items if item.path.parent == here]
    others = [item for item in items if item.path.parent != here]
    items[:] = [*others, *sorted(mine, key=_place)]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table of the losses, and where the results are."""
    session = config.stash[SESSION]
    if session.found["losses"] or session.found["steps"]:
        terminalreporter.section("singer-kernels")
        terminalreporter.write_line(summary(session.found))
    if session.path is not None and session.path.is_file():
        terminalreporter.write_line(f"results: {session.path}")
