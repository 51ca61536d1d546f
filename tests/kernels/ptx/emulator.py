"""Launches: control flow, predicates and barriers of many lanes in lockstep."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ptx import instructions, tensor_cores
from ptx.memory import UINT, GlobalMemory, PtxError, SharedMemory
from ptx.parser import SIZES, Address, Instruction, Kernel, Not, Operand

Step = Callable[["np.ndarray | None"], None]
"""Executes an instruction for the lanes of a mask; None: for all that have not returned."""

LANES = 4096  # at least, if the grid has as many: NumPy's time goes by calls
MAX_BLOCKS_RUN = 10**6  # basic blocks until a loop is taken to be endless

DTYPES = {
    **{f"{kind}{8 * size}": dtype for kind in "bu" for size, dtype in UINT.items()},
    **{f"s{8 * size}": np.dtype(f"i{size}").type for size in UINT},
    **{"f16": np.float16, "f32": np.float32, "f64": np.float64, "pred": np.bool_},
}
"""NumPy's dtype for a PTX type."""


class BasicBlock(NamedTuple):
    start: int  # index of the first instruction
    steps: list[tuple[Step, Instruction]]
    end: Instruction | None  # the branch, return or barrier after them


class Machine:
    """Some blocks of a launch, all their lanes in lockstep.

    Lanes at the lowest address run first, so that those of a branch meet again behind it.
    """

    def __init__(
        self, launch: Launch, params: bytes, memory: GlobalMemory, blocks: np.ndarray
    ) -> None:
        kernel, grid, threads = launch.kernel, launch.grid, launch.threads
        self.kernel, self.memory, self.params = kernel, memory, params
        self.count = len(blocks) * threads
        self.block = np.repeat(np.arange(len(blocks)), threads)  # of each lane
        thread = np.tile(np.arange(threads), len(blocks))
        self.warp = thread // 32
        self.blocks, self.threads = len(blocks), threads
        x, y, z = (np.repeat(i, threads) for i in np.unravel_index(blocks, grid, order="F"))
        values = {"tid.x": thread, "ctaid.x": x, "ctaid.y": y, "ctaid.z": z}
        values |= {"laneid": thread % 32, "ntid.x": np.full(self.count, threads)}
        values |= {
            f"nctaid.{axis}": np.full(self.count, n) for axis, n in zip("xyz", grid, strict=True)
        }
        self.registers = {f"%{name}": value.astype(np.uint32) for name, value in values.items()}
        for name, kind in kernel.registers.items():
            dtype = np.bool_ if kind == "pred" else UINT[max(2, SIZES[kind])]
            self.registers[name] = np.zeros(self.count, dtype)
        size = kernel.static_shared + launch.shared
        self.shared = SharedMemory(len(blocks), size, instructions.granule(kernel))
        self.copies = instructions.Copies(self, launch.copies_need_fence)
        self.matrix_products = tensor_cores.MatrixProducts(self)
        self.live = np.ones(self.count, bool)
        self.whole_blocks = self._compile()

    # --- operands --------------------------------------------------------------------------------

    def register(self, name: str, dtype: type) -> np.ndarray:
        """Return a register of all lanes as an array of that dtype, which shares its memory."""
        if name not in self.registers:
            raise PtxError(f"there is no register {name}")
        storage = self.registers[name]
        if np.dtype(dtype).itemsize != storage.itemsize:
            raise PtxError(f"{name} has {storage.itemsize} bytes, not {np.dtype(dtype).itemsize}")
        return storage.view(dtype)

    def source(self, operand: Operand, dtype: type) -> np.ndarray | np.generic:
        """Return an operand: an array over the lanes, or a number of the dtype."""
        if isinstance(operand, str) and operand in self.kernel.shared:
            return dtype(self.kernel.shared[operand])
        if isinstance(operand, str):
            return self.register(operand, dtype)
        if isinstance(operand, Not):
            raise PtxError("a negated predicate is no value")
        if isinstance(operand, float) and not issubclass(dtype, np.floating):
            bits = np.float32(operand) if np.dtype(dtype).itemsize == 4 else np.float64(operand)
            return bits.view(dtype)
        if isinstance(operand, int) and issubclass(dtype, np.floating):
            return np.array(operand, UINT[np.dtype(dtype).itemsize]).view(dtype)[()]
        if dtype is np.bool_:
            return np.bool_(operand)
        if isinstance(operand, int):
            bits = 8 * np.dtype(dtype).itemsize
            return np.array(operand % 2**bits, UINT[bits // 8]).view(dtype)[()]
        return dtype(operand)

    def predicate(self, operand: str | Not) -> np.ndarray:
        """Return a predicate's values now."""
        if isinstance(operand, Not):
            return ~self.register(operand.register, np.bool_)
        return self.register(operand, np.bool_)

    def addresses(self, operand: Address, wide: bool) -> Callable[[slice | np.ndarray], np.ndarray]:
        """Return a function of the lanes that gives their addresses."""
        dtype = np.uint64 if wide else np.uint32
        if operand.base in self.kernel.shared:
            start = operand.offset + self.kernel.shared[operand.base]
            values = np.full(self.count, start, dtype)
            return lambda lanes: values[lanes]
        if operand.base in self.registers and self.registers[operand.base].itemsize == 8:
            dtype = np.uint64
        base, offset = self.source(operand.base, dtype), self.source(operand.offset, dtype)
        if operand.offset == 0:
            return lambda lanes: base[lanes]
        return lambda lanes: base[lanes] + offset

    # --- lanes -----------------------------------------------------------------------------------

    def lanes(self, mask: np.ndarray | None) -> slice | np.ndarray:
        """Return the active lanes as an index."""
        active = self.live if mask is None else mask & self.live
        return slice(None) if active.all() else np.flatnonzero(active)

    def warps(self, mask: np.ndarray | None, size: int = 32) -> slice | np.ndarray:
        """Return the active warps (or groups of ``size`` lanes) as an index; each is complete."""
        active = (self.live if mask is None else mask & self.live).reshape(-1, size)
        some, every = active.any(axis=1), active.all(axis=1)
        if (some != every).any():
            raise PtxError(f"not all {size} lanes take part")
        return slice(None) if every.all() else np.flatnonzero(every)

    # --- control flow ----------------------------------------------------------------------------

    def _compile(self) -> dict[int, BasicBlock]:
        """Return the basic blocks by the index of their first instruction."""
        code = self.kernel.instructions
        ends = {i for i, x in enumerate(code) if x.opcode.split(".")[0] in _ENDS}
        starts = sorted({0, len(code), *self.kernel.labels.values(), *(i + 1 for i in ends)})
        blocks = {}
        for start, stop in itertools.pairwise(starts):
            has_end = stop - 1 in ends
            body = code[start : stop - 1 if has_end else stop]
            steps = []
            for instruction in body:
                try:
                    steps.append((self._step(instruction), instruction))
                except PtxError as error:
                    raise PtxError(f"{self.kernel.name}, {instruction}: {error}") from error
            blocks[start] = BasicBlock(start, steps, code[stop - 1] if has_end else None)
        blocks[len(code)] = BasicBlock(len(code), [], Instruction("ret", (), None, 0, "end"))
        return blocks

    def _step(self, instruction: Instruction) -> Step:
        step = instructions.build(self, instruction)
        if instruction.predicate is None:
            return step

        def guarded(mask: np.ndarray | None) -> None:
            predicate = self.predicate(instruction.predicate)
            step(predicate if mask is None else mask & predicate)

        return guarded

    def run(self) -> None:
        """Run until every lane has returned."""
        pending = {0: self.live.copy()}  # lanes by the index of their next instruction
        waiting: dict[tuple[int, int], np.ndarray] = {}  # by barrier, and the index behind it
        order = sorted(self.whole_blocks)
        following = dict(itertools.pairwise(order))

        def move(index: int, lanes: np.ndarray) -> None:
            if lanes.any():
                pending[index] = pending[index] | lanes if index in pending else lanes

        for _ in range(MAX_BLOCKS_RUN):
            if not pending:
                if waiting:
                    raise PtxError(f"{self.kernel.name}: lanes wait at a barrier that others miss")
                return
            block = self.whole_blocks[min(pending)]
            mask = pending.pop(block.start)
            everyone = None if not pending and not waiting else mask
            for step, instruction in block.steps:
                try:
                    step(everyone)
                except PtxError as error:
                    raise PtxError(f"{self.kernel.name}, {instruction}: {error}") from error
            end, behind = block.end, following.get(block.start)
            if end is None:
                move(behind, mask)
                continue
            taken = mask if end.predicate is None else mask & self.predicate(end.predicate)
            move(behind, mask & ~taken) if end.predicate is not None else None
            name = end.opcode.split(".")[0]
            if name == "bra":
                move(self.kernel.labels[end.operands[0]], taken)
            elif name in ("ret", "exit"):
                self.live &= ~taken
            elif name in ("bar", "barrier"):
                key = (_barrier(end, self.threads), behind)
                waiting[key] = waiting[key] | taken if key in waiting else taken
            else:
                raise PtxError(f"{self.kernel.name}, {end}: the kernel stops")
            self._release(waiting, move)
        raise PtxError(f"{self.kernel.name}: does not end")

    def _release(self, waiting: dict[tuple[int, int], np.ndarray], move: Callable) -> None:
        """Let the blocks pass a barrier at which all their lanes that have not returned wait."""
        for barrier in {key[0] for key in waiting}:
            here = np.zeros(self.count, bool)
            for key, lanes in waiting.items():
                if key[0] == barrier:
                    here |= lanes
            complete = (here | ~self.live).reshape(self.blocks, -1).all(axis=1)
            complete &= here.reshape(self.blocks, -1).any(axis=1)
            if not complete.any():
                continue
            self.shared.barriers += complete
            passing = np.repeat(complete, self.threads)
            for key in [key for key in waiting if key[0] == barrier]:
                move(key[1], waiting[key] & passing)
                waiting[key] = waiting[key] & ~passing
                if not waiting[key].any():
                    del waiting[key]


_ENDS = ("bra", "ret", "exit", "bar", "barrier", "trap")


def _barrier(instruction: Instruction, threads: int) -> int:
    """Return the number of the barrier of the whole block."""
    is_whole = len(instruction.operands) == 1 or instruction.operands[1] == threads
    parts = instruction.opcode.split(".")
    if parts[1] != "sync" or not set(parts[2:]) <= {"aligned"} or not is_whole:
        raise PtxError(f"{instruction}: unknown barrier")
    return int(instruction.operands[0])


class Launch(NamedTuple):
    """A launch of a kernel on CPU tensors.

    Attributes:
        kernel: the kernel.
        grid: blocks along x, y and z.
        threads: threads of a block.
        arguments: name and value of each parameter: a tensor or None, a number, or, for a structure
            passed by value, the list of its 8-byte fields.
        shared: bytes of dynamic shared memory.
        copies_need_fence: whether a proxy fence must lie between ``cp.async`` and ``wgmma``.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    threads: int
    arguments: Sequence[tuple[str, object]]
    shared: int = 0
    copies_need_fence: bool = True

    def run(self) -> None:
        """Run it.

        Raises:
            PtxError: the kernel does what a GPU would not do, or holds an unknown instruction.
        """
        memory, params = GlobalMemory(), bytearray()
        for variable, (name, value) in zip(self.kernel.params, self.arguments, strict=True):
            params += bytes(variable.offset - len(params))
            params += _pack(memory, name, value, variable.size)
        blocks = np.arange(np.prod(self.grid))
        step = max(1, LANES // self.threads)
        with np.errstate(all="ignore"):
            for start in range(0, len(blocks), step):
                Machine(self, bytes(params), memory, blocks[start : start + step]).run()


def _pack(memory: GlobalMemory, name: str, value: object, size: int) -> bytes:
    """Return the bytes of a parameter."""
    if isinstance(value, list):
        packed = b"".join(_pack(memory, name, x, 8) for x in value)
    elif isinstance(value, Tensor):
        packed = memory.add(name, value).to_bytes(8, "little")
    elif isinstance(value, float):
        packed = np.array(value, f"f{size}").tobytes()
    else:
        packed = int(value or 0).to_bytes(size, "little", signed=int(value or 0) < 0)
    if len(packed) != size:
        raise PtxError(f"{name}: {len(packed)} bytes for a parameter of {size}")
    return packed
