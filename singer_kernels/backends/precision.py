"""Dtypes of matrix products and saved tensors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling


class MatmulPrecision(NamedTuple):
    """Dtypes of matrix products."""

    product: torch.dtype  # of the operands
    acc: torch.dtype  # of the sums

    @classmethod
    def of(cls, acc: torch.dtype, *operands: Tensor) -> MatmulPrecision:
        """Return the dtypes of a call: the promoted one or autocast's, but float64 stays float64.

        Args:
            acc: the accumulation dtype.
            operands: the operands of all products.
        """
        device_type = operands[0].device.type
        if acc == torch.float64:
            return cls(acc, acc)
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            return cls(torch.get_autocast_dtype(device_type), acc)
        return cls(reduce(torch.promote_types, [tensor.dtype for tensor in operands]), acc)

    @property
    def storage_dtype(self) -> torch.dtype:
        """Dtype of a kernel's operands and of saved tensors: float16 lacks the range of H and X."""
        return torch.bfloat16 if self.product == torch.bfloat16 else self.acc

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``a b`` in ``acc``, of rounded operands; matrices, or batches of them."""
        a, b = a.to(self.storage_dtype), b.to(self.storage_dtype)
        if self.storage_dtype == self.acc:
            return torch.matmul(a, b)
        if a.is_cuda:
            return (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out_dtype=self.acc)
        return torch.matmul(a.to(self.acc), b.to(self.acc))

    def multiply_split(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``a b`` with a split into a high and a low operand: twice the digits."""
        if self.storage_dtype == self.acc:
            return self.multiply(a, b)
        high = a.to(self.storage_dtype)
        low = (a - high.to(a.dtype)).to(self.storage_dtype)
        return self.multiply(torch.cat([high, low], dim=1), torch.cat([b, b], dim=0))


class _Tf32:
    """Turns off torch's TF32 setting for CUDA products while any thread asks for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: str | None = None  # torch.get_float32_matmul_precision()
        self._was_on = False
        self._on_cpu = ""  # what set_float32_matmul_precision sets as well

    def enter(self) -> None:
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            self._was_on = torch.backends.cuda.matmul.fp32_precision == "tf32"
            if not self._was_on:
                return
            try:
                self._before = torch.get_float32_matmul_precision()
            except RuntimeError:  # the setting was changed by fp32_precision alone
                self._before = None
            self._on_cpu = torch.backends.mkldnn.matmul.fp32_precision
            torch.backends.cuda.matmul.allow_tf32 = False

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users > 0 or not self._was_on:
                return
            if self._before is None:
                torch.backends.cuda.matmul.fp32_precision = "tf32"
            elif self._before == "medium":
                torch.set_float32_matmul_precision("medium")
                torch.backends.mkldnn.matmul.fp32_precision = self._on_cpu
            else:
                torch.backends.cuda.matmul.allow_tf32 = True


_tf32 = _Tf32()


@contextmanager
def full_float32(precision: MatmulPrecision) -> Iterator[None]:
    """Run float32 products on CUDA without TF32, unless the features are float32 themselves.

    Of narrow features the intermediate results are float32; TF32 would drop the digits that they
    are kept for. Only inside of an operator, which torch.compile does not trace.
    """
    if precision.product == precision.acc:
        yield
        return
    _tf32.enter()
    try:
        yield
    finally:
        _tf32.leave()


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Return a context without autocast."""
    if device_type == "meta":  # it knows no autocast; asking whether it does, torch can't compile
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def saved(tensor: Tensor | None, needed: bool) -> Tensor | None:
    """Return the tensor to save for the backward, or None; inference tensors are copied."""
    if tensor is None or not needed:
        return None
    is_inference = not is_compiling() and tensor.is_inference()
    return tensor.clone() if is_inference else tensor
