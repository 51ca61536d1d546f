"""The annotations: mypy accepts a correct script and refuses wrong ones."""

import re
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


def statements(code):
    """Return the lines of code without indentation, comments and blank lines."""
    lines = (line.partition("  #")[0].strip() for line in code.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def names_imported(lines):
    return {
        name
        for line in lines
        if line.startswith("from singer_kernels import ")
        for name in line.removeprefix("from singer_kernels import ").split(", ")
    }


def test_the_script_holds_the_readmes_snippet():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Drop-in\n")[2].partition("\n## ")[0]
    (snippet,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    wanted, found = statements(snippet), statements(SCRIPT.read_text(encoding="utf-8"))
    assert len(wanted) == 6
    assert names_imported(wanted) <= names_imported(found)
    assert [line for line in wanted if line not in found and "import" not in line] == []


def test_the_snippets_run():
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_a_wrong_use_is_refused(errors):
    (wrong,) = (found for path, found in errors.items() if path != SCRIPT)
    assert len(wrong) == 2
    assert "No overload variant" in wrong[0]
    assert "Unsupported left operand type" in wrong[1] or "Unsupported operand" in wrong[1]
