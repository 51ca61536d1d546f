"""What the build decides, what the sdist holds, and what is said where the extension is missing."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from singer_kernels import extension, info

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "build_backend"))

from singer_build import compiling, hashing, toolchain
from singer_build.plan import BuildNotPossible, Plan, Toolchain, plan_build

CPU_TORCH = Toolchain(torch="2.13.0+cpu", torch_folder="/t", compiler="g++", cuda_sources=True)
CUDA_TORCH = replace(CPU_TORCH, torch="2.15.0+cu132", torch_cuda="13.2")
EVERYTHING = replace(CUDA_TORCH, nvcc="/c/nvcc", nvcc_version="13.0")

NO_TORCH = replace(EVERYTHING, torch=None, torch_cuda=None)
OLD_TORCH = replace(EVERYTHING, torch="2.9.1")
NO_COMPILER = replace(EVERYTHING, compiler=None)
WINDOWS = replace(EVERYTHING, platform="win32")
NO_SOURCES = replace(EVERYTHING, cpp_sources=False)
NO_CUDA_SOURCES = replace(EVERYTHING, cuda_sources=False)
OTHER_NVCC = replace(EVERYTHING, nvcc_version="12.4")
NVCC_WITHOUT_VERSION = replace(EVERYTHING, nvcc_version=None)

NOTHING_CAN_BE_BUILT = [
    (NO_TORCH, "no torch at build time"),
    (OLD_TORCH, "torch 2.9.1 at build time, expected 2.10 or later"),
    (replace(EVERYTHING, torch="nightly"), "torch nightly at build time, expected 2.10 or later"),
    (NO_COMPILER, "no C++ compiler"),
    (WINDOWS, "not built on Windows"),
    (NO_SOURCES, "the C++ sources are missing"),
]
NO_CUDA_CAN_BE_BUILT = [
    (CPU_TORCH, "torch 2.13.0+cpu is built without CUDA"),
    (CUDA_TORCH, "no nvcc (torch is built for CUDA 13.2)"),
    (OTHER_NVCC, "nvcc is of CUDA 12.4, torch is built for CUDA 13.2"),
    (NVCC_WITHOUT_VERSION, "/c/nvcc does not tell its version"),
    (NO_CUDA_SOURCES, "there are no .cu sources"),
]


@pytest.mark.parametrize(
    "toolchain",
    [
        EVERYTHING,
        replace(EVERYTHING, torch="2.10.0a0+git123"),
        replace(EVERYTHING, torch="3.0.0"),
        replace(EVERYTHING, nvcc_version="13.2"),
        replace(EVERYTHING, platform="darwin"),
    ],
)
def test_everything_there_builds_cuda(toolchain):
    assert plan_build(toolchain) == plan_build(toolchain, "cuda") == Plan("cuda")
    assert plan_build(toolchain, "cpu") == Plan("cpu")


@pytest.mark.parametrize("toolchain", [CPU_TORCH, NO_CUDA_SOURCES, replace(CPU_TORCH, nvcc="/n")])
def test_cpu_is_everything_where_there_is_nothing_for_cuda(toolchain):
    assert plan_build(toolchain) == Plan("cpu")


@pytest.mark.parametrize("toolchain", [CUDA_TORCH, OTHER_NVCC, NVCC_WITHOUT_VERSION])
def test_cpu_is_built_without_a_fitting_nvcc_and_the_reason_is_given(toolchain):
    (reason,) = [reason for other, reason in NO_CUDA_CAN_BE_BUILT if other is toolchain]
    assert plan_build(toolchain) == Plan("cpu", f"without CUDA: {reason}")


@pytest.mark.parametrize(("toolchain", "reason"), NOTHING_CAN_BE_BUILT)
def test_nothing_is_built_where_nothing_can_be(toolchain, reason):
    plan = plan_build(toolchain)
    assert plan.kind == "none"
    assert reason in plan.reason
    assert "\n" not in plan.reason


@pytest.mark.parametrize("toolchain", [EVERYTHING, NO_TORCH, WINDOWS])
def test_nothing_is_built_if_nothing_is_asked_for(toolchain):
    assert plan_build(toolchain, "0") == Plan("none", "SINGER_BUILD_EXT=0")


@pytest.mark.parametrize(
    ("toolchain", "requested", "reason"),
    [
        *((toolchain, "cpu", reason) for toolchain, reason in NOTHING_CAN_BE_BUILT),
        *((toolchain, "cuda", reason) for toolchain, reason in NOTHING_CAN_BE_BUILT),
        *((toolchain, "cuda", reason) for toolchain, reason in NO_CUDA_CAN_BE_BUILT),
    ],
)
def test_what_is_asked_for_and_impossible_fails_with_the_reason(toolchain, requested, reason):
    with pytest.raises(BuildNotPossible) as raised:
        plan_build(toolchain, requested)
    assert f"SINGER_BUILD_EXT: got {requested!r}" in str(raised.value)
    assert reason in str(raised.value)


@pytest.mark.parametrize("toolchain", [EVERYTHING, NO_TORCH])
@pytest.mark.parametrize("requested", ["1", "gpu", "CPU", ""])
def test_an_unknown_request_fails(toolchain, requested):
    with pytest.raises(BuildNotPossible, match=f"got {requested!r}, expected auto, 0, cpu, cuda"):
        plan_build(toolchain, requested)


def test_torch_is_found_without_importing_it(tmp_path):
    folder = tmp_path / "torch"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    assert toolchain.torch_folder([str(tmp_path)]) == folder
    assert toolchain.torch_folder([str(tmp_path / "nowhere")]) is None
    assert toolchain.torch_versions(folder) == toolchain.torch_versions(None) == (None, None)
    (folder / "version.py").write_text(
        "from typing import Optional\n__version__ = '2.12.0+cu130'\ncuda: Optional[str] = '13.0'\n"
    )
    assert toolchain.torch_versions(folder) == ("2.12.0+cu130", "13.0")


def test_the_torch_in_use_is_the_one_found():
    folder = toolchain.torch_folder(toolchain.search_path())
    assert folder == Path(torch.__file__).parent
    assert toolchain.torch_versions(folder) == (str(torch.__version__), torch.version.cuda)


def test_a_compiler_that_is_named_but_missing_is_not_replaced(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++ -m64")
    assert toolchain.find_compiler() is None
    monkeypatch.setenv("CXX", f"{sys.executable} -m64")
    assert toolchain.find_compiler() == f"{sys.executable} -m64"


def test_nvcc_is_found_by_the_environment_first(monkeypatch, tmp_path):
    for name in ("home", "path"):
        (tmp_path / name / "bin").mkdir(parents=True)
        nvcc = tmp_path / name / "bin" / "nvcc"
        nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
        nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
    assert toolchain.find_nvcc() == str(tmp_path / "home/bin/nvcc")
    assert toolchain.detect_toolchain(tmp_path).nvcc_version == "13.0"
    monkeypatch.delenv("CUDA_HOME")
    assert toolchain.find_nvcc() == str(tmp_path / "path/bin/nvcc")


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ("", ["80,sm_80", "90,sm_90", "90,compute_90"]),
        ("8.6", ["86,sm_86"]),
        ("9.0a;10.0+PTX", ["90a,sm_90a", "100,sm_100", "100,compute_100"]),
        ("7.5 12.0", ["75,sm_75", "120,sm_120"]),
    ],
)
def test_architectures(requested, expected):
    options = [f"-gencode=arch=compute_{text.replace(',', ',code=')}" for text in expected]
    assert compiling.gencode(requested, ["90", "80", "89"]) == options


@pytest.mark.parametrize(("requested", "known"), [("Ampere", ["80"]), ("80", ["80"]), ("", ["35"])])
def test_unknown_architectures_are_refused(requested, known):
    with pytest.raises(compiling.CompileError):
        compiling.gencode(requested, known)


def test_the_build_hash_changes_with_sources_and_flags_alone(tmp_path):
    source = tmp_path / "csrc" / "cpu" / "ops.cpp"
    source.parent.mkdir(parents=True)
    source.write_text("int a;")
    first = hashing.build_hash(tmp_path, ["-O3"])
    (source.parent / "notes.txt").write_text("no source")
    assert hashing.build_hash(tmp_path, ["-O3"]) == first
    assert hashing.build_hash(tmp_path, ["-O2"]) != first
    source.write_text("int b;")
    assert hashing.build_hash(tmp_path, ["-O3"]) != first


def test_a_failed_compilation_names_its_error(tmp_path, capfd):
    script = "import sys; sys.exit('in b:\\nb.cpp:1: error: no   such thing\\ncompilation over.')"
    with pytest.raises(compiling.CompileError, match=r"^b.cpp:1: error: no such thing$"):
        compiling._run([sys.executable, "-c", script], tmp_path)
    assert "compilation over." in capfd.readouterr().err
    with pytest.raises(compiling.CompileError, match="nowhere"):
        compiling._run(["/nowhere/c++"], tmp_path)


def test_a_compiler_that_hangs_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "COMPILE_SECONDS", 0.2)
    with pytest.raises(compiling.CompileError, match=r"^sleep had not ended after 0 s$"):
        compiling._run(["sleep", "1000"], tmp_path)
    monkeypatch.setattr(toolchain, "NVCC_SECONDS", 0.2)
    assert toolchain.nvcc_output("sleep", "1000") == ""


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A folder that stands for the installed package: nothing is in it yet."""
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_ops.so")
    monkeypatch.setattr(extension, "RECORD", tmp_path / "_install.json")
    return tmp_path


