"""The sizes of one call, by which a backend decides whether it serves it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Problem(NamedTuple):
    """One call's sizes and dtypes.

    Attributes:
        images: B.
        patches: P.
        rank: r; 0 where there is no adapter.
        acc: the accumulation dtype, float64 or float32.
        product: the dtype of the products' operands.
    """

    images: int
    patches: int
    rank: int
    acc: torch.dtype
    product: torch.dtype
