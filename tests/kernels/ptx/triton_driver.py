"""A driver for Triton that compiles for a GPU down to PTX and runs it on CPU tensors.

The process must have imported Triton without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from ptx.emulator import Launch
from ptx.parser import parse
from singer_kernels.backends.triton import backend, configs
from singer_kernels.backends.triton import launch as triton_launch

# Before triton-lang/triton#9610 (in 3.8, and backported to a later 3.7) Triton left this fence out,
# and nothing says whether it puts it in but its version.
COPIES_NEED_FENCE = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)

_parse = functools.lru_cache(maxsize=None)(parse)


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.names = [x for x, kind in source.signature.items() if kind != "constexpr"]
        self.kept = [kind != "constexpr" for kind in source.signature.values()]
        self.metadata = metadata

    def __call__(self, x: int, y: int, z: int, stream: int, ptx: str, *rest: Any) -> None:
        values = [v for v, kept in zip(rest[4:], self.kept, strict=True) if kept]
        (kernel,) = _parse(ptx).values()
        arguments = list(zip(self.names, values, strict=True))
        arguments += [("scratch", None)] * (len(kernel.params) - len(arguments))
        threads, shared = 32 * self.metadata.num_warps, self.metadata.shared
        launch = Launch(kernel, (x, y, z), threads, arguments, shared, COPIES_NEED_FENCE)
        recorded = triton.runtime.driver.active.recorded
        if recorded is not None:
            before = [(k, v.clone() if isinstance(v, torch.Tensor) else v) for k, v in arguments]
            recorded.append((ptx, launch._replace(arguments=before)))
        launch.run()


class _Driver:
    launcher_cls = _Launcher

    def __init__(self, architecture: int, recorded: list[tuple[str, Launch]] | None) -> None:
        self.architecture, self.recorded = architecture, recorded
        limit = configs.SHARED_MEMORY[architecture]
        self.utils = SimpleNamespace(
            load_binary=lambda name, ptx, shared, device: (None, ptx.decode(), 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": limit},
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def emulated(architecture: int, recorded: list[tuple[str, Launch]] | None = None) -> Iterator[None]:
    """Run the backend ``"triton"`` on CPU tensors, compiled for an architecture (90: sm_90a).

    ``recorded`` receives the PTX and the arguments of each launch, before it. Triton's cache, where
    compiled kernels stay, must not be shared with a process that runs them on a GPU: they hold PTX
    in place of machine code.
    """
    config = triton.runtime.driver
    before = config._active
    config.set_active(_Driver(architecture, recorded))
    try:
        with (
            mock.patch.object(CUDABackend, "make_cubin", lambda self, ptx, *_: ptx.encode()),
            mock.patch.object(triton_launch, "architecture", return_value=architecture),
            mock.patch.object(type(backend), "unavailable_reason", return_value=None),
        ):
            yield
    finally:
        config._active = before