def record(folder, **entries):
    (folder / "_install.json").write_text(json.dumps(entries))


def test_a_library_that_was_not_built_gives_the_recorded_reason(installed):
    record(installed, requested="auto", built="none", reason="no torch at build time")
    assert extension.load() == "not built: no torch at build time"
    assert extension.load() == "not built: no torch at build time"


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}"])
def test_a_missing_record_is_said(installed, text):
    if text is not None:
        (installed / "_install.json").write_text(text)
    assert extension.install_record() == {}
    assert extension.load() == f"not built: nothing was installed into {installed}"


def test_a_library_that_went_missing_is_said(installed):
    record(installed, requested="auto", built="cpu", reason="")
    assert extension.load() == f"missing: it was built, but {installed / '_ops.so'} is not there"


@pytest.mark.parametrize("content", [b"", b"no library at all, but long enough to be read as one"])
def test_a_corrupt_library_gives_the_error_in_one_line(installed, content):
    (installed / "_ops.so").write_bytes(content)
    record(installed, requested="auto", built="cpu", reason="")
    reason = extension.load()
    assert reason.startswith("not loadable: ")
    assert str(installed / "_ops.so") in reason
    assert "\n" not in reason


CLONE = """
import sys, json
from singer_kernels import extension
print(json.dumps([str(extension.LIBRARY.parent), extension.load(), extension.build_report()]))
"""


