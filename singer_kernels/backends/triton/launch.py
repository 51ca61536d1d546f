"""What the launches share: arithmetic, tile sizes, devices and layouts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from singer_kernels.backends.operators import narrow_dtype
from singer_kernels.backends.triton import configs, tuning
from singer_kernels.backends.triton.language import INTERPRETED

Result = TypeVar("Result")


class Arithmetic(NamedTuple):
    """How products are computed on the device at hand."""

    product: torch.dtype  # what the operands are rounded to
    acc: torch.dtype  # what sums are kept in
    arch: int | None  # None: the interpreter

    @property
    def operand(self) -> Any:
        """The operands' dtype in a kernel. float16 lacks the range of F̂ and X: float32 takes it."""
        if self.product == torch.float16:
            return tl.float32
        return getattr(tl, self.name)

    @property
    def name(self) -> str:
        """The operands' dtype in a kernel, by its name."""
        dtype = torch.float32 if self.product == torch.float16 else self.product
        return str(dtype).removeprefix("torch.")

    @property
    def kept(self) -> torch.dtype:
        """What products are stored in between kernels; float16 would lose their range."""
        return narrow_dtype(self.product, self.acc)

    def precision(self, rank: int) -> str:
        """Return how float32 operands are multiplied: by three TF32 products, where they fit.

        Not by one, even where torch may: the matrix unit would cut 13 bits off, not round them.
        """
        is_narrow = self.name == "float32" and rank <= configs.MAX_MATRIX_RANK
        return "tf32x3" if is_narrow else "ieee"

    def options(self, rank: int) -> dict[str, Any]:
        """Return the constants that every kernel with products takes."""
        return {
            "OPERAND": self.operand,
            "PRECISION": self.precision(rank),
            "ACC": kernel_dtype(self.acc),
        }

    def config(self, kernel: str, rank: int) -> configs.Config:
        """Return a kernel's configuration here, by the table."""
        return configs.lookup(kernel, self.arch, self.name, rank)

    def run(
        self,
        kernel: str,
        rank: int,
        attempt: Callable[[configs.Config], Result],
        *sizes: object,
    ) -> Result:
        """Run ``attempt`` with a kernel's configuration: the table's, or the tuned one.

        Args:
            kernel: a key of ``configs.TABLE``.
            rank: r.
            attempt: launches the kernel.
            sizes: what else a tuned configuration depends on.
        """
        config = self.config(kernel, rank)
        if self.arch is None or not tuning.is_on():
            return attempt(config)
        device = torch.cuda.get_device_name().replace(" ", "-")
        key = (device, triton.__version__, self.name, self.precision(rank), rank, *sizes)
        return tuning.run_tuned(kernel, config, attempt, key)


def architecture(device: torch.device) -> int | None:
    """Return the architecture that configurations are looked up for; None: the interpreter."""
    if INTERPRETED.value:
        return None
    return configs.architecture(torch.cuda.get_device_capability(device))


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device the current one: Triton launches there."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()


def block_of(size: int) -> int:
    """Return the power of two, at least 16, that holds a size: the least that a product takes."""
    return max(16, triton.next_power_of_2(size))


def rows_contiguous(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy of it if its last dimension is not contiguous."""
    is_contiguous = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    return tensor if is_contiguous else tensor.contiguous()


def compiling(config: configs.Config) -> dict[str, Any]:
    """Return a configuration's compiler options. Multiply-adds are fused, whatever the default."""
    return {
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
        "maxnreg": config.registers,
    }


def meta(
    config: configs.Config, block_r: int | None = None, rows: str = "BLOCK_T"
) -> dict[str, Any]:
    """Return a kernel's tile sizes and compiler options."""
    options = {
        rows: config.rows,
        "BLOCK_D": config.inner,
        **compiling(config),
    }
    return options if block_r is None else {**options, "BLOCK_R": block_r}


def kernel_dtype(dtype: torch.dtype) -> Any:
    """Return a dtype as a kernel takes it."""
    return getattr(tl, str(dtype).removeprefix("torch."))
