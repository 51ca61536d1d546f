"""The compiled extension: loading it on demand, how it was built, its CUDA kernels' resources."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import os
import runpy
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

import torch

_HERE = Path(__file__).parent
_logger = logging.getLogger("singer_kernels")


def _folder() -> Path:
    """Return the folder of the compiled files: this package's, except in a clone.

    A clone that was not built in place has none: there the installed package has them, or the
    reason why not. A library from other sources in ``csrc`` is not used, unless it was built in
    place (a pull came after it): either is logged.
    """
    hashing = _HERE.parent / "build_backend" / "singer_build" / "hashing.py"
    if not hashing.is_file():
        return _HERE
    if (_HERE / "_install.json").exists():
        record = _read_record(_HERE / "_install.json")
        if (_HERE / "_ops.so").is_file() and record.get("sources") != _sources(hashing):
            _logger.warning(
                "singer_kernels: %s is of other sources than csrc; build or install again",
                _HERE / "_ops.so",
            )
        return _HERE
    for distribution in importlib.metadata.distributions(name="singer-kernels"):
        folder = Path(str(distribution.locate_file("singer_kernels")))
        record = _read_record(folder / "_install.json")
        if not record:  # the clone's own, which a build left beside the sources
            continue
        if not (folder / "_ops.so").is_file():
            return folder  # whose record has the reason
        if record.get("sources") == _sources(hashing):
            return folder
        _logger.warning(
            "singer_kernels: %s is imported, without a compiled library: that of the installed "
            "package, %s, is of other sources; start Python in another folder, or install again",
            _HERE,
            folder,
        )
        break  # the first is the one that is installed
    return _HERE


def _sources(hashing: Path) -> str:
    return str(runpy.run_path(str(hashing))["build_hash"](_HERE.parent, []))


def _read_record(path: Path) -> dict[str, str]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in record.items()} if isinstance(record, dict) else {}


LIBRARY = _folder() / "_ops.so"
RECORD = LIBRARY.parent / "_install.json"

CAPABILITY_VARIABLE = "SINGER_CPU_CAPABILITY"
CAPABILITIES = ("baseline", "avx2", "avx512")


class KernelUsage(NamedTuple):
    """Resources of one of the extension's CUDA kernels on a device."""

    kernel: str  # such as refine_kernel<float>, with its accumulation dtype
    registers: int  # per thread
    local: int  # bytes of local memory per thread: spills and arrays
    shared: int  # bytes of shared memory per block
    blocks: int  # resident per multiprocessor
    warps: int  # of those blocks
    max_warps: int  # resident per multiprocessor, for any kernel

    @property
    def occupancy(self) -> float:
        """Ratio of resident warps to the most that fit, 0 to 1."""
        return self.warps / self.max_warps


_outcomes: dict[Path, str | None] = {}  # library to the reason why it is off; None: it is loaded


def install_record() -> dict[str, str]:
    """Return the installation's record.

    Returns:
        ``requested``, ``built`` (``none``, ``cpu`` or ``cuda``), the ``reason`` if less was built,
        and ``sources``, a SHA-256 over ``csrc``; empty without a record, as in a source tree that
        was never installed.
    """
    return _read_record(RECORD)


def _why_missing() -> str:
    record = install_record()
    if not record:
        return f"not built: nothing was installed into {LIBRARY.parent}"
    if record.get("built") in ("cpu", "cuda"):
        return f"missing: it was built, but {LIBRARY} is not there"
    return f"not built: {record.get('reason') or 'no reason was recorded'}"


def _load() -> str | None:
    if not LIBRARY.is_file():
        return _why_missing()
    requested = os.environ.get(CAPABILITY_VARIABLE)
    if requested and requested not in CAPABILITIES:
        expected = ", ".join(CAPABILITIES)
        return f"not loaded: {CAPABILITY_VARIABLE}: got {requested!r}, expected one of {expected}"
    try:
        torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call,unused-ignore]
    except Exception as error:
        cause = error.__cause__ or error
        return f"not loadable: {' '.join(str(cause).split()) or type(cause).__name__}"
    return None


def load() -> str | None:
    """Load the extension's operators, once.

    Returns:
        None if they are loaded, else the reason in one line. It never raises.
    """
    if LIBRARY not in _outcomes:
        _outcomes[LIBRARY] = _load()
    return _outcomes[LIBRARY]


def build_report() -> dict[str, str | None] | None:
    """Return how the extension was built.

    Returns:
        ``compiler``, C++ ``standard``, ``flags``, ``cuda`` and ``cuda_architectures`` (None: built
        without), ``torch``, ``target_abi``, and ``hash``, a SHA-256 over sources and flags; None
        without such a report.
    """
    try:
        spec = PathFinder.find_spec("singer_kernels._build", [str(LIBRARY.parent)])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return dict(module.report())
    except Exception:  # an ImportError, or any error of a broken file
        return None


def cpu_capability() -> str | None:
    """Return the instruction set of the CPU kernels: the widest that the processor has.

    ``SINGER_CPU_CAPABILITY``, set to a narrower one before Python starts, selects that instead.

    Returns:
        ``avx512``, ``avx2`` or ``baseline`` (what every processor of the architecture has); None if
        the extension can't be loaded or is the build of another version.
    """
    if load() is not None:
        return None
    name = getattr(ctypes.CDLL(str(LIBRARY)), "singer_cpu_capability", None)
    if name is None:
        return None
    name.restype = ctypes.c_char_p
    return str(name().decode())


def cuda_kernels() -> list[str]:
    """Return the names of the extension's CUDA kernels, such as ``refine_kernel<float>``.

    Returns:
        Each name once, in the library's order; empty if the extension is off or without CUDA.
    """
    if load() is not None:
        return []
    library = ctypes.CDLL(str(LIBRARY))
    if not hasattr(library, "singer_cuda_kernel_name"):
        return []
    name_of = library.singer_cuda_kernel_name
    name_of.argtypes, name_of.restype = [ctypes.c_int32], ctypes.c_char_p
    return [name.decode() for name in iter(map(name_of, itertools.count()).__next__, None)]


def cuda_usages(device: int) -> tuple[list[KernelUsage], str]:
    """Return the resources of the extension's CUDA kernels on a device, as reported by CUDA.

    Args:
        device: index of the CUDA device; the current device does not change.

    Returns:
        An entry for each of :func:`cuda_kernels` and ``""``, or none and the reason in one line.
    """
    names = cuda_kernels()
    if not names:
        off = load()
        return [], "the extension is built without CUDA" if off is None else "the extension is off"
    usage_of = ctypes.CDLL(str(LIBRARY)).singer_cuda_kernel_usage
    numbers = (ctypes.c_int32 * (len(KernelUsage._fields) - 1))()
    usage_of.argtypes, usage_of.restype = [ctypes.c_int32] * 2 + [type(numbers)], ctypes.c_char_p
    usages = []
    for index, name in enumerate(names):
        reason = usage_of(index, device, numbers)
        if reason is not None:
            return [], f"CUDA answers: {reason.decode()}"
        usages.append(KernelUsage(name, *numbers))
    return usages, ""


def has_kernels(name: str, device_type: str) -> bool:
    """Return whether an operator has a compiled kernel for a type of device.

    Args:
        name: the operator's name, such as ``cuda_refine``.
        device_type: ``cpu`` or ``cuda``.
    """
    load()
    key = device_type.upper()
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"singer_kernels::{name}", key))
