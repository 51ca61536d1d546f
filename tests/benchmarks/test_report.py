"""The README's section, docs/benchmarks.md, tables and plots match the results."""

import copy
import json
import os
import re
import subprocess
import sys
import time

import pytest
from harness import machine, report, results, tables
from harness.plots import draw
from harness.providers import NAMES
from harness.report import BEGIN, END, RESULTS, with_section

SETTING = {
    "date": "2026-01-02",
    "device": "A Processor",
    "type": "cpu",
    "threads": 2,
    "busy_processors": 0.1,
    "versions": {"torch": "2.99", "triton": None},
    "cpu_capability": {"torch": "X", "extension": "avx512"},
}


def phases(value):
    return {"forward": value / 3, "backward": 2 * value / 3, "both": value}


def entry(milliseconds, ratio):
    spread = {
        phase: {"median": v, "low": 0.9 * v, "high": 1.1 * v, "fastest": 0.8 * v}
        for phase, v in phases(milliseconds).items()
    }
    return {
        "status": "timed",
        "errors": dict.fromkeys(("kd", "outlier", "info", "d_student", "d_down", "d_up"), 1e-7),
        "milliseconds": spread,
        "ratio": {"eager": dict.fromkeys(phases(1.0), ratio)},
        "fraction_of_roofline": dict.fromkeys(phases(1.0), 0.125),
        "saved_MiB": 3.5,
        "peak_MiB": None,
    }


def comparison(series, patches, precision="fp32"):
    return {
        "series": series,
        "workload": {"name": "W", "images": 2, "patches": patches, "width": 64, "rank": 8},
        "precision": precision,
        "rounds": 5,
        "sets": 2,
        "inputs_MiB": 1.5,
        "roofline_cost": {name: {"bytes": 10**6, "operations": 10**9} for name in phases(1.0)},
        "peak_rates": {"bytes_per_second": 1e10, "operations_per_second": 1e11},
        "roofline_milliseconds": phases(1.0),
        "providers": {
            "eager": entry(8.0, 1.0),
            "torch": {"status": "wrong", "reason": "kd 1.0e+00 (allowed 1.0e-06)"},
            "cpu": entry(2.0, 4.0),
        },
    }


@pytest.fixture
def run():
    made = results.empty(SETTING, quick=True)
    made["losses"] = [
        comparison("workloads", 196),
        comparison("workloads", 196, "bf16"),
        comparison("patches", 64),
        comparison("patches", 128),
    ]
    made["startup"] = {"cpu": {"warm": {"import_torch": 2.0, "first_call": 0.0123}}}
    made["unavailable"] = {"triton": "it needs a CUDA device"}
    made["left_out"] = {"no time left": ["widths/D192-fp32"]}
    made["steps"] = {
        "setting": {
            "teacher": "big",
            "student": "small",
            "image_size": 126,
            "batch_size": 16,
            "variant": "official",
        },
        "error_in_tolerances": {
            "ours-fp64": {"kd": 0.1},
            "authors": {"kd": 0.1},
            "ours": {"kd": 2},
        },
        "results": {
            "authors": {
                "images_per_second": 23.0,
                "ratio_to": {"authors": 1.0},
                "milliseconds": {"teacher": 1.0, "student": 2.0},
            }
        },
        "peak_MiB": {"authors": 300.0, "ours": 200.0},
        "dense_gflops": {"authors": 2.0, "ours": 1.0},
    }
    return made


def test_the_pages_match_the_committed_results(capsys):
    """If this fails, run: cd benchmarks && python -m harness.report."""
    assert list(RESULTS.glob("*.json")), "no results are committed"
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_committed_results_are_complete():
    for path in RESULTS.glob("*.json"):
        run = results.read(path)
        assert not run["quick"], path
        assert run["left_out"] == {}, path
        assert (report.ROOT / "docs" / f"{path.stem}.svg").is_file()
        for record in run["losses"]:
            for name, provider in record["providers"].items():
                assert provider["status"] == "timed", (path, name)


