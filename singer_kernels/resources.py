"""``python -m singer_kernels.resources``: what each Triton kernel takes of a GPU, without a GPU.

Every kernel is compiled ahead of time for each architecture, as the launches of real calls would
have it compiled: registers per thread, bytes of stack (spills), shared memory, whether the matrix
unit is used, and accesses to memory that are no vectors. ``--json`` prints the same as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from singer_kernels.backends.operators import ForwardOutput
from singer_kernels.backends.triton import (
    backward,
    configs,
    gram_pairs,
    gram_rows,
    gram_tile,
    is_interpreted,
    launch,
    losses,
    ops,
    outlier,
    refine_stage,
)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
RANKS = (16, 32, 64, 128, 256)
"""Of each row of the configuration table the largest rank, and one smaller."""

_KERNELS = {
    name: (module, kernel)
    for module in (refine_stage, outlier, gram_tile, gram_rows, gram_pairs, losses, backward)
    for name, kernel in vars(module).items()
    if name.endswith("_kernel")
}
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
_MATRIX_INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")


class Launch(NamedTuple):
    """One launch: a kernel's name and what it is specialised for."""

    kernel: str
    signature: tuple[tuple[str, str], ...]  # parameter to type
    constants: tuple[tuple[int, Any], ...]  # position to value
    aligned: tuple[int, ...]  # positions of arguments that 16 divides
    options: tuple[tuple[str, Any], ...]  # of the compiler

    @property
    def variant(self) -> str:
        """The constants that choose code, in short."""
        names = [name for name, _ in self.signature]
        chosen = {names[position]: value for position, value in self.constants}
        flags = [
            name.lower().replace("has_", "").replace("needs_", "")
            for name, value in chosen.items()
            if value is True
        ]
        return " ".join([*([chosen["MODE"]] if "MODE" in chosen else []), *flags])


class Usage(NamedTuple):
    """What one compiled kernel takes.

    Attributes:
        arch: the architecture, for example 90 for sm_90.
        operand: the dtype of the products' operands.
        rank: r of the call that launches it.
        kernel: the kernel's name.
        variant: its variant.
        tile: rows and inner width of its tiles.
        warps: per program.
        registers: per thread.
        spills: bytes of stack per thread.
        shared: bytes of shared memory per program.
        matrix: the matrix unit's instruction, or "" if there is none.
        narrow: loads and stores of two bytes or less: features should go in vectors of 16.
    """

    arch: int
    operand: str
    rank: int
    kernel: str
    variant: str
    tile: str
    warps: int
    registers: int
    spills: int
    shared: int
    matrix: str
    narrow: int