@pytest.mark.parametrize("same", [True, False])
def test_a_clone_uses_the_installed_library_of_the_same_sources(tmp_path, same):
    if extension.load() is not None:
        pytest.skip(f"the extension is {extension.load()}")
    clone, installed = tmp_path / "clone", tmp_path / "installed"
    source = Path(extension.__file__).parent
    leave_out = shutil.ignore_patterns("*.so", "_install.json", "__pycache__")
    for folder in ("singer_kernels", "csrc", "build_backend"):
        origin = source if folder == "singer_kernels" else ROOT / folder
        shutil.copytree(origin, clone / folder, ignore=leave_out)
    shutil.copytree(source, installed / "singer_kernels", ignore=leave_out)
    for path in [extension.LIBRARY, *extension.LIBRARY.parent.glob("_build.*")]:
        shutil.copy(path, installed / "singer_kernels")
    metadata = installed / "singer_kernels-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: singer-kernels\nVersion: 1\n")
    (clone / "singer_kernels.egg-info").mkdir()  # a build leaves it there
    (clone / "singer_kernels.egg-info" / "PKG-INFO").write_text((metadata / "METADATA").read_text())
    if not same:
        (clone / "csrc" / "checks.h").write_text("int changed;")
    record(installed / "singer_kernels", built="cpu", sources=hashing.build_hash(ROOT, []))
    done = subprocess.run(
        [sys.executable, "-c", CLONE],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    folder, reason, report = json.loads(done.stdout)
    if same:
        assert (folder, reason, done.stderr) == (str(installed / "singer_kernels"), None, "")
        assert len(report["hash"]) == 64
    else:
        assert folder == str(clone / "singer_kernels")
        assert reason.startswith("not built: ")
        assert report is None
        assert len(done.stderr.splitlines()) == 1
        assert f"{clone / 'singer_kernels'} is imported, without a compiled library" in done.stderr


def test_a_clone_tells_why_the_installed_package_has_no_library(tmp_path, monkeypatch):
    installed = tmp_path / "installed"
    metadata = installed / "singer_kernels-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: singer-kernels\nVersion: 1\n")
    (installed / "singer_kernels").mkdir()
    record(installed / "singer_kernels", built="none", reason="no torch at build time")
    clone = tmp_path / "clone"
    (clone / "build_backend" / "singer_build").mkdir(parents=True)
    (clone / "build_backend" / "singer_build" / "hashing.py").touch()
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.setattr(extension, "_HERE", clone / "singer_kernels")
    assert extension._folder() == installed / "singer_kernels"


