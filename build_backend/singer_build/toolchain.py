"""Detect the build tools: torch, a C++ compiler and nvcc."""

from __future__ import annotations

import ast
import importlib.machinery
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from singer_build.plan import Toolchain

NVCC_SECONDS = 60.0

BUILD_INFO = Path("csrc", "python")  # the sources of singer_kernels._build, not of _ops


def search_path() -> list[str]:
    """Return ``sys.path``, then the site-packages of the target environment.

    pip's isolated build hides the latter, including the installed torch. They are only searched,
    not added to ``sys.path``, so that setuptools plug-ins found there stay out of the build.
    """
    hidden = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    hidden += site.getsitepackages()
    if sys.prefix == sys.base_prefix:
        hidden.append(site.getusersitepackages())
    return list(dict.fromkeys([*sys.path, *hidden]))


def torch_folder(path: list[str]) -> Path | None:
    """Return the directory of the torch package, without importing it."""
    spec = importlib.machinery.PathFinder.find_spec("torch", path)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def torch_versions(folder: Path | None) -> tuple[str | None, str | None]:
    """Return torch's version and CUDA version, parsed from its ``version.py``."""
    try:
        tree = ast.parse((folder / "version.py").read_text(encoding="utf-8")) if folder else None
    except (OSError, SyntaxError):
        tree = None
    values: dict[str, object] = {}
    for node in tree.body if tree else []:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(getattr(node, "value", None), ast.Constant):
            values |= {name.id: node.value.value for name in targets if isinstance(name, ast.Name)}
    version, cuda = values.get("__version__"), values.get("cuda")
    return (str(version) if version else None), (str(cuda) if cuda else None)


def find_compiler() -> str | None:
    """Return the C++ compiler's command: CXX if set, else c++ or g++."""
    for command in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++"]:
        if shutil.which(shlex.split(command)[0]):
            return command
    return None


def find_nvcc() -> str | None:
    """Return the path of nvcc: from CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    commands = [os.path.join(home, "bin", "nvcc") for home in [*homes, "/usr/local/cuda"]]
    commands.insert(len(homes), "nvcc")
    for command in commands:
        path = shutil.which(command)
        if path:
            return path
    return None


def nvcc_output(nvcc: str, option: str) -> str:
    """Return nvcc's output for an option; empty if it fails or takes longer than a minute."""
    try:
        done = subprocess.run(
            [nvcc, option], capture_output=True, text=True, check=True, timeout=NVCC_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def sources(root: Path, suffix: str) -> list[Path]:
    """Return the sources of ``_ops`` of that suffix, sorted, relative to the project's root."""
    paths = sorted(path.relative_to(root) for path in (root / "csrc").rglob(f"*{suffix}"))
    return [path for path in paths if BUILD_INFO not in path.parents]


def detect_toolchain(root: Path) -> Toolchain:
    """Detect torch, the C++ compiler, nvcc and the sources.

    Args:
        root: the project's directory.
    """
    folder = torch_folder(search_path())
    version, cuda = torch_versions(folder)
    nvcc = find_nvcc()
    release = re.search(r"release (\d+\.\d+)", nvcc_output(nvcc, "--version")) if nvcc else None
    return Toolchain(
        torch=version,
        torch_folder=str(folder) if folder else None,
        torch_cuda=cuda,
        compiler=find_compiler(),
        nvcc=nvcc,
        nvcc_version=release[1] if release else None,
        cpp_sources=bool(sources(root, ".cpp")),
        cuda_sources=bool(sources(root, ".cu")),
        platform=sys.platform,
    )
