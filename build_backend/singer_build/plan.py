"""Choose what to build from the detected toolchain and ``SINGER_BUILD_EXT``; no I/O here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

VARIABLE = "SINGER_BUILD_EXT"
REQUESTS = ("auto", "0", "cpu", "cuda")
OLDEST_TORCH = (2, 10)  # oldest stable ABI with all functions that csrc/ calls

Kind = Literal["none", "cpu", "cuda"]


class BuildNotPossible(ValueError):
    """The requested kind can't be built; the message is one line with the reason."""


@dataclass(frozen=True)
class Toolchain:
    """The build tools of this machine.

    Attributes:
        torch: torch's version; None if torch is not installed.
        torch_folder: directory of the torch package.
        torch_cuda: CUDA version that torch is built for; None for a CPU build.
        compiler: command of the C++ compiler.
        nvcc: path of nvcc.
        nvcc_version: its version, such as ``13.0``.
        cpp_sources: whether there are C++ sources.
        cuda_sources: whether there are CUDA sources.
        platform: ``sys.platform``.
    """

    torch: str | None = None
    torch_folder: str | None = None
    torch_cuda: str | None = None
    compiler: str | None = None
    nvcc: str | None = None
    nvcc_version: str | None = None
    cpp_sources: bool = True
    cuda_sources: bool = False
    platform: str = "linux"


@dataclass(frozen=True)
class Plan:
    """The kind to build, and one line why anything is left out (empty if nothing is)."""

    kind: Kind
    reason: str = ""


def _why_nothing(toolchain: Toolchain) -> str | None:
    if toolchain.platform == "win32":
        return "it is not built on Windows"
    if toolchain.torch is None:
        return (
            "no torch at build time (now that torch is installed, in the clone: "
            "pip install --no-deps --no-cache-dir --force-reinstall .)"
        )
    version = re.match(r"(\d+)\.(\d+)", toolchain.torch)
    if version is None or (int(version[1]), int(version[2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return f"torch {toolchain.torch} at build time, expected {oldest} or later"
    if toolchain.compiler is None:
        return "no C++ compiler (CXX or, if that is unset, c++ or g++ on PATH)"
    if not toolchain.cpp_sources:
        return "the C++ sources are missing"
    return None


def _why_no_cuda(toolchain: Toolchain) -> str | None:
    if toolchain.torch_cuda is None:
        return f"torch {toolchain.torch} is built without CUDA"
    if not toolchain.cuda_sources:
        return "there are no .cu sources"
    if toolchain.nvcc is None:
        return f"no nvcc (torch is built for CUDA {toolchain.torch_cuda})"
    if toolchain.nvcc_version is None:
        return f"{toolchain.nvcc} does not tell its version"
    if toolchain.nvcc_version.partition(".")[0] != toolchain.torch_cuda.partition(".")[0]:
        nvcc, cuda = toolchain.nvcc_version, toolchain.torch_cuda
        return f"nvcc is of CUDA {nvcc}, torch is built for CUDA {cuda}"
    return None


def plan_build(toolchain: Toolchain, requested: str = "auto") -> Plan:
    """Choose the kind to build.

    Args:
        toolchain: the detected build tools.
        requested: ``auto`` (the most that can be built), ``0`` (nothing), ``cpu`` or ``cuda``.

    Returns:
        The plan; ``cuda`` includes the CPU kernels.

    Raises:
        BuildNotPossible: ``requested`` is unknown or can't be built.
    """
    if requested not in REQUESTS:
        raise BuildNotPossible(f"{VARIABLE}: got {requested!r}, expected {', '.join(REQUESTS)}")
    if requested == "0":
        return Plan("none", f"{VARIABLE}=0")
    nothing = _why_nothing(toolchain)
    no_cuda = _why_no_cuda(toolchain)
    obstacle = nothing or (no_cuda if requested == "cuda" else None)
    if requested != "auto" and obstacle is not None:
        raise BuildNotPossible(f"{VARIABLE}: got {requested!r}, which can't be built: {obstacle}")
    if nothing is not None:
        return Plan("none", nothing)
    if requested == "cpu":
        return Plan("cpu")
    if no_cuda is None:
        return Plan("cuda")
    missed = toolchain.torch_cuda is not None and toolchain.cuda_sources
    return Plan("cpu", f"without CUDA: {no_cuda}" if missed else "")
