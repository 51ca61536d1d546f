"""Helpers of the launches: precision, tile sizes, devices, layouts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from singer_kernels.backends.precision import storage_dtype
from singer_kernels.backends.triton import configs, tuning
from singer_kernels.backends.triton.language import INTERPRETED

Result = TypeVar("Result")


class MatmulPrecision(NamedTuple):
    """Dtypes of matrix products on one architecture."""

    product: torch.dtype  # of the operands
    acc: torch.dtype  # of the sums
    arch: int | None  # one of configs.ARCHITECTURES; None: the interpreter

    @property
    def operand(self) -> Any:
        """Operand dtype in a kernel; float32 for float16, which lacks the range of F̂ and X."""
        if self.product == torch.float16:
            return tl.float32
        return getattr(tl, self.operand_name)

    @property
    def operand_name(self) -> str:
        """Name of the operand dtype in a kernel."""
        dtype = torch.float32 if self.product == torch.float16 else self.product
        return str(dtype).removeprefix("torch.")

    @property
    def storage_dtype(self) -> torch.dtype:
        """Dtype of intermediate results in memory; float16 would lose their range."""
        return storage_dtype(self.product, self.acc)

    def input_precision(self, rank: int) -> str:
        """Return ``tl.dot``'s input_precision: three TF32 products for float32, where they fit.

        Never a single one: the matrix unit truncates 13 bits of the operands.
        """
        is_narrow = self.operand_name == "float32" and rank <= configs.MAX_MATRIX_RANK
        return "tf32x3" if is_narrow else "ieee"

    def kernel_options(self, rank: int) -> dict[str, Any]:
        """Return the constexpr arguments of every kernel with products."""
        return {
            "OPERAND": self.operand,
            "PRECISION": self.input_precision(rank),
            "ACC": kernel_dtype(self.acc),
        }

    def config(self, kernel: str, rank: int) -> configs.Config:
        """Return a kernel's configuration in the table."""
        return configs.lookup(kernel, self.arch, self.operand_name, rank)

    def run(
        self,
        kernel: str,
        rank: int,
        launch: Callable[[configs.Config], Result],
        *sizes: object,
    ) -> Result:
        """Call ``launch`` with a kernel's configuration: the table's, or the autotuned one.

        Args:
            kernel: a key of ``configs.TABLE``.
            rank: r.
            launch: launches the kernel with a configuration.
            sizes: further parts of the autotuning key.
        """
        config = self.config(kernel, rank)
        if self.arch is None or not tuning.is_on():
            return launch(config)
        device = torch.cuda.get_device_name().replace(" ", "-")
        key = (
            device,
            triton.__version__,
            self.operand_name,
            self.input_precision(rank),
            rank,
            *sizes,
        )
        return tuning.run_tuned(kernel, config, launch, key)


def architecture(device: torch.device) -> int | None:
    """Return the table's architecture for a device; None: the interpreter."""
    if INTERPRETED.value:
        return None
    return configs.architecture(torch.cuda.get_device_capability(device))


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


def kernel_dtype(dtype: torch.dtype) -> Any:
    """Return Triton's dtype for a torch dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))
