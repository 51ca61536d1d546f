"""Memory of a pass: bytes saved for the backward, and the peak."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CLEAR = Path("/proc/self/clear_refs")


def _saved_tensors(node: Any) -> Iterable[Tensor]:
    # A node written in Python has saved_tensors; one of C++ an attribute _saved_* per tensor.
    values = getattr(node, "saved_tensors", None)
    if values is None:
        values = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    for value in values:
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(tensor, Tensor):
                yield tensor


def saved_for_backward(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> int:
    """Return the bytes that the autograd graph of outputs keeps alive, inputs excluded.

    Tensors that share memory count once.

    Args:
        outputs: results of a forward pass.
        inputs: its inputs.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    total, seen = 0, set()
    nodes = [output.grad_fn for output in outputs if output.grad_fn is not None]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        nodes += [child for child, _ in node.next_functions if child is not None]
        for tensor in _saved_tensors(node):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                total += storage.nbytes()
    return total


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def peak_memory_increase(run: Callable[[], Any], device: torch.device) -> int | None:
    """Return the peak memory of a call above the level before it, in bytes.

    Args:
        run: the call.
        device: on a GPU the peak is the caching allocator's; on a CPU the resident memory's.

    Returns:
        The increase; None on a CPU without Linux's ``clear_refs`` and glibc.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        level = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - level
    if not os.access(_CLEAR, os.W_OK) or platform.libc_ver()[0] != "glibc":
        return None
    ctypes.CDLL("libc.so.6").malloc_trim(
        0
    )  # freed pages that the call could reuse would hide its peak
    _CLEAR.write_text("5", encoding="ascii")  # resets the peak, VmHWM, to the current VmRSS
    level = _resident("VmRSS")
    run()
    return max(0, _resident("VmHWM") - level)
