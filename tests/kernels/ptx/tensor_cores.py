"""ldmatrix, stmatrix, mma and wgmma: fragments in registers, swizzled tiles in shared memory."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.memory import PtxError
from ptx.parser import Instruction

if TYPE_CHECKING:
    from ptx.emulator import Machine, Step

U16, U32, F32, I64 = np.uint16, np.uint32, np.float32, np.int64
_EVERY_WARP = 63  # the reader in a stamp of shared memory


def values_of(bits: np.ndarray, kind: str) -> np.ndarray:
    """Return operands as float32: of tf32, the tensor cores read the upper 19 bits alone."""
    if kind == "bf16":
        return (bits.astype(U32) << U32(16)).view(F32)
    return (
        bits.view(np.float16).astype(F32) if kind == "f16" else (bits & U32(0xFFFFE000)).view(F32)
    )


def _transposed(words: np.ndarray) -> np.ndarray:
    """Transpose 8 x 8 matrices of 16 bits, each a row of 32 words: ``[..., 32]``."""
    square = np.ascontiguousarray(words).view(U16).reshape(*words.shape[:-1], 8, 8)
    return np.ascontiguousarray(np.swapaxes(square, -1, -2)).view(U32).reshape(words.shape)


def _matrix_rows(
    m: Machine, i: Instruction, address: Any, rest: list[str]
) -> tuple[int, bool, Any]:
    """Return the number of 8 x 8 matrices, whether they are transposed, and the rows' offsets."""
    if set(rest) - {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "cta"}:
        raise PtxError(f"unknown opcode {i.opcode}")
    count = int(re.search(r"\.x(\d)", i.opcode).group(1))
    at = m.addresses(address, False)

    def rows(warps: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lanes = np.arange(m.count).reshape(-1, 32)[warps][:, : 8 * count].ravel()
        blocks = m.block[lanes]
        return m.shared.locate(blocks, at(lanes), 16), blocks, m.warp[lanes]

    return count, "trans" in rest, rows


def load_matrix(m: Machine, i: Instruction, rest: list[str], kinds: list[str]) -> Step:
    count, trans, rows = _matrix_rows(m, i, i.operands[1], rest)
    targets = [m.register(x, U32).reshape(-1, 32) for x in i.operands[0]]

    def step(mask: np.ndarray | None) -> None:
        warps = m.warps(mask)
        words = m.shared.load(*rows(warps), 4, 4).reshape(-1, count, 32)
        words = _transposed(words) if trans else words
        for k, target in enumerate(targets):
            target[warps] = words[:, k]

    return step


def store_matrix(m: Machine, i: Instruction, rest: list[str], kinds: list[str]) -> Step:
    _, trans, rows = _matrix_rows(m, i, i.operands[0], rest)
    sources = [m.register(x, U32).reshape(-1, 32) for x in i.operands[1]]

    def step(mask: np.ndarray | None) -> None:
        warps = m.warps(mask)
        words = np.stack([x[warps] for x in sources], axis=1)
        words = _transposed(words) if trans else words
        m.shared.store(*rows(warps), words.reshape(-1, 4))

    return step


# --- mma ------------------------------------------------------------------------------------------


def _fragment_indices(rows: int, inner: int, per_word: int) -> np.ndarray:
    """Return, of each entry of a ``[rows, inner]`` operand, its place among the fragments.

    A place is ``(register * 32 + lane) * per_word + part``; registers go along rows of 8 first.
    """
    row, k = np.indices((rows, inner))
    half = 4 * per_word  # entries that the registers of four lanes hold along K
    register = row // 8 + k // half * (rows // 8)
    lane = row % 8 * 4 + k % half // per_word
    return ((register * 32 + lane) * per_word + k % per_word).ravel()


def multiply(m: Machine, i: Instruction, rest: list[str], kinds: list[str]) -> Step:
    """mma.sync: D = A B + C of one warp, 16 x 8, in float32."""
    shape = re.fullmatch(
        r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(bf16|f16|tf32)\.\2\.f32", i.opcode
    )
    if shape is None:
        raise PtxError(f"unknown opcode {i.opcode}")
    inner, kind = int(shape[1]), shape[2]
    per_word, word = (1, U32) if kind == "tf32" else (2, U16)
    places_a = _fragment_indices(16, inner, per_word)
    places_b = _fragment_indices(8, inner, per_word)
    names_d, names_a, names_b, names_c = i.operands
    d, a, b = (
        [m.register(x, U32).reshape(-1, 32) for x in names] for names in (names_d, names_a, names_b)
    )
    c = [np.broadcast_to(m.source(x, F32), m.count).reshape(-1, 32) for x in names_c]

    def entries(registers: list[np.ndarray], places: np.ndarray, warps: Any) -> np.ndarray:
        words = np.stack([x[warps] for x in registers], axis=1)
        bits = words.reshape(len(words), -1).view(word)[:, places]
        return values_of(bits, kind).reshape(len(words), -1, inner)

    def step(mask: np.ndarray | None) -> None:
        warps = m.warps(mask)
        product = entries(a, places_a, warps) @ np.swapaxes(entries(b, places_b, warps), 1, 2)
        # Rows r / 4 and r / 4 + 8, columns 2 (r % 4) and the next
        parts = product.reshape(-1, 2, 8, 4, 2)
        for k, (target, addend) in enumerate(zip(d, c, strict=True)):
            part = parts[:, k // 2, :, :, k % 2].reshape(-1, 32)
            target.view(F32)[warps] = part + addend[warps]

    return step


# --- wgmma ----------------------------------------------------------------------------------------


def _chunk_offsets(descriptors: np.ndarray, count: int, inner: int, transposed: bool) -> np.ndarray:
    """Return the addresses in shared memory of an operand's pieces of 16 bytes.

    Args:
        descriptors: ``[groups]``, int64.
        count: rows of A or columns of B.
        inner: pieces of 16 bytes along K of a row (2), or, transposed, the length of K.
        transposed: whether the entries of a column, not of a row, are contiguous.

    Returns:
        ``[groups, count, inner]``, or transposed ``[groups, inner, count / 8]``.
    """
    start = (descriptors & 0x3FFF) << 4
    leading, stride = ((descriptors >> shift & 0x3FFF) << 4 for shift in (16, 32))
    if (descriptors >> 49 & 7).any():
        raise PtxError("a matrix descriptor with a base offset")
    swizzle = descriptors >> 62 & 3  # 0: none; 1, 2, 3: 128, 64 and 32 bytes
    width = np.where(swizzle == 0, 16, 256 >> swizzle)
    start, leading, stride, width, swizzle = (
        x[:, None, None] for x in (start, leading, stride, width, swizzle)
    )
    if transposed:
        k, piece = np.arange(inner)[None, :, None], np.arange(count // 8)[None, None, :]
        per_row = width // 16
        swizzled = piece // per_row * leading + k // 8 * stride + piece % per_row * 16
        plain = piece * stride + k // 8 * leading
        offsets = np.where(swizzle == 0, plain, swizzled) + k % 8 * width
    else:
        row, piece = np.arange(count)[None, :, None], np.arange(inner)[None, None, :]
        along = np.where(swizzle == 0, leading, 16)
        offsets = row // 8 * stride + row % 8 * width + piece * along
    offsets = offsets + start
    return offsets ^ (offsets >> 7 & np.where(swizzle == 0, 0, 7 >> (swizzle - 1))) << 4


class _Product:
    """One wgmma instruction: D = A B (+ D) of four warps, 64 x N, in float32."""

    def __init__(self, m: Machine, i: Instruction) -> None:
        shape = re.fullmatch(
            r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(bf16|f16|tf32)\.\3", i.opcode
        )
        if shape is None:
            raise PtxError(f"unknown opcode {i.opcode}")
        self.m, self.columns, self.inner, self.kind = m, int(shape[1]), int(shape[2]), shape[3]
        self.targets, a, b, scale_d, *immediates = i.operands
        scale_a, scale_b, *transposed = (int(x) for x in immediates)
        if {scale_a, scale_b} - {1, -1}:
            raise PtxError(f"unknown scale in {i.opcode}")
        self.sign = scale_a * scale_b
        self.d = [m.register(x, F32).reshape(-1, 128) for x in self.targets]
        self.a = self.a_descriptor = None
        if isinstance(a, tuple):
            self.a, transposed = [m.register(x, U32) for x in a], [0, *transposed]
        else:
            self.a_descriptor = m.source(a, I64)
        self.b_descriptor = m.source(b, I64)
        self.transposed = [bool(x) for x in (*transposed, 0, 0)][:2]  # of tf32: neither
        self.scale_d = m.source(scale_d, np.bool_)
        self.places = _fragment_indices(16, self.inner, 1 if self.kind == "tf32" else 2)

    def descriptors(self, which: Any, groups: np.ndarray) -> np.ndarray:
        values = np.broadcast_to(which, self.m.count).reshape(-1, 128)[groups]
        if (values != values[:, :1]).any():
            raise PtxError("the lanes of a warpgroup disagree")
        return values[:, 0]

    def offsets(self, descriptors: np.ndarray, count: int, transposed: bool) -> np.ndarray:
        return _chunk_offsets(descriptors, count, self.inner if transposed else 2, transposed)

    def note_reads(self, groups: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Check the reads of shared memory; return the offsets in it."""
        blocks = np.repeat(self.m.block[groups * 128], offsets[0].size)
        warps = np.repeat(self.m.warp[groups * 128], offsets[0].size)
        at = self.m.shared.locate(blocks, offsets.ravel(), 16)
        self.m.shared.check_fenced(at, blocks, warps)
        self.m.shared.note_read(at, blocks, np.full(len(at), _EVERY_WARP), 16)
        return at

    def operand(self, groups: np.ndarray, offsets: np.ndarray, transposed: bool) -> np.ndarray:
        """Return ``[groups, rows, inner]``, float32."""
        at = self.note_reads(groups, offsets)
        words = self.m.shared.read(at, 4, 4)
        bits = words.view(U32 if self.kind == "tf32" else U16)
        if transposed:
            bits = np.swapaxes(bits.reshape(len(groups), self.inner, -1), 1, 2)
        else:
            bits = bits.reshape(len(groups), -1, self.inner)
        return values_of(np.ascontiguousarray(bits), self.kind)

    def product(self, groups: np.ndarray, a: np.ndarray | None, b: np.ndarray) -> np.ndarray:
        """Read the operands, and return the product ``[groups, 64, N]``; a, b: offsets."""
        if a is None:
            words = np.stack([x.reshape(-1, 4, 32)[groups] for x in self.a], axis=2)
            bits = words.reshape(len(groups), 4, -1).view(U32 if self.kind == "tf32" else U16)
            left = values_of(bits[..., self.places], self.kind).reshape(len(groups), 64, -1)
        else:
            left = self.operand(groups, a, self.transposed[0])
        right = self.operand(groups, b, self.transposed[1])
        return self.sign * (left @ np.swapaxes(right, 1, 2))

    # Register r of a lane holds row l / 4 + 8 (r / 2 % 2) of its warp's 16, and column
    # 8 (r / 4) + 2 (l % 4) + r % 2.

    def read(self, groups: np.ndarray) -> np.ndarray:
        """Return D, ``[groups, 64, N]``."""
        parts = np.stack([x[groups] for x in self.d]).reshape(-1, 2, 2, len(groups), 4, 8, 4)
        return parts.transpose(3, 4, 1, 5, 0, 6, 2).reshape(len(groups), 64, self.columns)

    def write(self, groups: np.ndarray, value: np.ndarray) -> None:
        parts = value.reshape(len(groups), 4, 2, 8, -1, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5)
        for register, part in zip(
            self.d, parts.reshape(len(self.d), len(groups), 128), strict=True
        ):
            register[groups] = part


class MatrixProducts:
    """The ``wgmma`` of a machine: operands are read, and results written, at the wait."""

    def __init__(self, m: Machine) -> None:
        self.m = m
        self.committed = np.zeros(-(-m.count // 128), I64)  # groups of each warpgroup
        self.pending: list[tuple[_Product, np.ndarray, list[np.ndarray | None]]] = []

    def groups(self, mask: np.ndarray | None) -> np.ndarray:
        return np.arange(len(self.committed))[self.m.warps(mask, 128)]

    def start(self, product: _Product, mask: np.ndarray | None) -> None:
        groups = self.groups(mask)
        if not len(groups):
            return
        a = None
        if product.a is None:
            descriptors = product.descriptors(product.a_descriptor, groups)
            a = product.offsets(descriptors, 64, product.transposed[0])
            product.note_reads(groups, a)
        descriptors = product.descriptors(product.b_descriptor, groups)
        b = product.offsets(descriptors, product.columns, product.transposed[1])
        product.note_reads(groups, b)
        scale = np.broadcast_to(product.scale_d, self.m.count).reshape(-1, 128)[groups, :1].copy()
        self.pending.append((product, groups, [a, b, scale, self.committed[groups]]))

    def commit(self, mask: np.ndarray | None) -> None:
        self.committed[self.groups(mask)] += 1

    def wait(self, mask: np.ndarray | None, count: int) -> None:
        """Complete all but the last ``count`` committed groups, for the active warpgroups."""
        arrived = np.zeros(len(self.committed), bool)
        arrived[self.groups(mask)] = True
        pending, self.pending = self.pending, []
        for product, groups, state in pending:
            ready = arrived[groups] & (state[3] < self.committed[groups] - count)
            if ready.any():
                a, b, scale, _ = (None if x is None else x[ready] for x in state)
                value = product.product(groups[ready], a, b)
                value += np.where(scale[:, :, None], product.read(groups[ready]), F32(0))
                product.write(groups[ready], value)
            if not ready.all():
                rest = [None if x is None else x[~ready] for x in state]
                self.pending.append((product, groups[~ready], rest))


def group_multiply(m: Machine, i: Instruction, rest: list[str], kinds: list[str]) -> Step:
    if rest[0] == "mma_async":
        product = _Product(m, i)
        return lambda mask: m.matrix_products.start(product, mask)
    if rest == ["commit_group", "sync", "aligned"]:
        return m.matrix_products.commit
    if rest == ["wait_group", "sync", "aligned"]:
        return lambda mask: m.matrix_products.wait(mask, int(i.operands[0]))
    if rest == ["fence", "sync", "aligned"]:
        return lambda mask: None
    raise PtxError(f"unknown opcode {i.opcode}")
