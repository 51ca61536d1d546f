"""ldmatrix, stmatrix, mma and wgmma of the emulator, against the PTX manual's tables."""

import numpy as np
import pytest
import torch

from ptx.memory import PtxError
from ptx.tiny_kernels import run

U8, U16, U32, F32, F64 = np.uint8, np.uint16, np.uint32, np.float32, np.float64
GENERATOR = np.random.default_rng(0)


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_of_8_x_8(count, trans):
    # ldmatrix as the manual says; stmatrix puts back what it read, in reverse order.
    matrices, out = GENERATOR.integers(0, 2**16, (count, 8, 8), U16), np.zeros((32, count), U32)
    back = np.zeros((count, 8, 8), U16)
    names, reverse = (", ".join(f"%r{10 + k}" for k in order) for order in (
        range(count), reversed(range(count))))  # fmt: skip
    code = f"""setp.ge.u32 %p1, %t, {8 * count}; mad.wide.u32 %d1, %t, 16, %a0;
      mad.lo.u32 %r1, %t, 16, %m; @%p1 bra READY;
      ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%d1];
      st.shared.v4.b32 [%r1], {{%r2, %r3, %r4, %r5}};
      READY: ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [%r1];
      stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r1+{128 * count}], {{{reverse}}};
      mad.wide.u32 %d2, %t, {4 * count}, %a1;"""
    code += "".join(f"st.global.b32 [%d2+{4 * k}], %r{10 + k};" for k in range(count))
    code += f"""@%p1 bra END; ld.shared.v4.b32 {{%r2, %r3, %r4, %r5}}, [%r1+{128 * count}];
      mad.wide.u32 %d3, %t, 16, %a2; st.global.v4.b32 [%d3], {{%r2, %r3, %r4, %r5}}; END:"""
    run(code, matrices, out, back, shared=256 * count)
    for lane in range(32):
        for k in range(count):
            matrix = matrices[k].T if trans else matrices[k]
            pair = matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2].tolist()
            assert out[lane, k] == pair[0] | pair[1] << 16
    np.testing.assert_array_equal(back, matrices[::-1])


def operand_bits(values, kind):
    """Return float32 numbers as operands: bits of 2 bytes, or of 4 for tf32."""
    if kind == "tf32":
        return values.view(U32)
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    return torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(U16)


def operand_values(values, kind):
    """Return what the tensor cores read."""
    if kind == "tf32":  # truncated
        return (values.view(U32) & U32(0xFFFFE000)).view(F32)
    return (
        torch.from_numpy(values)
        .to({"bf16": torch.bfloat16, "f16": torch.float16}[kind])
        .float()
        .numpy()
    )


def words(bits):
    """Pack 16-bit numbers in pairs; 32-bit ones stay."""
    return np.ascontiguousarray(bits).view(U32)


