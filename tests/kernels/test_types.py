"""The annotations: mypy accepts a correct script and refuses wrong ones."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("typed_usage.py")


def mypy(*arguments):
    pytest.importorskip("mypy", reason="mypy is not installed")
    command = [sys.executable, "-m", "mypy", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_the_readme_snippets_pass_strict_mypy():
    done = mypy("--strict", SCRIPT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_snippets_run():
    done = subprocess.run([sys.executable, SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_wrong_use_is_refused(tmp_path):
    script = tmp_path / "wrong.py"
    text = SCRIPT.read_text(encoding="utf-8")
    script.write_text(
        text + "fused_losses(out.kd, out.kd, out.kd, out.kd, backend='tpu')\nout.info + 1\n",
        encoding="utf-8",
    )
    done = mypy("--strict", script)
    assert "No overload variant" in done.stdout
    assert "Unsupported left operand type" in done.stdout or "Unsupported operand" in done.stdout