@pytest.mark.parametrize("built_from", ["csrc", "before the pull", None])
def test_a_library_that_was_built_in_place_before_a_pull_is_said(
    tmp_path, monkeypatch, caplog, built_from
):
    package, backend = tmp_path / "singer_kernels", tmp_path / "build_backend" / "singer_build"
    for folder in (package, backend, tmp_path / "csrc"):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "build_backend" / "singer_build" / "hashing.py", backend)
    (tmp_path / "csrc" / "ops.cpp").write_text("int pulled;")
    (package / "_ops.so").touch()
    entries = {"built": "cpu"} if built_from is None else {"built": "cpu", "sources": built_from}
    if built_from == "csrc":
        entries["sources"] = hashing.build_hash(tmp_path, [])
    record(package, **entries)
    monkeypatch.setattr(extension, "_HERE", package)
    assert extension._folder() == package
    lines = [f"singer_kernels: {package / '_ops.so'} is of other sources than csrc; "]
    assert [line.getMessage().startswith(lines[0]) for line in caplog.records] == (
        [] if built_from == "csrc" else [True]
    )


def test_any_error_of_loading_is_a_reason(installed, monkeypatch):
    def fail(path):
        raise RuntimeError("two\n  lines")

    (installed / "_ops.so").write_bytes(b"")
    monkeypatch.setattr(torch.ops, "load_library", fail)
    assert extension.load() == "not loadable: two lines"


def test_importing_the_package_loads_no_library():
    code = (
        "import sys, singer_kernels, torch\n"
        "assert not any('_ops.so' in path for path in torch.ops.loaded_libraries)\n"
        "assert 'singer_kernels._build' not in sys.modules\n"
    )
    folder = Path(extension.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


def test_what_is_installed_agrees_with_its_record():
    built = extension.install_record().get("built")
    if built is None:
        pytest.skip("the sources are used in place: nothing is installed")
    if built == "none":
        assert extension.load().startswith("not built: ")
        return
    assert extension.load() is None
    report = extension.build_report()
    assert report["target_abi"] == "0x020a000000000000"
    assert (report["cuda"] is None) == (built == "cpu")
    assert len(report["hash"]) == 64


def test_info_says_why_the_extension_is_off(installed, monkeypatch):
    monkeypatch.setattr(extension, "build_report", lambda: None)
    record(installed, requested="auto", built="none", reason="no C++ compiler")
    lines = info.report().splitlines()
    start = lines.index("extension       off: not built: no C++ compiler")
    entries = [line.split(maxsplit=1) for line in lines[start + 1 : start + 4]]
    assert entries == [["requested", "auto"], ["built", "none"], ["reason", "no C++ compiler"]]


def test_info_says_how_the_extension_was_built(installed, monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: None)
    monkeypatch.setattr(extension, "cpu_capability", lambda: "avx2")
    monkeypatch.setattr(extension, "cuda_kernels", lambda: [])
    monkeypatch.setattr(extension, "build_report", lambda: {"compiler": "GCC 12", "cuda": None})
    record(installed, requested="cpu", built="cpu", reason="")
    lines = info.report().splitlines()
    start = lines.index("extension       loaded")
    entries = [line.split(maxsplit=1) for line in lines[start + 3 : start + 7]]
    assert entries == [
        ["reason", "-"],
        ["cpu_capability", "avx2"],
        ["compiler", "GCC 12"],
        ["cuda", "-"],
    ]


def test_the_sdist_holds_the_sources_and_what_builds_them(tmp_path):
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    names = ("MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md")
    project = tmp_path / "project"
    for name in ("pyproject.toml", "setup.py", *names):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("build_backend", "csrc", "singer_kernels"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh", ".typed"}:
                target = project / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    expected = {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()}
    (project / "singer_kernels" / "_ops.so").write_bytes(b"left by an editable install")
    (project / "singer_kernels" / "_install.json").write_text("{}")

    code = f"from singer_build import backend; print(backend.build_sdist({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, 'build_backend'); {code}"],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert expected <= held
    assert not {name for name in held if name.endswith((".so", "_install.json"))}