def fragments(matrix, rows, inner, kind):
    """Return the registers of a lane that hold a ``[rows, inner]`` operand, as the manual says."""
    lane = np.arange(32)
    found = []
    if kind == "tf32":
        for k in range(0, inner, 4):
            found += [matrix[row + lane // 4, k + lane % 4] for row in range(0, rows, 8)]
        return np.stack(found)
    for k in range(0, inner, 8):
        for row in range(0, rows, 8):
            column = k + lane % 4 * 2
            pair = np.stack([matrix[row + lane // 4, column + e] for e in range(2)], axis=1)
            found.append(words(pair)[:, 0])
    return np.stack(found)


@pytest.mark.parametrize(
    ("kind", "inner"), [("bf16", 16), ("bf16", 8), ("f16", 16), ("tf32", 8), ("tf32", 4)]
)
def test_mma(kind, inner):
    a, b, c = (GENERATOR.standard_normal(s).astype(F32) for s in ((16, inner), (8, inner), (16, 8)))
    lane = np.arange(32)
    a_regs = fragments(operand_bits(a, kind), 16, inner, kind)
    b_regs = fragments(operand_bits(b, kind), 8, inner, kind)
    places = [(lane // 4 + 8 * (k // 2), lane % 4 * 2 + k % 2) for k in range(4)]
    c_regs = np.stack([c[place] for place in places])
    out = np.zeros((4, 32), F32)
    code, names = "", []
    for k, registers in enumerate((a_regs, b_regs, c_regs)):
        code += f"mad.wide.u32 %d{k}, %t, 4, %a{k};"
        names.append([f"%r{10 * k + 10 + j}" for j in range(len(registers))])
        code += "".join(
            f"ld.global.b32 {name}, [%d{k}+{128 * j}];" for j, name in enumerate(names[k])
        )
    lists = [f"{{{', '.join(x)}}}" for x in (names[2], names[0], names[1], names[2])]
    shape = f"m16n8k{inner}.row.col.f32.{kind}.{kind}.f32"
    code += f"mma.sync.aligned.{shape} {', '.join(lists)}; mad.wide.u32 %d3, %t, 4, %a3;"
    code += "".join(f"st.global.b32 [%d3+{128 * j}], {x};" for j, x in enumerate(names[2]))
    run(code, a_regs, b_regs, c_regs, out)
    expected = operand_values(a, kind).astype(F64) @ operand_values(b, kind).astype(F64).T + c
    for k, place in enumerate(places):
        np.testing.assert_allclose(out[k], expected[place], rtol=0, atol=1e-5)


# A tile in shared memory, as the manual's "matrix descriptor" says, entry by entry: rows (of A, or
# columns of B) times K, contiguous along K, or along the rows if transposed.


def tile_layout(rows, inner, size, swizzle, transposed):
    """Return each entry's byte offset, and the leading and stride offsets of the descriptor."""
    offsets = np.zeros((rows, inner), np.int64)
    width = {"none": 16, "32": 32, "64": 64, "128": 128}[swizzle]
    if transposed:
        per_atom = width // size
        if swizzle == "none":  # 8 x 8 matrices, first along the rows
            stride, leading = 128, 128 * (rows // 8)
        else:
            stride, leading = 8 * width, 8 * width * (inner // 8)
    elif swizzle == "none":
        leading, stride = 128, 128 * (inner * size // 16)
    else:
        leading, stride = 16, 8 * width
    for row in range(rows):
        for k in range(inner):
            if transposed and swizzle == "none":
                offset = row // 8 * stride + k // 8 * leading + k % 8 * 16 + row % 8 * size
            elif transposed:
                offset = row // per_atom * leading + k // 8 * stride
                offset += k % 8 * width + row % per_atom * size
            elif swizzle == "none":
                byte = k * size
                offset = row // 8 * stride + byte // 16 * leading + row % 8 * 16 + byte % 16
            else:
                offset = row // 8 * stride + row % 8 * width + k * size
            if swizzle != "none":  # 16-byte pieces: exclusive or with the number of 128-byte lines
                offset ^= (offset // 128 % 8 & (width // 16 - 1)) * 16
            offsets[row, k] = offset
    return offsets, leading, stride


def descriptor(start, leading, stride, swizzle):
    mode = {"none": 0, "128": 1, "64": 2, "32": 3}[swizzle]
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def tile_image(bits, offsets, size):
    image = np.zeros(-(-(int(offsets.max()) + size) // 1024) * 1024, U8)
    for index, offset in np.ndenumerate(offsets):
        image[offset : offset + size] = np.frombuffer(bits[index].tobytes(), U8)
    return image


def wgmma_case(kind, columns, swizzle, trans_a=False, trans_b=False, a_in_registers=False):
    """Return PTX that multiplies 64 x K by K x N after a copy to shared memory, and its arrays."""
    size = 4 if kind == "tf32" else 2
    inner = 32 // size
    a, b = (GENERATOR.standard_normal((rows, inner)).astype(F32) for rows in (64, columns))
    c = GENERATOR.standard_normal((64, columns)).astype(F32)
    images, descriptors = [], []
    for values, transposed in ((a, trans_a), (b, trans_b)):
        offsets, leading, stride = tile_layout(len(values), inner, size, swizzle, transposed)
        start = sum(map(len, images))
        images.append(tile_image(operand_bits(values, kind), offsets, size))
        descriptors.append(descriptor(start, leading, stride, swizzle))
    image = np.concatenate(images)
    thread = np.arange(128)
    row = thread // 32 * 16 + thread % 32 // 4
    places = [
        (row + 8 * (k // 2 % 2), 8 * (k // 4) + thread % 4 * 2 + k % 2) for k in range(columns // 2)
    ]
    d = np.stack([c[place] for place in places])
    a_regs = np.concatenate(
        [fragments(operand_bits(a, kind)[16 * w :], 16, inner, kind) for w in range(4)], axis=1
    )
    names = ", ".join(f"%r{20 + k}" for k in range(columns // 2))
    code = f"""mad.lo.u32 %r1, %t, 16, %m; mad.wide.u32 %d1, %t, 16, %a0; mov.b32 %r2, 0;
      COPY: setp.ge.u32 %p1, %r1, {len(image)}; @%p1 bra COPIED;
      ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%d1]; add.s64 %d1, %d1, 2048;
      st.shared.v4.b32 [%r1], {{%r3, %r4, %r5, %r6}}; add.s32 %r1, %r1, 2048; bra COPY;
      COPIED: mad.wide.u32 %d2, %t, 4, %a1; mad.wide.u32 %d3, %t, 4, %a2;"""
    for k in range(len(d)):
        code += f"ld.global.b32 %r{20 + k}, [%d2+{512 * k}];"
    for k in range(4):
        code += f"ld.global.b32 %r{10 + k}, [%d3+{512 * k}];"
    left = "{%r10, %r11, %r12, %r13}" if a_in_registers else "%d5"
    flags = (
        [] if kind == "tf32" else [int(trans_b)] if a_in_registers else [int(trans_a), int(trans_b)]
    )
    flags = ", ".join(map(str, [1, 1, *flags]))
    code += f"""fence.proxy.async.shared::cta; bar.sync 0; mov.b64 %d5, {descriptors[0]};
      mov.b64 %d6, {descriptors[1]}; mov.pred %p2, -1; wgmma.fence.sync.aligned;
      wgmma.mma_async.sync.aligned.m64n{columns}k{inner}.f32.{kind}.{kind} {{{names}}}, {left},
      %d6, %p2, {flags}; wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"""
    for k in range(len(d)):
        code += f"st.global.b32 [%d2+{512 * k}], %r{20 + k};"
    expected = operand_values(a, kind).astype(F64) @ operand_values(b, kind).astype(F64).T + c
    expected = np.stack([expected[place] for place in places])
    return code, (image, d, a_regs), expected


LAYOUTS = [
    (kind, swizzle, trans_a, trans_b, in_registers)
    for kind in ("bf16", "f16", "tf32")
    for swizzle in ("none", "32", "64", "128")
    for trans_a, trans_b, in_registers in (
        (False, False, False), (True, False, False), (False, True, False), (False, True, True),
        (False, False, True),
    )
    if kind != "tf32" or not (trans_a or trans_b)
]  # fmt: skip


@pytest.mark.parametrize(("kind", "swizzle", "trans_a", "trans_b", "in_registers"), LAYOUTS)
def test_wgmma(kind, swizzle, trans_a, trans_b, in_registers):
    columns = 128 if swizzle == "128" else 64
    code, arrays, expected = wgmma_case(kind, columns, swizzle, trans_a, trans_b, in_registers)
    run(code, *arrays, threads=128, shared=len(arrays[0]))
    np.testing.assert_allclose(arrays[1], expected, rtol=0, atol=1e-4)


def test_wgmma_on_shared_memory_that_is_not_fenced():
    code, arrays, _ = wgmma_case("bf16", 64, "128")
    with pytest.raises(PtxError, match="without a proxy fence"):
        run(code.replace("fence.proxy.async.shared::cta;", ""), *arrays, threads=128, shared=65536)


def test_wgmma_reads_its_operands_at_the_wait():
    code, arrays, expected = wgmma_case("bf16", 64, "128", a_in_registers=True)
    wait = "wgmma.wait_group.sync.aligned 0;"
    run(code.replace(wait, "mov.b32 %r10, 0;" + wait), *arrays, threads=128, shared=65536)
    assert np.abs(arrays[1] - expected).max() > 1e-2
    code, arrays, expected = wgmma_case("bf16", 64, "128")
    before = arrays[1].copy()
    run(code.replace(wait, ""), *arrays, threads=128, shared=65536)
    np.testing.assert_array_equal(arrays[1], before)
