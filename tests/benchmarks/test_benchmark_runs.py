"""Runs of ``pytest benchmarks/ --benchmark-only --quick``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).parents[2]


def run(*arguments, **variables):
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--benchmark-only", "--quick"]
    command += ["-p", "no:cacheprovider", *arguments]
    # pytest-xdist's, if this is one of its processes: pytest-benchmark would measure nothing.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST_")}
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**inherited, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_everything_is_measured_and_written(tmp_path):
    path, plugin_path = tmp_path / "r.json", tmp_path / "plugin.json"
    arguments = [f"--results={path}", f"--benchmark-json={plugin_path}", "-k=not compiled"]
    done = run("--device=cpu", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["quick"]
    assert found["left_out"] == {}
    measured = {(r["series"], r["precision"]): r for r in found["losses"]}
    assert measured.keys() == {
        *(("workloads", precision) for precision in ("fp32", "bf16", "autocast")),
        ("patches", "fp32"),
        ("widths", "fp32"),
    }
    providers = measured["workloads", "fp32"]["providers"]
    assert {"eager", "eager-masked", "torch"} <= providers.keys()
    assert {entry["status"] for entry in providers.values()} == {"timed"}
    assert providers["torch"]["ratio"].keys() == {"eager"}
    assert found["unavailable"].keys() >= {"triton", "cuda"}
    assert found["startup"]["torch"]["warm"]["first_call"] > 0
    assert found["steps"]["results"].keys() == {"authors", "authors-bf16", "ours", "ours-bf16"}

    # The plugin reports the measured times.
    reported = json.loads(plugin_path.read_text(encoding="utf-8"))["benchmarks"]
    for benchmark in reported:
        if benchmark["name"] == "test_losses[tiny-fp32-torch]":
            seconds = 1e-3 * providers["torch"]["milliseconds"]["both"]["median"]
            assert benchmark["stats"]["median"] == pytest.approx(seconds, rel=1e-4)
            assert benchmark["group"] == "losses: tiny (2 x 20 x 64), fp32"
            break
    else:
        raise AssertionError("the plugin did not report it")
    assert "| 2 x 20 x 64 |" in done.stdout


@pytest.mark.slow
def test_compiled_code_is_a_baseline(tmp_path):
    path = tmp_path / "r.json"
    selection = "-k=test_losses and fp32 and (compiled or torch)"
    done = run("--device=cpu", f"--results={path}", selection)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    (record,) = found["losses"]
    providers = record["providers"]
    assert providers.keys() == {"eager", "compiled", "torch"}
    assert {entry["status"] for entry in providers.values()} == {"timed"}
    assert providers["torch"]["ratio"].keys() == {"eager", "compiled"}
    assert "compiled-max" in found["unavailable"]


@pytest.mark.slow
def test_no_measurement_starts_after_the_time_limit(tmp_path):
    done = run("--device=cpu", f"--results={tmp_path}", "--time-limit=0", "-k=fp32 or step")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["losses"] == []
    assert found["left_out"]["no time left within 0 s"] == [
        "workloads/tiny-fp32",
        "whole training steps",
        "patches/P16-fp32",
        "patches/P32-fp32",
        "widths/D32-fp32",
        "widths/D64-fp32",
    ]


# A plugin: a loss of the provider "torch" is wrong.
WRONG_LOSS_PLUGIN = """
from harness import comparison, providers

def build(name):
    right = providers.build(name)
    if name != "torch":
        return right
    return lambda inputs: right(inputs)._replace(kd=2 * right(inputs).kd)

def pytest_collection_finish():
    comparison.build = build
"""


def test_a_wrong_provider_fails_alone_and_the_baseline_is_always_measured(tmp_path):
    (tmp_path / "wrong_loss.py").write_text(WRONG_LOSS_PLUGIN, encoding="utf-8")
    path = tmp_path / "r.json"
    paths = os.pathsep.join([str(ROOT / "benchmarks"), str(tmp_path)])
    selection = "-k=tiny-bf16-torch or (tiny-fp32 and (torch or eager))"
    arguments = ["--device=cpu", f"--results={path}", "-p", "wrong_loss", selection]
    done = run(*arguments, PYTHONPATH=paths)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "torch is wrong: kd" in done.stdout
    assert "2 failed, 2 passed" in done.stdout  # "torch" in both precisions
    assert "| wrong |" in done.stdout
    fp32, bf16 = json.loads(path.read_text(encoding="utf-8"))["losses"]
    status = {name: entry["status"] for name, entry in fp32["providers"].items()}
    assert status == {"eager": "timed", "eager-masked": "timed", "torch": "wrong"}
    # The baseline, though it was not selected.
    status = {name: entry["status"] for name, entry in bf16["providers"].items()}
    assert status == {"eager": "timed", "torch": "wrong"}
