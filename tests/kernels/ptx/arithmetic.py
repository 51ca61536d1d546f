"""Arithmetic, comparisons, moves and conversions as functions on all lanes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.memory import UINT, PtxError
from ptx.parser import SIZES, Instruction, Operand

if TYPE_CHECKING:
    from ptx.emulator import Machine, Step

F32, F64, I64, U8, U16, U32, U64 = (
    np.float32, np.float64, np.int64, np.uint8, np.uint16, np.uint32, np.uint64,
)  # fmt: skip


def check(i: Instruction, modifiers: list[str], *known: str) -> None:
    unknown = set(modifiers) - set(known)
    if unknown:
        raise PtxError(f"unknown opcode {i.opcode}: {', '.join(sorted(unknown))}")


def dtype_of(kind: str) -> type:
    """Return NumPy's dtype for a PTX type."""
    if kind == "pred":
        return np.bool_
    size = SIZES[kind]
    return {"s": np.dtype(f"i{size}").type, "f": np.dtype(f"f{max(size, 2)}").type}.get(
        kind[0], UINT[size]
    )


def write(m: Machine, name: Operand, dtype: type, function: Any, sources: list[Any]) -> Step:
    """Return a step that assigns ``function(*sources)`` to a register of that dtype."""
    target = m.register(name, dtype)
    if isinstance(function, np.ufunc):

        def step(mask: np.ndarray | None) -> None:
            if mask is None:
                function(*sources, out=target)
            else:
                np.copyto(target, function(*sources), where=mask)

    else:

        def step(mask: np.ndarray | None) -> None:
            np.copyto(target, function(*sources), where=True if mask is None else mask)

    return step


# --- arithmetic -----------------------------------------------------------------------------------


def _divide(a, b):  # towards zero, unlike NumPy
    quotient = a // b
    if np.issubdtype(a.dtype, np.signedinteger):
        quotient += (quotient * b != a) & ((a < 0) != (b < 0))
    return quotient


def _shift(function):
    def shift(a, amount):  # by 32 and more: all bits leave
        bits = 8 * a.dtype.itemsize
        if np.issubdtype(a.dtype, np.signedinteger):
            return function(a, np.minimum(amount, bits - 1).astype(a.dtype))
        shifted = function(a, np.minimum(amount, bits - 1).astype(a.dtype))
        return np.where(amount < bits, shifted, a.dtype.type(0))

    return shift


def fused_multiply_add(a, b, c):
    """Return ``a b + c``; of float32 the product is exact in float64, and the sum rounded twice."""
    wide = F64 if np.result_type(a, b, c) == F32 else np.longdouble
    return (np.multiply(a, b, dtype=wide) + c).astype(np.result_type(a, b, c))


def _bit_field(a, position, length):
    wide = a.astype(np.int64 if np.issubdtype(a.dtype, np.signedinteger) else U64)
    top = (64 - position.astype(I64) - length.astype(I64)).astype(wide.dtype)
    low = (64 - length.astype(I64)).astype(wide.dtype)
    return np.where(length == 0, 0, (wide << top) >> low).astype(a.dtype)


def _insert_bits(a, b, position, length):
    bits = (np.left_shift(1, length.astype(I64)) - 1).astype(a.dtype)
    field = bits << position.astype(a.dtype)
    return b & ~field | (a & bits) << position.astype(a.dtype)


def _permute(a, b, selector):
    both, result = a.astype(U64) | b.astype(U64) << U64(32), np.zeros((), U32)
    for k in range(4):
        nibble = selector >> U32(4 * k) & U32(15)
        byte = (both >> ((nibble & U32(7)) * U32(8)).astype(U64)).astype(U32) & U32(255)
        sign = np.where(byte & U32(128), U32(255), U32(0))
        result = result | np.where(nibble & U32(8), sign, byte) << U32(8 * k)
    return result


def _logic(a, b, c, table):
    result = np.zeros((), U32)
    for k in range(8):
        if int(table) >> k & 1:
            terms = (x if k >> s & 1 else ~x for x, s in ((a, 2), (b, 1), (c, 0)))
            x, y, z = terms
            result = result | x & y & z
    return result


def _funnel_left(low, high, amount):
    return (
        (high.astype(U64) << U64(32) | low) << (amount & U32(31)).astype(U64) >> U64(32)
    ).astype(U32)


def _funnel_right(low, high, amount):
    return ((high.astype(U64) << U64(32) | low) >> (amount & U32(31)).astype(U64)).astype(U32)


def _count_bits(a):
    bits = a.reshape(-1, 1).view(U8)
    return np.unpackbits(bits, axis=1).sum(axis=1, dtype=U32)