def test_a_changed_figure_fails_the_check(tmp_path, monkeypatch, capsys, run):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    results.write(tmp_path / "device.json", run)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\n{END}\nafter\n", encoding="utf-8")
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    written = readme.read_text(encoding="utf-8")
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert "| 2 x 196 x 64 | 8 ms (1.00x) | wrong | 2 ms (4.00x) |" in written
    assert (tmp_path / "docs/device.svg").stat().st_size > 1000
    readme.write_text(written.replace("(4.00x)", "(5.00x)"), encoding="utf-8")
    assert report.main(["--check"]) == 1
    assert "README.md: differs" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{END}{END}"])
def test_a_readme_without_its_marks_is_rejected(text):
    with pytest.raises(ValueError, match=r"README.md: expected .* once each"):
        with_section(text, "new")


def test_other_files_are_rejected(tmp_path, capsys):
    path = tmp_path / "other.json"
    for text, message in (
        ("{", "no JSON"),
        ("[]", "schema: got None, expected 1"),
        (json.dumps({"schema": 0}), "schema: got 0, expected 1"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit):
            report.main([str(path), "--summary"])
        assert message in capsys.readouterr().err


def test_the_summary_shows_wrong_and_missing_results(tmp_path, capsys, run):
    results.write(tmp_path / "device.json", run)
    arguments = [str(tmp_path / "device.json"), "--summary", "--output", str(tmp_path / "s.md")]
    assert report.main(arguments) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "s.md").read_text(encoding="utf-8") == printed
    assert "A Processor, 2 threads, avx512 kernels; torch 2.99; 2026-01-02" in printed
    assert "| 2 x 196 x 64 | 1 ms | 12% |  | 12% |" in printed
    assert "| `ours` | wrong" in printed
    assert "| `authors` | 23.0 | 1.00x |  | 300 MiB | 1, 2 |" in printed
    assert '| `"cpu"` | warm | 2000 ms | 12 ms |' in printed
    assert "left out, no time left: widths/D192-fp32" in printed


def test_busy_processors_are_measured():
    idle = machine.busy_processors(0.2)
    if idle is None:
        pytest.skip("needs /proc/stat")
    command = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(command) as other:
        time.sleep(0.3)
        busy = machine.busy_processors(0.5)
        other.kill()
    assert 0 <= idle <= os.cpu_count()
    assert 0.5 < busy <= os.cpu_count()


def test_busy_processors_are_reported(run):
    run["setting"]["busy_processors"] = 1.26
    assert (
        "avx512 kernels (other processes kept 1.3 processors busy); torch"
        in tables.setting_line(run)
    )


def test_the_page_has_every_comparison(run):
    page = report.page({"device": run})
    assert len(re.findall("^#### ", page, re.MULTILINE)) == len(run["losses"])
    assert "wrong: kd 1.0e+00 (allowed 1.0e-06)" in page
    assert "3.5 / ?" in page
    assert "- `triton`: it needs a CUDA device." in page
    assert "- bf16: `cpu` 4.00 to 4.00 times as fast as `eager`." in page
    assert "big to small at 126 px, batch 16, variant official:" in page
    # As many columns in each row as in its header.
    for block in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({row.count("|") for row in block.splitlines()}) == 1, block


def test_ratios_over_workloads(run):
    assert tables.ratio_range(run["losses"][:2], "cpu", "eager") == "4.00 to 4.00"
    assert tables.ratio_range(run["losses"][:2], "torch", "eager") is None
    assert tables.precision_lines(run) == [
        "- fp32: Largest relative errors: `eager` 1e-07, `cpu` 1e-07.",
        "- bf16: `cpu` 4.00 to 4.00 times as fast as `eager`. "
        "Largest relative errors: `eager` 1e-07, `cpu` 1e-07.",
    ]


def test_a_figure_needs_no_sweep(tmp_path, run):
    draw(run, tmp_path / "whole.png")
    less = copy.deepcopy(run)
    less["losses"] = less["losses"][:1]
    draw(less, tmp_path / "less.svg")
    for name in ("whole.png", "less.svg"):
        assert (tmp_path / name).stat().st_size > 1000


def test_results_are_rounded_and_replaced(tmp_path):
    path = tmp_path / "new" / "r.json"
    results.write(path, {"schema": 1, "a": [1 / 3, {"b": 123456.7}], "n": 1234567})
    assert results.read(path) == {"schema": 1, "a": [0.33333, {"b": 123460.0}], "n": 1234567}
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_every_provider_has_a_colour():
    from harness.plots import COLOURS

    assert COLOURS.keys() == set(NAMES)
