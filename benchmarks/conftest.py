"""Options, fixtures, order and final table of the benchmarks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.providers import unavailable_reason
from harness.replay import replay
from harness.session import Session
from harness.tables import summary
from harness.workloads import Case, workloads

COLUMNS = ["median", "iqr", "min", "rounds"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of ``benchmarks/README.md``."""
    group = parser.getgroup("singer-kernels' benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: the GPU, if there is one")
    group.addoption("--quick", action="store_true", help="tiny sizes: a smoke test")
    group.addoption(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="start no measurement after that; default: 290 on a CPU, 350 on a GPU",
    )
    group.addoption(
        "--results",
        type=Path,
        metavar="PATH",
        help="write results there: a JSON file, or a folder (the file is named after the device)",
    )


SESSION = pytest.StashKey[Session]()


def pytest_configure(config: pytest.Config) -> None:
    """Create the session; the fixtures and hooks find it in the stash."""
    # The plugin's ten columns do not fit on a screen.
    config.option.benchmark_columns = config.option.benchmark_columns or COLUMNS
    config.stash[SESSION] = Session(config)


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> Iterator[Session]:
    """Return the session; its results are written at the end."""
    session = pytestconfig.stash[SESSION]
    yield session
    session.save()


@pytest.fixture
def measure_losses(request: pytest.FixtureRequest, session: Session, benchmark: Any) -> Any:
    """Return a function that compares the case's selected providers and reports one of them."""

    def measure(case: Case, provider: str) -> None:
        reason = unavailable_reason(provider, session.device, case)
        if reason is not None:
            session.results["unavailable"][provider] = reason
            pytest.skip(f"{provider}: {reason}")
        selected = {
            item.callspec.params["provider"]: None
            for item in request.session.items
            if getattr(item, "originalname", None) == request.node.originalname
            and item.callspec.params["case"] == case
        }
        # The baseline of the ratios is measured even if it was not selected.
        names = dict.fromkeys(["eager", *selected])
        record, seconds = session.losses(
            case, [n for n in names if unavailable_reason(n, session.device, case) is None]
        )
        entry = record["providers"][provider]
        if entry["status"] != "timed":
            pytest.fail(f"{provider} is {entry['status']}: {entry['reason']}", pytrace=False)
        sizes = case.workload.sizes
        benchmark.group = f"losses: {case.workload.name} ({sizes}), {case.precision.name}"
        replay(benchmark, seconds[provider], entry)

    return measure


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize benchmarks with their cases, in the device's sizes."""
    cases = getattr(metafunc.module, "cases", None)
    if cases is not None and "case" in metafunc.fixturenames:
        session = metafunc.config.stash[SESSION]
        chosen = cases(session.device.type, session.quick)
        metafunc.parametrize("case", chosen, ids=[case.label for case in chosen])


def _priority(item: pytest.Item) -> int:
    """Return the sort key: most relevant first, since the time limit may cut off the rest."""
    order = ("bench_losses", "bench_steps", "bench_scaling", "bench_startup")
    leading = workloads(item.config.stash[SESSION].device.type)[0].precision
    case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
    is_leading = case is None or case.precision == leading
    return order.index(item.module.__name__) if is_leading else len(order)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the benchmarks by priority, after tests from other folders."""
    folder = Path(__file__).parent
    benchmarks = [item for item in items if item.path.parent == folder]
    others = [item for item in items if item.path.parent != folder]
    items[:] = [*others, *sorted(benchmarks, key=_priority)]


def pytest_collection_finish() -> None:
    """Leave what was imported out of later garbage collections; there is one for each provider."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the summary and the path of the results."""
    session = config.stash[SESSION]
    if session.results["losses"] or session.results["steps"]:
        terminalreporter.section("singer-kernels")
        terminalreporter.write_line(summary(session.results))
    if session.path is not None and session.path.is_file():
        terminalreporter.write_line(f"results: {session.path}")
