"""Shared by the launches: configurations, kernel arguments, devices, layouts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from singer_kernels.backends.precision import MatmulPrecision
from singer_kernels.backends.triton import configs, tuning
from singer_kernels.backends.triton.language import INTERPRETED

Result = TypeVar("Result")


def architecture() -> int | None:
    """Return the current device's architecture in the table; None: the interpreter."""
    if INTERPRETED.value:
        return None
    return configs.architecture(torch.cuda.get_device_capability())


def input_precision(precision: MatmulPrecision, rank: int) -> str:
    """Return ``tl.dot``'s input_precision: three TF32 products for float32, where they fit.

    Never a single one: the matrix unit truncates 13 bits of the operands.
    """
    is_float32 = precision.storage_dtype == torch.float32
    return "tf32x3" if is_float32 and rank <= configs.MAX_MATRIX_RANK else "ieee"


def kernel_options(precision: MatmulPrecision, rank: int) -> dict[str, Any]:
    """Return the constexpr arguments of every kernel with products."""
    return {
        "OPERAND": kernel_dtype(precision.storage_dtype),
        "PRECISION": input_precision(precision, rank),
        "ACC": kernel_dtype(precision.acc),
    }


def table_config(kernel: str, precision: MatmulPrecision, rank: int) -> configs.Config:
    """Return a kernel's configuration in the table, for the current device."""
    return configs.lookup(kernel, architecture(), dtype_name(precision.storage_dtype), rank)


def run_configured(
    kernel: str,
    precision: MatmulPrecision,
    rank: int,
    launch: Callable[[configs.Config], Result],
    *sizes: object,
) -> Result:
    """Call ``launch`` with a kernel's configuration: the table's, or the autotuned one.

    Kernel, precision, rank and the further ``sizes`` are the autotuning key.
    """
    config = table_config(kernel, precision, rank)
    if architecture() is None or not tuning.is_on():
        return launch(config)
    key = (
        torch.cuda.get_device_name().replace(" ", "-"),
        triton.__version__,
        dtype_name(precision.storage_dtype),
        input_precision(precision, rank),
        rank,
        *sizes,
    )
    return tuning.run_tuned(kernel, config, launch, key)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device the current one: Triton launches there."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()


def block_of(size: int) -> int:
    """Return the next power of two, at least 16: the smallest tile of ``tl.dot``."""
    return max(16, triton.next_power_of_2(size))


def rows_contiguous(tensor: Tensor) -> Tensor:
    """Return the tensor, copied if its last dimension is not contiguous."""
    is_contiguous = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    return tensor if is_contiguous else tensor.contiguous()


def token_strides(tokens: Tensor | None) -> tuple[int, int]:
    """Return the image and token strides of ``[B, T, D]``; zeros for None."""
    return (0, 0) if tokens is None else (tokens.stride(0), tokens.stride(1))


def compiler_options(config: configs.Config) -> dict[str, Any]:
    """Return the compiler options of a configuration; multiply-adds are always fused."""
    return {
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
        "maxnreg": config.registers,
    }


def meta_params(config: configs.Config, block_r: int, rows: str = "BLOCK_T") -> dict[str, Any]:
    """Return a kernel's tile sizes and compiler options."""
    return {
        rows: config.rows,
        "BLOCK_D": config.inner,
        "BLOCK_R": block_r,
        **compiler_options(config),
    }


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name, the same in torch and Triton."""
    return str(dtype).removeprefix("torch.")


def kernel_dtype(dtype: torch.dtype) -> Any:
    """Return Triton's dtype for a torch dtype."""
    return getattr(tl, dtype_name(dtype))