ELEMENTWISE: dict[str, Any] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c,
    "fma": fused_multiply_add,
    "div": _divide,
    "rem": np.fmod,
    "min": np.minimum,
    "max": np.maximum,
    "abs": np.abs,
    "neg": np.negative,
    "sqrt": np.sqrt,
    "rcp": np.reciprocal,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "shl": _shift(np.left_shift),
    "shr": _shift(np.right_shift),
    "bfe": _bit_field,
    "bfi": _insert_bits,
    "prmt": _permute,
    "lop3": _logic,
    "shf": None,
    "popc": _count_bits,
    "selp": lambda a, b, p: np.where(p, a, b),
}
_FLOAT = {"div": np.divide, "min": np.fmin, "max": np.fmax}
_PAIRS = {"neg": lambda a: a ^ U32(0x80008000), "abs": lambda a: a & U32(0x7FFF7FFF)}


def elementwise(m: Machine, i: Instruction, name: str, rest: list[str], kinds: list[str]) -> Step:
    function, is_pair = ELEMENTWISE[name], rest in (["bf16x2"], ["f16x2"])
    if is_pair and name in _PAIRS:
        return write(m, i.operands[0], U32, _PAIRS[name], [m.source(i.operands[1], U32)])
    dtype = dtype_of(kinds[-1])
    is_float = issubclass(dtype, np.floating)
    known = {
        "mul": ["rn"] if is_float else ["lo", "wide"],
        "mad": ["lo", "wide"],
        "add": ["rn"] * is_float,
        "sub": ["rn"] * is_float,
        "fma": ["rn"],
        "div": ["rn", "full"] * is_float,
        "sqrt": ["rn"],
        "rcp": ["rn"],
        "min": ["NaN"] * is_float,
        "max": ["NaN"] * is_float,
        "lop3": ["b32"],
        "shf": ["l", "r", "wrap"],
    }
    check(i, rest, *known.get(name, []))
    if is_float and name in _FLOAT and "NaN" not in rest:
        function = _FLOAT[name]
    target, *operands = i.operands
    dtypes = [dtype] * len(operands)
    if name in ("shl", "shr", "bfe"):
        dtypes[1:] = [U32] * (len(operands) - 1)
    elif name == "bfi":
        dtypes[2:] = [U32, U32]
    elif name == "selp":
        dtypes[2] = np.bool_
    elif name == "shf":
        function = _funnel_left if "l" in rest else _funnel_right
    result = U32 if name == "popc" else dtype
    if "wide" in rest:
        result = np.dtype(f"{dtype(0).dtype.kind}{2 * SIZES[kinds[-1]]}").type
        dtypes[2:] = [result] * (len(operands) - 2)
        narrow = function

        def function(a, b, *c):
            return narrow(np.asarray(a).astype(result), np.asarray(b).astype(result), *c)

    sources = [m.source(x, each) for x, each in zip(operands, dtypes, strict=True)]
    return write(m, target, result, function, sources)


# --- comparisons, moves, conversions --------------------------------------------------------------

_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
    "equ": lambda a, b: ~((a < b) | (a > b)), "neu": np.not_equal, "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b), "nan": lambda a, b: (a != a) | (b != b),
}  # fmt: skip
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _set_predicate(m: Machine, i: Instruction, rest: list[str], kinds: list[str]) -> Step:
    check(i, rest, *_COMPARE, *_COMBINE)
    dtype, (target, a, b, *other) = dtype_of(kinds[-1]), i.operands
    compare = _COMPARE[rest[0]]
    if rest[0] == "ne" and issubclass(dtype, np.floating):  # ordered, unlike NumPy's
        compare = lambda a, b: (a < b) | (a > b)  # noqa: E731
    if not other and not isinstance(target, tuple):
        return write(m, target, np.bool_, compare, [m.source(a, dtype), m.source(b, dtype)])
    targets = target if isinstance(target, tuple) else (target,)
    sources = [m.source(a, dtype), m.source(b, dtype)]
    registers = [m.register(x, np.bool_) for x in targets if x != "_"]

    def step(mask: np.ndarray | None) -> None:
        found = compare(*sources)
        for register, value in zip(registers, (found, ~found), strict=False):
            if other:
                value = _COMBINE[rest[1]](value, m.predicate(other[0]))
            np.copyto(register, value, where=True if mask is None else mask)

    return step


