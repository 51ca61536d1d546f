"""Compile ``_ops`` and ``_build`` by calling the compilers directly, without importing torch.

``_ops`` uses torch's stable ABI and links only ``libtorch_cpu`` and ``libtorch``, so one file works
with every torch from 2.10 on. ``torch.utils.cpp_extension`` would add other options and libraries.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from singer_build.hashing import build_hash
from singer_build.plan import Kind, Toolchain
from singer_build.toolchain import BUILD_INFO, nvcc_output, sources

STANDARD = "c++17"
TARGET_ABI = "0x020a000000000000"  # torch 2.10
CXX_FLAGS = ("-O3", "-fno-math-errno", "-fopenmp-simd", "-fvisibility=hidden", "-fPIC")
COMMON_FLAGS = (f"-std={STANDARD}", f"-DTORCH_TARGET_VERSION={TARGET_ABI}")
ARCHITECTURES = ("7.5", "8.0", "8.6", "9.0", "10.0")  # the default; the last also as PTX
COMPILE_SECONDS = 3600.0  # of one source
LIBRARY = "_ops.so"  # without Python's ABI suffix: loaded by torch, not imported


class CompileError(Exception):
    """A compiler failed; the message is the last error line of its output."""


@dataclass(frozen=True)
class Built:
    """The built files, and one line why a file is missing (empty if none is)."""

    files: tuple[Path, ...]
    reason: str = ""


def _last_error(output: str) -> str:
    lines = [" ".join(line.split()) for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b(error|undefined|cannot find)\b", line)]
    errors = [line for line in errors if not line.startswith("collect2")] or lines
    return errors[-1] if errors else "the compiler failed without output"


def _run(command: list[str], root: Path) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=root,
            env=os.environ | {"LC_ALL": "C"},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=COMPILE_SECONDS,
        )
    except OSError as error:
        raise CompileError(str(error)) from error
    except subprocess.TimeoutExpired as error:
        raise CompileError(f"{command[0]} had not ended after {error.timeout:.0f} s") from error
    if done.returncode != 0:
        output = done.stderr or done.stdout
        print(shlex.join(command), output, sep="\n", file=sys.stderr)
        raise CompileError(_last_error(output))


def _jobs() -> int:
    value = os.environ.get("MAX_JOBS", "")
    return int(value) if value.isdecimal() and int(value) else os.cpu_count() or 1


def _run_all(commands: list[list[str]], root: Path) -> None:
    with ThreadPoolExecutor(_jobs()) as pool:
        for future in [pool.submit(_run, command, root) for command in commands]:
            future.result()


def gencode(requested: str, known: Iterable[str]) -> list[str]:
    """Return nvcc's ``-gencode`` options.

    Args:
        requested: the value of TORCH_CUDA_ARCH_LIST, such as ``8.0;9.0+PTX``; empty: those of
            ``ARCHITECTURES`` that nvcc supports.
        known: architectures that nvcc supports, such as ``90``.

    Raises:
        CompileError: an entry is not an architecture, or nvcc supports none of the default.
    """
    entries = re.split(r"[;,\s]+", requested.strip("; ,\t"))
    if not requested:
        entries = [name for name in ARCHITECTURES if name.replace(".", "") in set(known)]
        if not entries:
            raise CompileError(f"nvcc knows none of the architectures {', '.join(ARCHITECTURES)}")
        entries[-1] += "+PTX"
    options = []
    for entry in entries:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if match is None:
            raise CompileError(
                f"TORCH_CUDA_ARCH_LIST: got {entry!r}, expected numbers such as 8.0;9.0+PTX"
            )
        number = match[1] + match[2]
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def _macro(name: str, value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'-D{name}="{escaped}"'


@dataclass(frozen=True)
class _Builder:
    root: Path
    temp: Path
    toolchain: Toolchain
    cuda: bool

    def __post_init__(self) -> None:
        self.temp.mkdir(parents=True, exist_ok=True)

    @property
    def compiler(self) -> list[str]:
        return shlex.split(self.toolchain.compiler or "c++")

    @property
    def torch(self) -> Path:
        return Path(self.toolchain.torch_folder or "")

    def includes(self) -> list[str]:
        return ["-Icsrc", "-isystem", str(self.torch / "include")]

    def cxx_flags(self) -> list[str]:
        return [*COMMON_FLAGS, *CXX_FLAGS, *(["-DSINGER_CUDA"] if self.cuda else [])]

    def nvcc_flags(self) -> list[str]:
        known = re.findall(
            r"compute_(\w+)", nvcc_output(self.toolchain.nvcc or "", "--list-gpu-arch")
        )
        wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        host = ",".join(flag for flag in CXX_FLAGS if flag != "-O3")
        return [
            *COMMON_FLAGS,
            *("-DSINGER_CUDA", "-O3", "-Xcompiler", host),
            *gencode(wanted, known),
        ]

    def linker(self) -> list[str]:
        """Return the command that links a shared library and fails on undefined symbols."""
        if self.toolchain.platform == "darwin":
            return [*self.compiler, "-shared", "-undefined", "dynamic_lookup"]
        if self.cuda:
            driver = [
                self.toolchain.nvcc or "nvcc",
                "-ccbin",
                self.compiler[-1],
                "-cudart",
                "static",
            ]
            return [*driver, "-shared", "-Xlinker", "-z,defs", "-Xlinker", "--exclude-libs,ALL"]
        return [*self.compiler, "-shared", "-Wl,-z,defs"]

    def build_ops(self) -> Path:
        objects, commands = [], []
        for source in [*sources(self.root, ".cpp"), *(self.cuda_sources())]:
            target = self.temp / ("-".join(source.parts) + ".o")
            objects.append(str(target))
            tool, flags = self.compiler, self.cxx_flags()
            if source.suffix == ".cu":
                tool = [self.toolchain.nvcc or "nvcc", "-ccbin", self.compiler[-1]]
                flags = self.nvcc_flags()
            commands.append(
                [*tool, *flags, *self.includes(), "-c", source.as_posix(), "-o", str(target)]
            )
        _run_all(commands, self.root)
        library = self.temp / LIBRARY
        libraries = [f"-L{self.torch / 'lib'}", "-ltorch_cpu"]
        if self.cuda:
            # libtorch has no symbols of its own, but loads torch's CUDA library, which defines the
            # weak symbol in csrc/cuda/launch.h.
            libraries += ["-Xlinker", "--no-as-needed", "-ltorch"]
        _run([*self.linker(), *objects, "-o", str(library), *libraries], self.root)
        return library

    def cuda_sources(self) -> list[Path]:
        return sources(self.root, ".cu") if self.cuda else []

    def build_info(self) -> Path:
        """Compile ``_build``, the module that reports how the library was built."""
        flags = [*self.cxx_flags(), *(["nvcc:", *self.nvcc_flags()] if self.cuda else [])]
        codes = re.findall(r",code=(\w+)", " ".join(flags))
        macros = [
            _macro("SINGER_FLAGS", " ".join(flags)),
            _macro("SINGER_STANDARD", STANDARD),
            _macro("SINGER_TORCH_VERSION", self.toolchain.torch or ""),
            _macro("SINGER_TARGET_ABI", TARGET_ABI),
            _macro("SINGER_BUILD_HASH", build_hash(self.root, flags)),
        ]
        if self.cuda:
            macros.append(_macro("SINGER_CUDA_VERSION", self.toolchain.nvcc_version or ""))
            macros.append(_macro("SINGER_CUDA_ARCHITECTURES", " ".join(codes)))
        paths = dict.fromkeys(sysconfig.get_path(name) for name in ("include", "platinclude"))
        python = [option for path in paths for option in ("-isystem", path)]
        module = self.temp / f"_build{sysconfig.get_config_var('EXT_SUFFIX')}"
        options = [f"-std={STANDARD}", "-O1", "-fvisibility=hidden", "-fPIC", "-shared"]
        if self.toolchain.platform == "darwin":
            options += ["-undefined", "dynamic_lookup"]
        source = (BUILD_INFO / "build_info.cpp").as_posix()
        command = [*self.compiler, *options, *macros, *python, *self.includes()]
        _run([*command, source, "-o", str(module)], self.root)
        return module


def build(root: Path, temp: Path, toolchain: Toolchain, kind: Kind) -> Built:
    """Compile and link.

    Args:
        root: the project's directory.
        temp: directory of the object files and results.
        toolchain: the detected build tools.
        kind: ``cpu`` or ``cuda``.

    Returns:
        ``_ops.so`` and the module ``_build``; if only the module fails (for example without
        Python's headers), the library alone, and the reason.

    Raises:
        CompileError: the library can't be built.
    """
    builder = _Builder(root, temp / kind, toolchain, kind == "cuda")
    results: list[Path | CompileError] = []
    steps: list[Callable[[], Path]] = [builder.build_ops, builder.build_info]
    with ThreadPoolExecutor(len(steps) if _jobs() > 1 else 1) as pool:
        for future in [pool.submit(step) for step in steps]:
            try:
                results.append(future.result())
            except CompileError as error:
                results.append(error)
    library, module = results
    if isinstance(library, CompileError):
        raise library
    if isinstance(module, CompileError):
        return Built((library,), f"without its build report: {module}")
    return Built((library, module))
