"""The annotations: mypy accepts a correct script and refuses wrong ones."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("typed_usage.py")
WRONG = """
fused_losses(out.kd, out.kd, out.kd, out.kd, backend='tpu')
out.info + 1
"""
# Of torch only the types of tensors: the whole of it takes mypy longer than most tests here.
TENSORS = """
[mypy]
strict = true
[mypy-torch.*]
follow_imports = skip
[mypy-torch,torch._tensor,torch._C]
follow_imports = silent
"""


def mypy(*arguments):
    pytest.importorskip("mypy", reason="mypy is not installed")
    command = [sys.executable, "-m", "mypy", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """What one run of mypy says of the script, and of a copy with wrong lines added."""
    folder = tmp_path_factory.mktemp("types")
    wrong, config = folder / "wrong.py", folder / "mypy.ini"
    wrong.write_text(SCRIPT.read_text(encoding="utf-8") + WRONG, encoding="utf-8")
    config.write_text(TENSORS, encoding="utf-8")
    options = ["--config-file", config, "--cache-dir", folder / "cache"]
    done = mypy(*options, SCRIPT, wrong)
    assert done.stderr == ""
    assert "checked 2 source files" in done.stdout
    found = [line for line in done.stdout.splitlines() if ": error: " in line]
    return {path: [line for line in found if path.name in line] for path in (SCRIPT, wrong)}


def test_the_readme_snippets_pass_strict_mypy(errors):
    assert errors[SCRIPT] == []


@pytest.mark.slow
def test_the_readme_snippets_pass_strict_mypy_with_all_of_torch():
    done = mypy("--strict", SCRIPT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_snippets_run():
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_a_wrong_use_is_refused(errors):
    (wrong,) = (found for path, found in errors.items() if path != SCRIPT)
    assert len(wrong) == 2
    assert "No overload variant" in wrong[0]
    assert "Unsupported left operand type" in wrong[1] or "Unsupported operand" in wrong[1]
