"""Instructions as functions on all lanes: which there are; memory, copies, warps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptx import arithmetic, tensor_cores
from ptx.arithmetic import I64, U8, U32, U64, check, dtype_of
from ptx.memory import UINT, PtxError
from ptx.parser import SIZES, Instruction, Kernel

if TYPE_CHECKING:
    from ptx.emulator import Machine, Step


def build(m: Machine, i: Instruction) -> Step:
    """Return the function that executes an instruction of a machine, without its predicate."""
    name, *modifiers = i.opcode.replace("::", ".").split(".")
    kinds = [x for x in modifiers if x in SIZES]
    rest = [x for x in modifiers if x not in SIZES]
    if name in _BUILDERS:
        return _BUILDERS[name](m, i, rest, kinds)
    if name in arithmetic.ELEMENTWISE:
        return arithmetic.elementwise(m, i, name, rest, kinds)
    raise PtxError(f"unknown opcode {i.opcode}")


# --- loads, stores, copies ------------------------------------------------------------------------

# Modifiers that change nothing here: of caching; the length of a vector, seen by its operands
_CACHING = [
    "nc",
    "ca",
    "cg",
    "cs",
    "wb",
    "L1",
    "L2",
    "evict_first",
    "evict_last",
    "no_allocate",
    "64B",
    "128B",
    "256B",
    "cta",
    "v2",
    "v4",
]


def _space(i: Instruction, rest: list[str]) -> str:
    check(i, rest, "global", "shared", "param", *_CACHING)
    return next((x for x in rest if x in ("global", "shared", "param")), "global")


def _load(m: Machine, i: Instruction, rest: list[str], kinds: list[str]) -> Step:
    space, dtype = _space(i, rest), dtype_of(kinds[-1])
    targets = i.operands[0] if isinstance(i.operands[0], tuple) else (i.operands[0],)
    size, count, address = np.dtype(dtype).itemsize, len(targets), i.operands[1]
    registers = []
    for name in targets:
        held = m.registers[name].itemsize
        wide = dtype if held == size else np.dtype(f"{dtype(0).dtype.kind}{held}").type
        registers.append(m.register(name, wide))
    if space == "param":
        (start,) = (x.offset for x in m.kernel.params if x.name == address.base)
        values = np.frombuffer(m.params, dtype, count, start + address.offset)

        def step(mask: np.ndarray | None) -> None:
            for register, value in zip(registers, values, strict=True):
                np.copyto(register, value, where=True if mask is None else mask)

        return step
    at = m.addresses(address, space == "global")

    def step(mask: np.ndarray | None) -> None:
        lanes = m.lanes(mask)
        addresses = at(lanes)
        if not len(addresses):
            return
        if space == "global":
            values = m.memory.load(addresses, size, count)
        else:
            blocks = m.block[lanes]
            offsets = m.shared.locate(blocks, addresses, size * count)
            values = m.shared.load(offsets, blocks, m.warp[lanes], size, count)
        for k, register in enumerate(registers):
            register[lanes] = values[:, k].view(dtype)

    return step


def _store(m: Machine, i: Instruction, rest: list[str], kinds: list[str]) -> Step:
    space, size = _space(i, rest), SIZES[kinds[-1]]
    address, values = i.operands
    sources = [
        m.source(x, UINT[m.registers[x].itemsize if isinstance(x, str) else size])
        for x in (values if isinstance(values, tuple) else (values,))
    ]
    at = m.addresses(address, space == "global")

    def step(mask: np.ndarray | None) -> None:
        lanes = m.lanes(mask)
        addresses = at(lanes)
        if not len(addresses):
            return
        data = np.empty((len(addresses), len(sources)), UINT[size])
        for k, source in enumerate(sources):
            data[:, k] = source[lanes] if source.ndim else source
        if space == "global":
            m.memory.store(addresses, data)
        else:
            blocks = m.block[lanes]
            offsets = m.shared.locate(blocks, addresses, data[0].nbytes)
            m.shared.store(offsets, blocks, m.warp[lanes], data)

    return step


class Copies:
    """The ``cp.async`` of a machine: the data arrive at the wait, as late as it allows."""

    def __init__(self, m: Machine, need_fence: bool) -> None:
        self.m, self.need_fence = m, need_fence
        self.committed = np.zeros(m.count, I64)  # groups of each lane
        self.pending: list[tuple[np.ndarray, ...]] = []  # lanes, offsets, data, groups

    def start(self, lanes: np.ndarray, offsets: np.ndarray, data: np.ndarray) -> None:
        shared, blocks, warps = self.m.shared, self.m.block[lanes], self.m.warp[lanes]
        shared.note_write(offsets, blocks, warps, data[0].nbytes, same=False)
        shared.invalidate(offsets, data[0].nbytes)
        self.pending.append((lanes, offsets, data, self.committed[lanes]))

    def commit(self, mask: np.ndarray | None) -> None:
        self.committed[self.m.lanes(mask)] += 1

    def wait(self, mask: np.ndarray | None, groups: int) -> None:
        """Complete the copies of all but the last ``groups`` committed groups."""
        arrived = np.zeros(self.m.count, bool)
        arrived[self.m.lanes(mask)] = True
        pending, self.pending = self.pending, []
        for lanes, offsets, data, group in pending:
            ready = arrived[lanes] & (group < self.committed[lanes] - groups)
            if ready.any():
                whose = lanes[ready]
                shared, blocks, warps = self.m.shared, self.m.block[whose], self.m.warp[whose]
                shared.store(offsets[ready], blocks, warps, data[ready])
                if not self.need_fence:
                    shared.mark_fenced(offsets[ready], blocks, warps, data[0].nbytes)
            if not ready.all():
                rest = ~ready
                self.pending.append((lanes[rest], offsets[rest], data[rest], group[rest]))


def _copy(m: Machine, i: Instruction, rest: list[str], kinds: list[str]) -> Step:
    if rest == ["async", "commit_group"]:
        return m.copies.commit
    if rest == ["async", "wait_group"]:
        return lambda mask: m.copies.wait(mask, int(i.operands[0]))
    check(i, rest, "async", "ca", "cg", "shared", "cta", "global", "L2", "64B", "128B", "256B")
    to, source, size, *given = i.operands
    given = m.source(given[0] if given else size, U32)
    at, to_at = m.addresses(source, True), m.addresses(to, False)

    def step(mask: np.ndarray | None) -> None:
        lanes = np.arange(m.count)[m.lanes(mask)]
        if not len(lanes):
            return
        data = np.zeros((len(lanes), size), U8)
        lengths = np.broadcast_to(given, m.count)[lanes]
        for length in np.unique(lengths):  # the rest of the destination is 0
            some = lengths == length
            if length == size:
                data[some] = m.memory.load(at(lanes[some]), 4, size // 4).view(U8)
            elif length:
                bytes_at = at(lanes[some])[:, None] + np.arange(length, dtype=U64)
                data[some, :length] = m.memory.load(bytes_at.ravel(), 1, 1).reshape(-1, length)
        offsets = m.shared.locate(m.block[lanes], to_at(lanes), size)
        m.copies.start(lanes, offsets, data.view(U32))

    return step


def _fence(m: Machine, i: Instruction, rest: list[str], kinds: list[str]) -> Step:
    check(i, rest, "proxy", "async", "shared", "cta")
    return lambda mask: m.shared.fence(m.block[m.lanes(mask)], m.warp[m.lanes(mask)])


# --- warps ----------------------------------------------------------------------------------------


def _shuffle(m: Machine, i: Instruction, rest: list[str], kinds: list[str]) -> Step:
    check(i, rest, "sync", "bfly", "idx", "up", "down")
    targets = i.operands[0] if isinstance(i.operands[0], tuple) else (i.operands[0],)
    value, by, limit = (m.source(x, U32) for x in i.operands[1:4])
    members = m.source(i.operands[4], U32)
    lane = np.arange(m.count) % 32
    first = np.arange(m.count) - lane

    def step(mask: np.ndarray | None) -> None:
        segment, clamp = (limit >> U32(8) & U32(31)).astype(I64), (limit & U32(31)).astype(I64)
        amount = (by & U32(31)).astype(I64)
        start = lane & segment
        last = start | clamp & ~segment
        if "up" in rest:
            source, ok = lane - amount, lane - amount >= last
        else:
            source = {"bfly": lane ^ amount, "down": lane + amount,
                      "idx": start | amount & ~segment}[rest[1]]  # fmt: skip
            ok = source <= last
        source = np.where(ok, source, lane)
        active = m.live if mask is None else mask & m.live
        reached = active[first + source] & ((members >> source.astype(U32)) & U32(1)).astype(bool)
        if (active & ~reached).any():
            raise PtxError("reads from a lane that takes no part")
        found = np.broadcast_to(value, m.count)[first + source]
        np.copyto(m.register(targets[0], U32), found, where=active)
        for name in targets[1:]:
            np.copyto(m.register(name, np.bool_), ok, where=active)

    return step


_REDUCE = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
           "or": np.bitwise_or, "xor": np.bitwise_xor}  # fmt: skip


def _reduce(m: Machine, i: Instruction, rest: list[str], kinds: list[str]) -> Step:
    check(i, rest, "sync", *_REDUCE)
    dtype, function = dtype_of(kinds[-1]), _REDUCE[rest[1]]
    target = m.register(i.operands[0], dtype).reshape(-1, 32)
    source, members = m.source(i.operands[1], dtype), m.source(i.operands[2], U32)

    def step(mask: np.ndarray | None) -> None:
        warps = m.warps(mask)
        if not (np.broadcast_to(members, m.count).reshape(-1, 32)[warps] == U32(2**32 - 1)).all():
            raise PtxError("the mask leaves out lanes")
        values = np.broadcast_to(source, m.count).reshape(-1, 32)[warps]
        target[warps] = function.reduce(values, axis=1, dtype=dtype)[:, None]

    return step


_BUILDERS = {
    **arithmetic.BUILDERS,
    "ld": _load,
    "st": _store,
    "cp": _copy,
    "fence": _fence,
    "shfl": _shuffle,
    "redux": _reduce,
    "ldmatrix": tensor_cores.load_matrix,
    "stmatrix": tensor_cores.store_matrix,
    "mma": tensor_cores.multiply,
    "wgmma": tensor_cores.group_multiply,
}


def granule(kernel: Kernel) -> int:
    """Return the size of the narrowest access of shared memory, at most 4 bytes."""
    sizes = [4]
    for i in kernel.instructions:
        name, *parts = i.opcode.replace("::", ".").split(".")
        if name in ("ld", "st") and "shared" in parts:
            sizes += [SIZES[x] for x in parts if x in SIZES]
    return min(sizes)
