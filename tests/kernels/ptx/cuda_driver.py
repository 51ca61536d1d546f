"""Runs the backend ``"cuda"`` on CPU tensors with the PTX that nvcc makes of its kernels."""

from __future__ import annotations

import contextlib
import ctypes
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import emulation
import torch
from torch import Tensor

from ptx.emulator import Launch
from ptx.parser import Kernel, parse
from singer_kernels.backends.cuda import stages

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "build_backend"))
from singer_build.toolchain import find_nvcc

THREADS = 128  # kThreads of csrc/cuda/launch.h with 32 lanes a warp

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_void_p))


def kernel_name(symbol: str) -> str | None:
    """Return the C++ name, ``refine_kernel<float>``, of a mangled one; None: no kernel of ours."""
    match = re.search(r"\d([a-z_]+)I([fd])E", symbol)
    return match and f"{match[1]}<{ {'f': 'float', 'd': 'double'}[match[2]] }>"


def compile_kernels(architecture: int, folder: Path) -> dict[str, Kernel]:
    """Compile the kernels to PTX; return them by their C++ names.

    Raises:
        RuntimeError: nvcc fails; the message has what it printed.
    """
    running = {}
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        target = folder / f"{source.stem}.ptx"
        options = ["-std=c++17", "-O3", f"-arch=sm_{architecture}", "-ptx", f"-I{ROOT / 'csrc'}"]
        options += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-o", str(target)]
        include = Path(torch.__file__).parent / "include"
        command = [str(find_nvcc()), *options, "-isystem", str(include), str(source)]
        running[target] = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    printed = {target: process.communicate(timeout=600)[0] for target, process in running.items()}
    kernels = {}
    for target, process in running.items():
        if process.returncode:
            raise RuntimeError(printed[target])
        kernels |= {kernel_name(name): kernel for name, kernel in parse(target.read_text()).items()}
    return kernels


@contextlib.contextmanager
def emulated(kernels: dict[str, Kernel]) -> Iterator[list[str]]:
    """Run the launches of the kernels, compiled as plain C++, in the emulator instead.

    Yields the names of the launched kernels.
    """
    library = ctypes.CDLL(str(emulation.library()))
    tensors: dict[int, Tensor] = {}  # of the operator that is called, by address
    errors: list[BaseException] = []
    launched: list[str] = []

    def value(start: int, size: int) -> Any:
        """Return a parameter: an integer or tensor, or the list of a structure's 8-byte fields."""
        numbers = [
            int.from_bytes(ctypes.string_at(start + k, min(8, size)), "little")
            for k in range(0, size, 8)
        ]
        fields = [tensors.get(number, number) if size >= 8 else number for number in numbers]
        return fields if size > 8 else fields[0]

    def launch(name: bytes, blocks: int, addresses: Any) -> None:
        try:
            kernel = kernels[name.decode()]
            launched.append(name.decode())
            arguments = [
                (param.name.rpartition("_")[0], value(addresses[k], param.size))
                for k, param in enumerate(kernel.params)
            ]
            Launch(kernel, (blocks, 1, 1), THREADS, arguments).run()
        except BaseException as error:  # ctypes would only print it
            errors.append(error)

    def operator(name: str) -> Any:
        function = getattr(torch.ops.singer_kernels, f"cuda_{name}")

        def call(*given: Any) -> None:
            tensors.clear()
            tensors.update({x.data_ptr(): x for x in given if isinstance(x, Tensor) and x.numel()})
            function(*given)
            if errors:
                raise errors.pop()

        return call

    callback = _FUNCTION(launch)
    library.singer_cuda_set_launcher(callback)
    try:
        with mock.patch.object(stages, "_kernel", operator):
            yield launched
    finally:
        library.singer_cuda_set_launcher(_FUNCTION())
