"""What importing the package brings in, what its report prints, and what its sources may import."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import singer_kernels
from singer_kernels import backends, info

PACKAGE = Path(singer_kernels.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=PACKAGE.parent,
        env={"PATH": "", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def imported():
    """The modules that importing singer_kernels adds to those of torch."""
    code = """
import json, sys
import torch
before = set(sys.modules)
import singer_kernels
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_importing_needs_torch_and_the_standard_library_alone(imported):
    top = {name.partition(".")[0] for name in imported}
    assert "singer_kernels" in top
    assert top - set(sys.stdlib_module_names) == {"singer_kernels"}


def test_importing_loads_the_backends_that_need_torch_alone(imported):
    loaded = {name for name in imported if name.startswith("singer_kernels.backends.")}
    shared = {"autograd", "gradients", "operators", "precision"}
    found = {name.split(".")[2] for name in loaded} - shared
    assert found == {"torch", "reference", "triton", "cuda", "cpu"}
    assert "singer_kernels.backends.triton.language" not in imported


def test_importing_works_where_nothing_but_torch_can_be_imported():
    # Names already in sys.modules stay: those that torch itself imported.
    code = """
import sys
import torch
for name in ("timm", "triton", "numpy", "singer"):
    sys.modules.setdefault(name, None)
import singer_kernels
x = torch.ones(1, 3, 4)
singer_kernels.fused_losses(x, x, torch.ones(4, 1), torch.ones(1, 4), backend="reference")
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_info_prints_versions_and_backends():
    done = python("-m", "singer_kernels.info")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    for name, version in (
        ("singer_kernels", singer_kernels.__version__),
        ("python", sys.version.split()[0]),
        ("torch", torch.__version__),
    ):
        assert any(re.fullmatch(rf"{name} +{re.escape(version)}( .*)?", line) for line in lines)
    assert any(re.fullmatch(r"triton +\S.*", line) for line in lines)
    assert "SINGER_BACKEND  not set" in lines
    assert any(line.startswith("cpu: ") for line in lines)
    for name in backends.NAMES:
        assert any(re.fullmatch(rf"  {name} +(available|off: .+)", line) for line in lines)
    assert any(re.fullmatch(r"  reference +available", line) for line in lines)


def test_info_prints_the_forced_backend(monkeypatch):
    monkeypatch.setenv("SINGER_BACKEND", "reference")
    assert "SINGER_BACKEND  reference" in info.report().splitlines()


def test_info_says_that_a_forced_backend_is_unknown(monkeypatch):
    monkeypatch.setenv("SINGER_BACKEND", "foo")
    expected = "SINGER_BACKEND  foo: expected one of triton, cuda, cpu, torch, reference"
    assert expected in info.report().splitlines()


def test_info_gives_the_reason_of_a_backend_that_is_off(monkeypatch):
    monkeypatch.setattr(backends, "NAMES", ("missing", "reference"))
    assert re.search(r"^  missing +off: it can't be imported: .+missing", info.report(), re.M)


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_the_sources_are_all_scanned():
    assert {"losses.py", "reference.py", "validation.py"} <= {path.name for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_source_imports_the_training_layer_or_timm(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # A relative import may not climb out of the package either.
            depth = len(path.relative_to(PACKAGE).parts)
            assert node.level <= depth
            names.add("singer_kernels" if node.level else node.module)
    top = {name.partition(".")[0] for name in names}
    assert not top & {"singer", "timm"}