def _launch(name: str, params: list[Any], args: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    """Specialise a launch as Triton does at run time."""
    compiling = tuple((name, options.pop(name)) for name in _OPTIONS)
    given = dict(zip([param.name for param in params], args, strict=False)) | options
    signature, constants, aligned = [], [], []
    for position, param in enumerate(params):
        value = given[param.name]
        is_one = isinstance(value, int) and value == 1 and not param.do_not_specialize
        if param.is_constexpr or value is None or is_one:
            signature.append((param.name, "constexpr"))
            constants.append((position, value))
            continue
        if isinstance(value, Tensor):
            kind, is_aligned = _POINTERS[value.dtype], True
        elif isinstance(value, float):
            kind, is_aligned = "fp32", False
        else:
            kind = "i32" if value < 2**31 else "i64"
            is_aligned = value % 16 == 0 and not param.do_not_specialize
        signature.append((param.name, kind))
        if is_aligned:
            aligned.append(position)
    return Launch(name, tuple(signature), tuple(constants), tuple(aligned), compiling)


class _Recorder:
    """Stands in for a kernel: notes its launches, and the bytes of the tensors they are handed."""

    def __init__(self, name: str, kernel: Any, found: list[tuple[Launch, int]]) -> None:
        self.name, self.kernel, self.found = name, kernel, found

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def record(*args: Any, **options: Any) -> None:
            launch = _launch(self.name, self.kernel.params, args, dict(options))
            handed = sum(value.nbytes for value in args if isinstance(value, Tensor))
            self.found.append((launch, handed))

        return record


@contextlib.contextmanager
def _recording(arch: int) -> Iterator[list[tuple[Launch, int]]]:
    found: list[tuple[Launch, int]] = []
    architecture = launch.architecture
    try:
        for name, (module, kernel) in _KERNELS.items():
            setattr(module, name, _Recorder(name, kernel, found))
        launch.architecture = lambda device: arch
        yield found
    finally:
        for name, (module, kernel) in _KERNELS.items():
            setattr(module, name, kernel)
        launch.architecture = architecture


def training_step(
    operators: Any,
    dtype: torch.dtype,
    rank: int,
    patches: int,
    *,
    images: int = 16,
    width: int = 1024,
    target: bool = False,
    gram: bool = True,
    trains: bool = True,
    trains_target: bool = False,
) -> None:
    """Call the operators of a training step on one layer, on tensors without data.

    Args:
        operators: what has ``losses_forward`` and ``losses_backward``: the module ``ops`` of a
            backend whose operators are written in Python.
        dtype: of the features, the adapter and the products.
        rank: r.
        patches: P; there is one prefix token.
        images: B.
        width: D.
        target: whether the Gram target is another one than the teacher.
        gram: whether the layer is a last one; an intermediate one gives F̂, and its gradient comes
            back.
        trains: whether there is a backward.
        trains_target: whether the Gram target gets a gradient.
    """

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def features() -> Tensor:
        return new(images, 1 + patches, width, dtype=dtype)

    student, teacher = features(), features()
    down, up = new(width, rank, dtype=dtype), new(rank, width, dtype=dtype)
    arithmetic = (torch.float32, dtype)
    out = ForwardOutput(
        *operators.losses_forward(
            student,
            teacher,
            down,
            up,
            features() if target else None,
            gram,
            0.97,
            1,
            not gram,
            trains,
            gram and trains,
            trains_target,
            *arithmetic,
            dtype,
        )
    )
    if not trains:
        return
    one = new()
    operators.losses_backward(
        student,
        teacher,
        up,
        out.columns,
        out.gram_columns if gram else None,
        out.residual,
        out.norms,
        out.threshold,
        out.outlier_weight,
        one,
        one,
        one if gram else None,
        None if gram else features(),
        1,
        *arithmetic,
        dtype,
        torch.float32,
        torch.float32,
    )


def _calls(dtype: torch.dtype, rank: int) -> Iterator[Callable[[], Any]]:
    """Yield the calls whose launches are compiled."""
    step = partial(training_step, ops, dtype, rank)
    yield lambda: step(196)
    yield lambda: step(196, gram=False)
    yield lambda: step(196, target=True)
    yield lambda: step(196, target=True, trains_target=True)
    yield lambda: step(1369)
    yield lambda: step(196, trains=False)


def _require_compiler() -> None:
    if is_interpreted():
        raise RuntimeError("TRITON_INTERPRET is set: interpreted kernels can't be compiled")


def launches(arch: int, operand: str, rank: int) -> list[Launch]:
    """Return the distinct launches of the training steps of one architecture, dtype and rank.

    Args:
        arch: one of ``configs.ARCHITECTURES``.
        operand: a key of ``DTYPES``.
        rank: r.

    Returns:
        The launches, in the order of their first appearance.

    Raises:
        RuntimeError: Triton's interpreter is on: then there is nothing to compile.
    """
    _require_compiler()
    with _recording(arch) as found:
        for call in _calls(DTYPES[operand], rank):
            call()
    return list(dict.fromkeys(launch for launch, _ in found))


def traffic(
    arch: int, operand: str, rank: int, patches: int, **sizes: int
) -> list[tuple[str, int]]:
    """Return the launches of a last layer's training step, and what each is handed.

    A kernel reads or writes a tensor that it is handed once at least: the sum bounds from below
    what the step moves.

    Args:
        arch: one of ``configs.ARCHITECTURES``.
        operand: a key of ``DTYPES``.
        rank: r.
        patches: P.
        sizes: ``images`` and ``width``; see :func:`training_step`.

    Returns:
        Kernel and bytes, launch by launch.

    Raises:
        RuntimeError: Triton's interpreter is on.
    """
    _require_compiler()
    with _recording(arch) as found:
        training_step(ops, DTYPES[operand], rank, patches, **sizes)
    return [(launch.kernel.removesuffix("_kernel"), handed) for launch, handed in found]


def _cuobjdump() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def compile_launch(arch: int, operand: str, rank: int, given: Launch) -> Usage:
    """Compile one launch and read what it takes.

    Args:
        arch: the architecture.
        operand: of the call that launches it.
        rank: likewise.
        given: the launch.

    Raises:
        RuntimeError: the compiled kernel can't be read.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _, kernel = _KERNELS[given.kernel]
    source = ASTSource(
        kernel,
        signature=dict(given.signature),
        constexprs={(position,): value for position, value in given.constants},
        attrs={(position,): [["tt.divisibility", 16]] for position in given.aligned},
    )
    options = dict(given.options)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [_cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    read = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if read is None:
        raise RuntimeError(f"{given.kernel}: no resource usage in {text!r}")
    registers, stack, local = map(int, read.groups())
    constants = {given.signature[position][0]: value for position, value in given.constants}
    rows = constants.get("BLOCK_T", constants.get("BLOCK_P", 0))
    inner = constants.get("BLOCK_C", constants.get("BLOCK_D", 0))
    return Usage(
        arch,
        operand,
        rank,
        given.kernel.removesuffix("_kernel"),
        given.variant,
        f"{rows}x{inner}",
        options["num_warps"],
        registers,
        stack + local,
        compiled.metadata.shared,
        next((name for name in _MATRIX_INSTRUCTIONS if name in compiled.asm["ptx"]), ""),
        len(re.findall(r"(?:ld|st)\.global[\w.:]*\.[bu](?:8|16)\b", compiled.asm["ptx"])),
    )


def usages(
    archs: tuple[int, ...] = configs.ARCHITECTURES,
    operands: tuple[str, ...] = tuple(DTYPES),
    ranks: tuple[int, ...] = RANKS,
    processes: int | None = None,
) -> list[Usage]:
    """Compile every kernel in every configuration, in parallel.

    Args:
        archs: the architectures.
        operands: the dtypes of the products' operands.
        ranks: r of the calls.
        processes: how many compile at once; None: one per core.

    Returns:
        What each compiled kernel takes; launches that several calls share appear once.
    """
    jobs: dict[tuple[int, Launch], tuple[int, str, int, Launch]] = {}
    for arch in archs:
        for operand in operands:
            for rank in ranks:
                if DTYPES[operand] == torch.float16 and rank > configs.MAX_MATRIX_RANK:
                    continue
                for given in launches(arch, operand, rank):
                    jobs.setdefault((arch, given), (arch, operand, rank, given))
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(compile_launch, *zip(*jobs.values(), strict=True)))


def table(found: list[Usage]) -> str:
    """Return the usages as a table in text."""
    lines = [list(Usage._fields), *[[str(value) for value in usage] for usage in found]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(Usage._fields))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main(arguments: list[str] | None = None) -> None:
    """Print the table; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m singer_kernels.resources", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=configs.ARCHITECTURES, default=configs.ARCHITECTURES
    )
    parser.add_argument("--operand", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rank", type=int, nargs="+", default=RANKS)
    given = parser.parse_args(arguments)
    found = usages(tuple(given.arch), tuple(given.operand), tuple(given.rank))
    if given.json:
        print(json.dumps([usage._asdict() for usage in found], indent=1))
    else:
        print(table(found))


if __name__ == "__main__":
    main()
