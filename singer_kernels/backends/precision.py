"""Dtypes of matrix products and saved tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling


def product_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of a product's operands: the promoted one, or that of autocast."""
    device_type = tensors[0].device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return reduce(torch.promote_types, [tensor.dtype for tensor in tensors])


def storage_dtype(product: torch.dtype, acc: torch.dtype) -> torch.dtype:
    """Return the dtype of operands and saved tensors: float16 lacks the range of H and X."""
    return torch.bfloat16 if product == torch.bfloat16 else acc


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
