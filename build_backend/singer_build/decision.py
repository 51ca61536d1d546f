"""What to build, given what was found and what was asked for. Nothing here looks around."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

VARIABLE = "SINGER_BUILD_EXT"
REQUESTS = ("auto", "0", "cpu", "cuda")
OLDEST_TORCH = (2, 10)  # the first whose stable ABI has all that csrc/ uses

Kind = Literal["none", "cpu", "cuda"]


class ImpossibleError(ValueError):
    """What was asked for can't be built; the message says why, in one line."""


@dataclass(frozen=True)
class Found:
    """What the build found.

    Attributes:
        torch: torch's version; None: not there.
        torch_folder: the folder of the package torch.
        torch_cuda: the CUDA version that torch is built for; None: for none.
        compiler: the C++ compiler's command.
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
    """What to build, and in one line why the rest is left out (empty: nothing is)."""

    kind: Kind
    reason: str = ""


def _why_nothing(found: Found) -> str | None:
    if found.platform == "win32":
        return "it is not built on Windows"
    if found.torch is None:
        return (
            "no torch at build time (with torch installed, "
            "pip install --no-deps --no-cache-dir --force-reinstall builds it)"
        )
    version = re.match(r"(\d+)\.(\d+)", found.torch)
    if version is None or (int(version[1]), int(version[2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return f"torch {found.torch} at build time, expected {oldest} or later"
    if found.compiler is None:
        return "no C++ compiler (CXX or, if that is unset, c++ or g++ on PATH)"
    if not found.cpp_sources:
        return "the C++ sources are missing"
    return None


def _why_no_cuda(found: Found) -> str | None:
    if found.torch_cuda is None:
        return f"torch {found.torch} is built without CUDA"
    if not found.cuda_sources:
        return "there are no .cu sources"
    if found.nvcc is None:
        return f"no nvcc (torch is built for CUDA {found.torch_cuda})"
    if found.nvcc_version is None:
        return f"{found.nvcc} does not tell its version"
    if found.nvcc_version.partition(".")[0] != found.torch_cuda.partition(".")[0]:
        return f"nvcc is of CUDA {found.nvcc_version}, torch is built for CUDA {found.torch_cuda}"
    return None


def decide(found: Found, requested: str = "auto") -> Plan:
    """Decide what to build.

    Args:
        found: what there is.
        requested: ``auto``: what can be built; ``0``: nothing; ``cpu`` or ``cuda``: that, or fail.

    Returns:
        The plan; ``cuda`` includes what ``cpu`` has.

    Raises:
        ImpossibleError: ``requested`` is unknown, or can't be built.
    """
    if requested not in REQUESTS:
        raise ImpossibleError(f"{VARIABLE}: got {requested!r}, expected {', '.join(REQUESTS)}")
    if requested == "0":
        return Plan("none", f"{VARIABLE}=0")
    nothing = _why_nothing(found)
    no_cuda = _why_no_cuda(found)
    obstacle = nothing or (no_cuda if requested == "cuda" else None)
    if requested != "auto" and obstacle is not None:
        raise ImpossibleError(f"{VARIABLE}: got {requested!r}, which can't be built: {obstacle}")
    if nothing is not None:
        return Plan("none", nothing)
    if requested == "cpu":
        return Plan("cpu")
    if no_cuda is None:
        return Plan("cuda")
    missed = found.torch_cuda is not None and found.cuda_sources
    return Plan("cpu", f"without CUDA: {no_cuda}" if missed else "")