def _move(m: Machine, i: Instruction, rest: list[str], kinds: list[str]) -> Step:
    check(i, rest)
    (target, source), dtype = i.operands, dtype_of(kinds[0])
    if isinstance(target, tuple) or isinstance(source, tuple):  # {low, high}
        parts = target if isinstance(target, tuple) else source
        piece = UINT[np.dtype(dtype).itemsize // len(parts)]
        bits = 8 * np.dtype(piece).itemsize
        if isinstance(source, tuple):
            values = [m.source(x, piece) for x in parts]

            def pack(*values):
                shifted = [
                    np.asarray(x).astype(dtype) << dtype(bits * k) for k, x in enumerate(values)
                ]
                return np.bitwise_or.reduce(np.broadcast_arrays(*shifted))

            return write(m, target, dtype, pack, values)
        steps = [
            write(
                m,
                x,
                piece,
                lambda a, k=k: (a >> dtype(bits * k)).astype(piece),
                [m.source(source, dtype)],
            )
            for k, x in enumerate(parts)
            if x != "_"
        ]

        def step(mask: np.ndarray | None) -> None:
            for each in steps:
                each(mask)

        return step
    return write(m, target, dtype, np.positive if dtype is not np.bool_ else np.logical_or,
                 [m.source(source, dtype)] * (1 + (dtype is np.bool_)))  # fmt: skip


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, ties to even; return its bits, uint16."""
    bits = x.view(U32)
    rounded = (bits + U32(0x7FFF) + (bits >> U32(16) & U32(1))) >> U32(16)
    return np.where(x == x, rounded, U32(0x7FFF)).astype(U16)


def bfloat16_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(U32) << U32(16)).view(F32)


def _narrow(x: np.ndarray, kind: str) -> np.ndarray:
    """Round float32 to the bits of bfloat16 or float16."""
    x = np.asarray(x, F32)
    return bfloat16_bits(x) if kind == "bf16" else x.astype(np.float16).view(U16)


def round_to_tf32(x: np.ndarray) -> np.ndarray:
    """Round float32 to 11 significant bits, ties away from zero; return the bits."""
    bits = (x.view(U32) + U32(0x1000)) & U32(0xFFFFE000)
    return np.where(x == x, bits, U32(0x7FFFFFFF))


_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _convert(m: Machine, i: Instruction, rest: list[str], kinds: list[str]) -> Step:
    check(i, rest, "rn", "rna", "rz", "bf16", "bf16x2", "f16x2", "tf32", *_ROUND)
    target, *operands = i.operands
    to, source = [x for x in i.opcode.split(".")[1:] if x not in {"rn", "rna", "rz", *_ROUND}]
    if "rz" in rest:
        raise PtxError(f"unknown opcode {i.opcode}")
    if to in ("bf16x2", "f16x2") and source == "f32":  # {high, low}
        high, low = (m.source(x, F32) for x in operands)

        def pack(high: np.ndarray, low: np.ndarray) -> np.ndarray:
            return _narrow(high, to[:-2]).astype(U32) << U32(16) | _narrow(low, to[:-2])

        return write(m, target, U32, pack, [high, low])
    if to == "tf32" and source == "f32" and "rna" in rest:
        return write(
            m, target, U32, lambda a: round_to_tf32(np.asarray(a)), [m.source(operands[0], F32)]
        )
    if to == "bf16" and source == "f32":
        return write(m, target, U16, lambda a: _narrow(a, "bf16"), [m.source(operands[0], F32)])
    if source == "bf16" and to == "f32":
        return write(m, target, F32, bfloat16_values, [m.source(operands[0], U16)])
    if not {to, source} <= SIZES.keys():
        raise PtxError(f"unknown opcode {i.opcode}")
    into, out = dtype_of(to), dtype_of(source)
    register = m.registers[operands[0]] if isinstance(operands[0], str) else None
    wide = register is not None and register.itemsize > np.dtype(out).itemsize  # its low part
    value = m.source(operands[0], UINT[register.itemsize] if wide else out)
    rounding = next((_ROUND[x] for x in rest if x in _ROUND), None)
    if rounding is None and issubclass(out, np.floating) and not issubclass(into, np.floating):
        raise PtxError(f"unknown opcode {i.opcode}")
    held = m.registers[target].itemsize  # a wider register is filled up with the sign
    holder = (
        into if held == np.dtype(into).itemsize else np.dtype(f"{into(0).dtype.kind}{held}").type
    )

    def convert(x):
        x = np.asarray(x)
        x = x.astype(out) if wide else x
        if rounding is not None:
            x = rounding(x)
            if not issubclass(into, np.floating):
                limits = np.iinfo(into)
                exact = np.clip(np.nan_to_num(x.astype(F64), nan=0.0), limits.min, limits.max)
                x = np.where(x >= F64(limits.max), limits.max, exact.astype(into))
        return x.astype(into).astype(holder)

    return write(m, target, holder, convert, [value])


def _to_address(m: Machine, i: Instruction, rest: list[str], kinds: list[str]) -> Step:
    check(i, rest, "to", "global")  # generic and global addresses are the same
    dtype = dtype_of(kinds[0])
    return write(m, i.operands[0], dtype, np.positive, [m.source(i.operands[1], dtype)])


BUILDERS = {"setp": _set_predicate, "mov": _move, "cvt": _convert, "cvta": _to_address}
