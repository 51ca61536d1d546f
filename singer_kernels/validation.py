"""Argument checks. Every error names the argument, what came and what was expected."""

from __future__ import annotations

import numbers
import reprlib
from typing import cast

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype} on {value.device}"
    return f"{reprlib.repr(value)} of type {type(value).__name__}"


def check_tensor(name: str, value: object, dims: str) -> Tensor:
    """Check that a value is a dense, non-empty floating tensor with the named dimensions.

    Args:
        name: the argument's name, for the message.
        value: what came.
        dims: the expected dimensions, for example ``"[B, T, D]"``.

    Raises:
        TypeError: the value is no tensor, not dense, or of no supported floating dtype.
        ValueError: the number of dimensions is wrong, or one of them is 0.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {_describe(value)}, expected a tensor {dims}")
    if hasattr(value, "placements"):
        raise TypeError(
            f"{name}: got a DTensor, expected a plain tensor {dims}: "
            f"call the sharded module itself, or pass {name}.full_tensor()"
        )
    if value.is_nested or value.layout != torch.strided:
        layout = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name}: got {layout}, expected a dense tensor {dims}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name}: got dtype {value.dtype}, expected float64, float32, bfloat16 or float16"
        )
    if value.ndim != dims.count(",") + 1:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {dims}")
    if 0 in value.shape:
        raise ValueError(
            f"{name}: got the empty shape {tuple(value.shape)}, expected {dims} with no size 0"
        )
    return value


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise a ValueError unless two tensors live on one device."""
    if value.device != other.device:
        raise ValueError(
            f"{name}: got device {value.device}, expected {other.device}, that of {other_name}"
        )


def check_same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise a ValueError unless two tensors have one shape and live on one device."""
    if value.shape != other.shape:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, expected {tuple(other.shape)}, "
            f"that of {other_name}"
        )
    check_same_device(name, value, other_name, other)


def check_frozen(name: str, value: Tensor) -> None:
    """Raise a ValueError if a tensor requires grad."""
    if value.requires_grad:
        raise ValueError(
            f"{name}: got a tensor that requires grad, expected frozen features "
            f"(run the teacher under torch.no_grad(), or pass {name}.detach())"
        )


def _check_integral(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name}: got {_describe(value)}, expected an int")
    # int() of a size that torch.compile or torch.export keeps symbolic would fix it.
    return cast("int", value) if isinstance(value, torch.SymInt) else int(value)


def check_int(name: str, value: object, low: int, high: int | None = None, why: str = "") -> int:
    """Check that a value is an integer between two bounds, both included.

    Args:
        name: the argument's name, for the message.
        value: what came.
        low: the smallest allowed.
        high: the largest allowed; None: there is none.
        why: what sets the bounds, for the message.

    Returns:
        The value as an int.

    Raises:
        TypeError: it is no integer.
        ValueError: it lies outside the bounds.
    """
    number = _check_integral(name, value)
    if number < low or (high is not None and number > high):
        bounds = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}: got {value}, expected {bounds}{why}")
    return number


def check_num_prefix_tokens(num_prefix_tokens: object, num_tokens: int) -> int:
    """Check the number of prefix tokens against the number of tokens.

    Returns:
        ``num_prefix_tokens``.

    Raises:
        TypeError: it is no integer.
        ValueError: it is negative, or leaves no patch.
    """
    number = _check_integral("num_prefix_tokens", num_prefix_tokens)
    if number < 0 or number >= num_tokens:
        # Formatted here alone: the text of a symbolic size would fix it.
        raise ValueError(
            f"num_prefix_tokens: got {num_prefix_tokens}, expected 0 to {num_tokens - 1} "
            f"(there are {num_tokens} tokens, and at least one must be a patch)"
        )
    return number


def check_quantile(quantile: object) -> float:
    """Check that the quantile is a number in [0, 1].

    Returns:
        ``quantile`` as a float.

    Raises:
        TypeError: it is no real number.
        ValueError: it lies outside [0, 1] or is NaN.
    """
    if isinstance(quantile, bool) or not isinstance(quantile, numbers.Real):
        raise TypeError(f"quantile: got {_describe(quantile)}, expected a number in [0, 1]")
    number = float(quantile)
    if not 0 <= number <= 1:  # NaN too
        raise ValueError(f"quantile: got {quantile}, expected a number in [0, 1]")
    return number


def check_flag(name: str, value: object) -> bool:
    """Return an option; raise a TypeError if it is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {_describe(value)}, expected True or False")
    return value


def check_adapter(teacher: Tensor, down: object, up: object) -> None:
    """Check the adapter's two matrices against each other and against the teacher's width.

    Raises:
        TypeError: one is no floating tensor.
        ValueError: a shape does not fit, or a device differs.
    """
    down = check_tensor("down", down, "[D, r]")
    up = check_tensor("up", up, "[r, D]")
    width = teacher.shape[-1]
    if down.shape[0] != width:
        raise ValueError(
            f"down: got shape {tuple(down.shape)}, expected [D, r] with D = {width}, "
            f"the width of teacher"
        )
    if up.shape != (down.shape[1], width):
        raise ValueError(
            f"up: got shape {tuple(up.shape)}, expected {(down.shape[1], width)}: "
            f"[r, D] with the rank r of down and the width D of teacher"
        )
    check_same_device("down", down, "teacher", teacher)
    check_same_device("up", up, "teacher", teacher)
