"""The emulator, one instruction class at a time, against NumPy, torch and the PTX manual."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from ptx.emulator import Launch
from ptx.memory import PtxError
from ptx.parser import parse
from ptx.tiny_kernels import run

U8, U16, U32, U64, I32, I64, F32, F64 = (
    np.uint8, np.uint16, np.uint32, np.uint64, np.int32, np.int64, np.float32, np.float64,
)  # fmt: skip


# --- arithmetic -----------------------------------------------------------------------------------

GENERATOR = np.random.default_rng(0)
COUNT = 64


def numbers(dtype):
    """Return random numbers and borders."""
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        values = GENERATOR.standard_normal(COUNT) * 2.0 ** GENERATOR.integers(-20, 20, COUNT)
        values[:6] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0]
        return GENERATOR.permutation(values).astype(dtype)
    limits = np.iinfo(dtype)
    values = GENERATOR.integers(limits.min, limits.max, COUNT, dtype, endpoint=True)
    values[:5] = [0, 1, limits.max, limits.min, limits.max // 3]
    return GENERATOR.permutation(values)


def wrap(value, dtype):
    bits = 8 * np.dtype(dtype).itemsize
    value %= 2**bits
    return value - 2**bits if np.dtype(dtype).kind == "i" and value >> bits - 1 else value


def signed(value, bits):
    return value - 2**bits if value >> bits - 1 else value


def quotient(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def permuted(a, b, selector):
    data = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    result = []
    for k in range(4):
        nibble = selector >> 4 * k & 15
        byte = data[nibble & 7]
        result.append((255 if byte & 128 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(result), "little")


def field(a, position, length, is_signed):
    position, length = position & 255, length & 255
    value = a >> position & 2**length - 1
    return signed(value, length) if is_signed and length else value


def fused(a, b, c):
    if not all(map(math.isfinite, (a, b, c))):
        return a * b + c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    return float(exact) if exact else a * b + c


def rounded_to_tf32(x):
    if not math.isfinite(x):
        return x
    mantissa, exponent = math.frexp(x)
    return math.copysign(math.ldexp(math.floor(abs(mantissa) * 2048 + 0.5) / 2048, exponent), x)


def saturated(a):
    return int(min(max(a, -(2**31)), 2**31 - 1)) if a == a else 0


def divided(a, b):
    return float(F64(a) / F64(b))


# Instruction, dtypes of its result and operands, and the result of numbers of Python.
SCALAR = [
    ("add.s32", I32, (I32, I32), lambda a, b: a + b),
    ("add.s64", I64, (I64, I64), lambda a, b: a + b),
    ("sub.s32", I32, (I32, I32), lambda a, b: a - b),
    ("mul.lo.s32", I32, (I32, I32), lambda a, b: a * b),
    ("mul.wide.s32", I64, (I32, I32), lambda a, b: a * b),
    ("mul.wide.u32", U64, (U32, U32), lambda a, b: a * b),
    ("mad.lo.s32", I32, (I32, I32, I32), lambda a, b, c: a * b + c),
    ("mad.wide.u32", U64, (U32, U32, U64), lambda a, b, c: a * b + c),
    ("div.s32", I32, (I32, I32), lambda a, b: quotient(a, b)),
    ("div.u64", U64, (U64, U64), lambda a, b: a // b),
    ("rem.s32", I32, (I32, I32), lambda a, b: a - b * quotient(a, b)),
    ("min.s32", I32, (I32, I32), min),
    ("max.u32", U32, (U32, U32), max),
    ("neg.s32", I32, (I32,), lambda a: -a),
    ("and.b32", U32, (U32, U32), lambda a, b: a & b),
    ("or.b64", U64, (U64, U64), lambda a, b: a | b),
    ("xor.b16", U16, (U16, U16), lambda a, b: a ^ b),
    ("not.b32", U32, (U32,), lambda a: ~a),
    ("popc.b32", U32, (U32,), lambda a: a.bit_count()),
    ("prmt.b32", U32, (U32, U32, U32), permuted),
    ("lop3.b32", U32, (U32, U32, U32), lambda a, b, c: a & b | ~c, 0xF0 & 0xCC | ~0xAA & 0xFF),
    ("shf.l.wrap.b32", U32, (U32, U32, U32), lambda a, b, c: (b << 32 | a) << c % 32 >> 32),
    ("shf.r.wrap.b32", U32, (U32, U32, U32), lambda a, b, c: (b << 32 | a) >> c % 32),
    ("neg.bf16x2", U32, (U32,), lambda a: a ^ 0x80008000),
    ("add.f32", F32, (F32, F32), lambda a, b: a + b),
    ("sub.f32", F32, (F32, F32), lambda a, b: a - b),
    ("mul.f64", F64, (F64, F64), lambda a, b: a * b),
    ("fma.rn.f32", F32, (F32, F32, F32), fused),
    ("div.rn.f32", F32, (F32, F32), divided),
    ("div.full.f32", F32, (F32, F32), divided),
    ("sqrt.rn.f32", F32, (F32,), lambda a: math.sqrt(a) if a >= 0 or a != a else math.nan),
    ("abs.f32", F32, (F32,), abs),
    ("neg.f32", F32, (F32,), lambda a: -a),
    ("max.f32", F32, (F32, F32), lambda a, b: b if a != a else a if b != b else max(a, b)),
    ("max.NaN.f32", F32, (F32, F32), lambda a, b: math.nan if a != a or b != b else max(a, b)),
    ("cvt.s64.s32", I64, (I32,), lambda a: a),
    ("cvt.u64.u32", U64, (U32,), lambda a: a),
    ("cvt.u32.u64", U32, (U64,), lambda a: a),
    ("cvt.u16.u32", U16, (U32,), lambda a: a),
    ("cvt.s32.s8", I32, (I32,), lambda a: signed(a % 256, 8)),
    ("cvt.rn.f32.s32", F32, (I32,), float),
    ("cvt.rn.f32.s64", F32, (I64,), F32),
    ("cvt.rzi.s32.f32", I32, (F32,), saturated),
    ("cvt.rmi.f32.f32", F32, (F32,), lambda a: math.floor(a) if math.isfinite(a) else a),
    ("cvt.f64.f32", F64, (F32,), lambda a: a),
    ("cvt.rn.f32.f64", F32, (F64,), lambda a: a),
    ("cvt.rna.tf32.f32", F32, (F32,), rounded_to_tf32),
    ("mov.b32", U32, (U32,), lambda a: a),
]  # fmt: skip


def each(body, result, sources):
    """Run an instruction ``body(registers)`` on each lane; return an array of the dtype result."""
    out, code, names = np.zeros(COUNT, result), "", []
    prefixes = {2: "%h", 4: "%r", 8: "%d"}
    for k, array in enumerate((out, *sources)):
        size = array.itemsize
        names.append(f"{prefixes[size]}{50 + k}")
        code += f"mad.wide.u32 %d{k}, %t, {size}, %a{k};"
        if k:
            code += f"ld.global.b{8 * size} {names[k]}, [%d{k}];"
    code += body(*names) + f"st.global.b{8 * out.itemsize} [%d0], {names[0]};"
    run(code, out, *sources, threads=COUNT)
    return out


@pytest.mark.parametrize("row", SCALAR, ids=lambda row: row[0])
def test_arithmetic_and_conversions(row):
    opcode, result, operands, expected, *extra = row
    sources = [numbers(dtype) for dtype in operands]
    if opcode.startswith(("div", "rem")) and np.dtype(result).kind != "f":
        sources[1][sources[1] == 0] = 7
        sources[0][sources[1] == -1] = 5  # the most negative number has no negative
    found = each(
        lambda *names: f"{opcode} {', '.join([*names, *map(str, extra)])};", result, sources
    )
    with np.errstate(all="ignore"):
        values = [expected(*(x.item() for x in row)) for row in zip(*sources, strict=True)]
        if np.dtype(result).kind != "f":
            values = [wrap(value, result) for value in values]
        wanted = np.array(values, F64 if np.dtype(result).kind == "f" else result).astype(result)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("shl.b32", lambda a, n: wrap(a << n, U32)),
        ("shr.u32", lambda a, n: a >> n),
        ("shr.s32", lambda a, n: wrap(signed(a, 32) >> n, U32)),
    ],
)
def test_shifts_by_more_than_the_width(opcode, expected):
    values, amounts = numbers(U32), np.arange(COUNT, dtype=U32)
    found = each(lambda d, a, b: f"{opcode} {d}, {a}, {b};", U32, [values, amounts])
    assert found.tolist() == [
        expected(int(a), int(n)) for a, n in zip(values, amounts, strict=True)
    ]


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_bit_fields(kind):
    values, where, length = numbers(U32), numbers(U32) % 16, numbers(U32) % 17
    found = each(lambda d, *s: f"bfe.{kind} {d}, {', '.join(s)};", U32, [values, where, length])
    rows = zip(values.tolist(), where.tolist(), length.tolist(), strict=True)
    assert found.tolist() == [wrap(field(*row, kind == "s32"), U32) for row in rows]


def test_insertion_of_bit_fields():
    a, b = numbers(U64), numbers(U64)
    found = each(lambda d, *s: f"bfi.b64 {d}, {', '.join(s)}, 24, 8;", U64, [a, b])
    rows = zip(a.tolist(), b.tolist(), strict=True)
    assert found.tolist() == [y & ~(255 << 24) | (x & 255) << 24 for x, y in rows]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_floats(dtype):
    kind = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    a, b = numbers(F32), numbers(F32)
    high, low = (torch.from_numpy(x).to(dtype) for x in (a, b))
    both = each(lambda d, *s: f"cvt.rn.{kind}x2.f32 {d}, {', '.join(s)};", U32, [a, b])
    one = each(lambda d, s: f"cvt.rn.{kind}.f32 {d}, {s};", U16, [a])
    back = each(lambda d, s: f"cvt.f32.{kind} {d}, {s};", F32, [one])

    def as_floats(bits):
        return torch.from_numpy(bits.astype(U16).view(np.int16)).view(dtype).float().numpy()

    np.testing.assert_array_equal(as_floats(both >> 16), high.float().numpy())
    np.testing.assert_array_equal(as_floats(both & 0xFFFF), low.float().numpy())
    np.testing.assert_array_equal(as_floats(one), high.float().numpy())
    np.testing.assert_array_equal(back, high.float().numpy())


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a < b or a > b,
    "lt": lambda a, b: a < b,
    "ge": lambda a, b: a >= b,
    "ltu": lambda a, b: not a >= b,
    "neu": lambda a, b: a != b,
    "num": lambda a, b: a == a and b == b,
    "nan": lambda a, b: a != a or b != b,
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_with_nan(name):
    a, b = numbers(F32), numbers(F32)
    b[::3] = a[::3]
    code = "setp.{0}.f32 %p1, {2}, {3}; selp.b32 {1}, 1, 0, %p1;"
    found = each(lambda *names: code.format(name, *names), U32, [a, b])
    expected = [COMPARISONS[name](x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert found.tolist() == expected


def test_predicates():
    a, b = numbers(I32), numbers(I32)
    code = """setp.lt.s32 %p1, {1}, 0; setp.lt.and.s32 %p2|%p3, {1}, {2}, !%p1; mov.b32 {0}, 0;
              @%p2 add.s32 {0}, {0}, 1; @!%p3 add.s32 {0}, {0}, 2; not.pred %p4, %p1;
              and.pred %p4, %p4, %p2; @%p4 add.s32 {0}, {0}, 4;"""
    found = each(lambda *names: code.format(*names), I32, [a, b])
    less, positive = a < b, a >= 0
    expected = (less & positive) * 5 + ~(~less & positive) * 2
    np.testing.assert_array_equal(found, expected)


def test_packing():
    low, high = numbers(U16), numbers(U16)
    packed = each(lambda d, a, b: f"mov.b32 {d}, {{{a}, {b}}};", U32, [low, high])
    assert (packed == low | high.astype(U32) << 16).all()
    upper = each(lambda d, s: f"{{ .reg .b16 %x; mov.b32 {{%x, {d}}}, {s}; }}", U16, [packed])
    assert (upper == high).all()


# --- control flow ---------------------------------------------------------------------------------


def test_lanes_of_branches_and_loops_meet_again():
    # Lane t adds 1 to its number t times; all meet at the shuffle.
    out = np.zeros(32, U32)
    code = """mov.b32 %r1, 0;
      LOOP: setp.ge.u32 %p1, %r1, %t; @%p1 bra DONE; add.s32 %r1, %r1, 1; bra LOOP;
      DONE: shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;
      mad.wide.u32 %d1, %t, 4, %a0; st.global.b32 [%d1], %r2;"""
    run(code, out)
    assert out.tolist() == [t ^ 1 for t in range(32)]


def test_blocks_pass_barriers_on_their_own():
    # Block b passes b barriers; a thread reads what another warp wrote before the last.
    out = np.zeros((5, 64), U32)
    code = """mov.b32 %r1, 0;
      LOOP: mad.lo.u32 %r2, %b, 100, %t; mad.lo.u32 %r3, %t, 4, %m; bar.sync 0;
      st.shared.b32 [%r3], %r2; bar.sync 0; add.u32 %r1, %r1, 1; setp.le.u32 %p1, %r1, %b;
      @%p1 bra LOOP; xor.b32 %r4, %t, 32; mad.lo.u32 %r3, %r4, 4, %m; ld.shared.b32 %r5, [%r3];
      mad.lo.u32 %r6, %b, 64, %t; mad.wide.u32 %d1, %r6, 4, %a0; st.global.b32 [%d1], %r5;"""
    run(code, out, threads=64, grid=5, shared=256)
    assert (out == np.arange(5)[:, None] * 100 + (np.arange(64) ^ 32)).all()


# --- memory ---------------------------------------------------------------------------------------


def test_vectors():
    source, out = numbers(U32), np.zeros(COUNT, U32)
    code = """mad.wide.u32 %d1, %t, 16, %a0; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1];
      mad.lo.u32 %r5, %t, 16, %m; st.shared.v4.b32 [%r5], {%r4, %r3, %r2, %r1};
      ld.shared.v2.b32 {%r6, %r7}, [%r5+8]; mad.wide.u32 %d2, %t, 16, %a1;
      st.global.v2.b32 [%d2], {%r6, %r7}; ld.shared.b16 %h1, [%r5+2]; cvt.u32.u16 %r8, %h1;
      ld.shared.u8 %r9, [%r5]; st.global.v2.b32 [%d2+8], {%r8, %r9};"""
    run(code, source, out, threads=16, shared=256)
    rows = source.reshape(16, 4)
    expected = np.stack([rows[:, 1], rows[:, 0], rows[:, 3] >> 16, rows[:, 3] & 255], axis=1)
    np.testing.assert_array_equal(out.reshape(16, 4), expected)


STORE = "mad.wide.u32 %d1, %t, 4, %a0; "
SHARED = "mad.lo.u32 %r1, %t, 4, %m; "
ERRORS = {
    "above a tensor": (STORE + "st.global.b32 [%d1+4], %t;", "outside array 0.* first byte 128"),
    "below a tensor": (STORE + "ld.global.b32 %r1, [%d1+-4];", "outside array 0"),
    "in no tensor": ("mov.b64 %d1, 4; ld.global.b32 %r1, [%d1];", "in no tensor"),
    "misaligned": ("mov.b64 %d1, %a0; ld.global.b32 %r1, [%d1+2];", "misaligned"),
    "outside shared memory": (SHARED + "st.shared.b32 [%r1+4], %t;", "outside the 256 bytes"),
    "nobody wrote": (SHARED + "ld.shared.b32 %r2, [%r1];", "nobody wrote"),
    "unknown opcode": ("sin.approx.f32 %r1, %r2;", r"unknown opcode sin\.approx\.f32"),
    "unknown modifier": ("add.sat.f32 %r1, %r2, %r3;", r"unknown opcode add\.sat\.f32"),
    "endless": ("LOOP: bra LOOP;", "does not end"),
    "a barrier that others miss": (
        "setp.lt.u32 %p1, %t, 32; @%p1 bra END; bar.sync 0; LOOP: bra LOOP; END: bar.sync 1;",
        "wait at a barrier",
    ),
    "a shuffle without its source": (
        "setp.lt.u32 %p1, %t, 3; @%p1 shfl.sync.bfly.b32 %r1, %t, 4, 31, -1;",
        "takes no part",
    ),
    "reads what another warp writes": (
        SHARED + "st.shared.b32 [%r1], %t; xor.b32 %r1, %r1, 128; ld.shared.b32 %r2, [%r1];",
        "race: reads",
    ),
    "writes what another warp read": (
        SHARED + "st.shared.b32 [%r1], %t; ld.shared.b32 %r2, [%r1]; xor.b32 %r1, %r1, 128; "
        "st.shared.b32 [%r1], %t;",
        "race: writes",
    ),
    "several warps write one word": ("st.shared.b32 [memory], %t;", "race: several warps write"),
    "a copy is not awaited": (
        SHARED + "mov.b64 %d1, %a0; cp.async.ca.shared.global [%r1], [%d1], 4; "
        "cp.async.commit_group; ld.shared.b32 %r2, [%r1];",
        "a copy still writes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_instruction(name, monkeypatch):
    monkeypatch.setattr("ptx.emulator.MAX_BLOCKS_RUN", 1000)
    code, message = ERRORS[name]
    with pytest.raises(PtxError, match=message) as caught:
        run(code, np.zeros(64 if "tensor" not in name else 32, U32),
            threads=64 if "tensor" not in name else 32, shared=256)  # fmt: skip
    if name not in ("endless", "a barrier that others miss"):
        assert "line " in str(caught.value)


def test_strided_tensors_and_scalars():
    base = torch.arange(40, dtype=torch.int32).view(5, 8)
    out = np.zeros(3, U32)
    text = """.visible .entry kernel(.param .u64 x, .param .u64 out, .param .f32 f, .param .u32 n)
      { .reg .b64 %d<9>; .reg .b32 %r<9>; ld.param.u64 %d1, [x]; ld.param.u64 %d2, [out];
      ld.global.b32 %r1, [%d1+32]; ld.param.b32 %r2, [f]; ld.param.s32 %d3, [n];
      cvt.u32.u64 %r3, %d3; st.global.b32 [%d2], %r1; st.global.b32 [%d2+4], %r2;
      st.global.b32 [%d2+8], %r3; ret; }"""
    arguments = [("x", base[1:4, 2:3]), ("out", torch.from_numpy(out)), ("f", 1.5), ("n", -3)]
    Launch(parse(text)["kernel"], (1, 1, 1), 1, arguments).run()
    assert out.tolist() == [18, F32(1.5).view(U32), 2**32 - 3]


@pytest.mark.parametrize("size", [4, 8, 16])
def test_asynchronous_copies(size):
    # Two groups; of the second, part is filled with zeros. After the first wait the first is there.
    source, out = numbers(U8).repeat(16), np.zeros(2 * 16 * size, U8)
    code = f"""mad.lo.u32 %r1, %t, {size}, %m; mad.wide.u32 %d1, %t, {size}, %a0;
      mad.wide.u32 %d2, %t, {size}, %a1; and.b32 %r2, %t, 3; min.u32 %r2, %r2, {size};
      cp.async.ca.shared.global [%r1+0], [%d1+0], {size}; cp.async.commit_group;
      cp.async.ca.shared.global [%r1+{16 * size}], [%d1+0], {size}, %r2; cp.async.commit_group;
      cp.async.wait_group 1;"""
    for k in range(0, size, 4):
        code += f"ld.shared.b32 %r3, [%r1+{k}]; st.global.b32 [%d2+{k}], %r3;"
    code += "cp.async.wait_group 0;"
    for k in range(0, size, 4):
        code += f"ld.shared.b32 %r3, [%r1+{16 * size + k}];"
        code += f"st.global.b32 [%d2+{16 * size + k}], %r3;"
    run(code, source, out, threads=16, shared=32 * size)
    expected = source[: 16 * size].reshape(16, size)
    filled = np.where(np.arange(size) < np.arange(16)[:, None] % 4, expected, 0)
    np.testing.assert_array_equal(out.reshape(2, 16, size), [expected, filled])


# --- warps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "source"),
    [
        ("bfly.b32 %r2|%p1, %r1, 5, 31", lambda t: t ^ 5),
        ("idx.b32 %r2|%p1, %r1, 7, 31", lambda t: 7),
        ("down.b32 %r2|%p1, %r1, 3, 31", lambda t: t + 3),
        ("up.b32 %r2|%p1, %r1, 3, 0", lambda t: t - 3),
        ("bfly.b32 %r2|%p1, %r1, 1, 0x181f", lambda t: t ^ 1),  # segments of 8 lanes
        ("idx.b32 %r2|%p1, %r1, 2, 0x181f", lambda t: t // 8 * 8 + 2),
    ],
)
def test_shuffles(mode, source):
    values, out = numbers(U32), np.zeros(2 * COUNT, U32)
    code = f"""mad.wide.u32 %d1, %t, 4, %a0; ld.global.b32 %r1, [%d1]; shfl.sync.{mode}, -1;
      selp.b32 %r3, 1, 0, %p1; mad.wide.u32 %d2, %t, 8, %a1;
      st.global.v2.b32 [%d2], {{%r2, %r3}};"""
    run(code, values, out, threads=COUNT)
    for t in range(COUNT):
        lane = source(t % 32)
        inside = 0 <= lane < 32
        expected = values[t - t % 32 + lane] if inside else values[t]
        assert out[2 * t : 2 * t + 2].tolist() == [expected, inside], t


def test_reductions_of_a_warp():
    values, out = numbers(I32), np.zeros(COUNT, I32)
    for name, function in (("add", np.sum), ("min", np.min), ("max", np.max)):
        code = f"""mad.wide.u32 %d1, %t, 4, %a0; ld.global.b32 %r1, [%d1];
          redux.sync.{name}.s32 %r2, %r1, -1; mad.wide.u32 %d2, %t, 4, %a1;
          st.global.b32 [%d2], %r2;"""
        run(code, values, out, threads=COUNT)
        with np.errstate(over="ignore"):
            expected = [function(half.astype(I64)).astype(I32) for half in values.reshape(2, 32)]
        assert (out.reshape(2, 32) == np.array(expected)[:, None]).all()
