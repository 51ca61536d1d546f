"""Device functions shared by the kernels: rounding, products, tiles in memory."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether Triton's interpreter runs the kernels (``TRITON_INTERPRET=1``), on NumPy arrays.

The interpreter truncates to bfloat16 instead of rounding, and multiplies bfloat16 as raw bits:
there the kernels hold bfloat16 operands as rounded float32."""

NORM_EPS = tl.constexpr(1e-12)
"""Smallest denominator of the Gram matrix's row normalisation, as in the reference."""


@triton.jit
def _nearest_bfloat16(x):
    """Round float32 to the nearest bfloat16, ties to even; the result is float32."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def operand(x, OPERAND: tl.constexpr):
    """Round to nearest even, to the dtype of a product's operands."""
    if INTERPRETED and OPERAND == tl.bfloat16:
        return _nearest_bfloat16(x.to(tl.float32))
    else:
        return x.to(OPERAND)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return ``acc + a b``; a and b are operands."""
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def split_dot(x, b, acc, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Return ``acc + x b`` with x split into bfloat16 high and low parts: twice the digits."""
    if OPERAND == tl.bfloat16:
        high = operand(x, OPERAND)
        low = operand(x - high.to(x.dtype), OPERAND)
        acc = dot(low, b, acc, PRECISION)
        return dot(high, b, acc, PRECISION)
    else:
        return dot(x, b, acc, PRECISION)


@triton.jit
def split_dot_transposed(x, y, acc, OPERAND: tl.constexpr):
    """Return ``acc + x yᵀ``, both split into bfloat16 high and low parts; drop low times low."""
    x_high = operand(x, OPERAND)
    y_high = operand(y, OPERAND)
    x_low = operand(x - x_high.to(x.dtype), OPERAND)
    y_low = operand(y - y_high.to(y.dtype), OPERAND)
    acc = tl.dot(x_low, tl.trans(y_high), acc)
    acc = tl.dot(x_high, tl.trans(y_low), acc)
    return tl.dot(x_high, tl.trans(y_high), acc)


@triton.jit
def load_tile(ptr, row_offsets, columns, row_mask, num_columns):
    """Load a tile, 0 outside; ``row_offsets`` in elements, ``columns`` contiguous."""
    mask = row_mask[:, None] & (columns < num_columns)[None, :]
    return tl.load(ptr + row_offsets[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, row_offsets, columns, row_mask, num_columns, value):
    """Store a tile, rounded to the pointer's dtype."""
    mask = row_mask[:, None] & (columns < num_columns)[None, :]
    value = operand(value, ptr.dtype.element_ty).to(ptr.dtype.element_ty)
    tl.store(ptr + row_offsets[:, None] + columns[None, :], value, mask=mask)


@triton.jit
def token_offsets(image, token, stride_image, stride_token):
    """Return the tokens' offsets in elements; int64: a batch may exceed 2³¹ elements."""
    return image.to(tl.int64) * stride_image + token.to(tl.int64) * stride_token


@triton.jit
def sqrt(x):
    """Return the square root, correctly rounded; ``tl.sqrt`` is approximate in float32."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def reciprocal(norms):
    """Return ``1 / max(n, 1e-12)``, and 0 where n = 0; NaN stays NaN."""
    eps = tl.full((), NORM_EPS, norms.dtype)
    return tl.where(norms == 0, 0.0, 1.0 / tl.where(norms < eps, eps, norms))


@triton.jit
def gram_norm_coefficient(norms, row_dots):
    """Return ``s / n²``, the coefficient of F̂ in X F̂ through the norms; 0 where n < 1e-12."""
    inv_norms = reciprocal(norms)
    is_small = norms < tl.full((), NORM_EPS, norms.dtype)
    return tl.where(is_small, 0.0, row_dots * inv_norms * inv_norms)


@triton.jit
def to_scalar(count, ACC: tl.constexpr):
    """Return an integer argument as a scalar tensor; Triton specialises 1 to a Python int."""
    return tl.zeros((), ACC) + count
