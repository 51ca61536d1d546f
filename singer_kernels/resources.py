"""``python -m singer_kernels.resources``: GPU resources of each Triton kernel, without a GPU.

Compiles every kernel ahead of time for each architecture, with the specialisations of real calls,
and prints registers per thread, bytes of stack (spills), shared memory, the tensor core instruction
and the number of narrow memory accesses. ``--json`` prints JSON.
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
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from singer_kernels.backends.operators import BackwardInputs, ForwardInputs
from singer_kernels.backends.triton import (
    backward,
    configs,
    gram_pairs,
    gram_rows,
    gram_tile,
    is_interpreted,
    losses,
    ops,
    outlier,
    refine,
)
from singer_kernels.backends.triton import (
    launch as triton_launch,
)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
RANKS = (16, 32, 64, 128, 256)
"""The largest rank of each row of the configuration table, and a smaller one."""

CUOBJDUMP_SECONDS = 60.0

_KERNELS = {
    name: (module, kernel)
    for module in (refine, outlier, gram_tile, gram_rows, gram_pairs, losses, backward)
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
    """A launch: a kernel's name and its specialisation."""

    kernel: str
    signature: tuple[tuple[str, str], ...]  # parameter, type
    constants: tuple[tuple[int, Any], ...]  # position, value
    aligned: tuple[int, ...]  # positions of the arguments divisible by 16
    options: tuple[tuple[str, Any], ...]  # compiler options

    @property
    def variant(self) -> str:
        """The mode and the flags that are on, in short."""
        names = [name for name, _ in self.signature]
        chosen = {names[position]: value for position, value in self.constants}
        flags = [
            name.lower().replace("has_", "").replace("needs_", "")
            for name, value in chosen.items()
            if value is True
        ]
        return " ".join([*([chosen["MODE"]] if "MODE" in chosen else []), *flags])


class Usage(NamedTuple):
    """Resources of one compiled kernel."""

    arch: int  # 90 for sm_90
    operand: str  # dtype of the products' operands
    rank: int  # r of the call that launches it
    kernel: str
    variant: str  # the mode and the flags that are on
    tile: str  # rows and inner width
    warps: int  # per program
    registers: int  # per thread
    spills: int  # bytes of stack per thread
    shared: int  # bytes of shared memory per program
    matrix: str  # tensor core instruction; "": none
    narrow: int  # loads and stores of two bytes or less; features should take vectors of 16 bytes


def _launch(name: str, params: list[Any], args: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    """Specialise a launch as Triton does at run time."""
    compiler = tuple((name, options.pop(name)) for name in _OPTIONS)
    values = dict(zip([param.name for param in params], args, strict=False)) | options
    signature, constants, aligned = [], [], []
    for position, param in enumerate(params):
        value = values[param.name]
        is_one = isinstance(value, int) and value == 1 and not param.do_not_specialize
        if param.is_constexpr or value is None or is_one:
            signature.append((param.name, "constexpr"))
            constants.append((position, value))
            continue
        if isinstance(value, Tensor):
            kind, is_aligned = _POINTERS[value.dtype], not param.do_not_specialize_on_alignment
        elif isinstance(value, float):
            kind, is_aligned = "fp32", False
        else:
            kind = "i32" if value < 2**31 else "i64"
            is_aligned = value % 16 == 0 and not param.do_not_specialize
        signature.append((param.name, kind))
        if is_aligned:
            aligned.append(position)
    return Launch(name, tuple(signature), tuple(constants), tuple(aligned), compiler)


class _Recorder:
    """Replaces a kernel: records its launches and the bytes of their tensor arguments."""

    def __init__(self, name: str, kernel: Any, found: list[tuple[Launch, int]]) -> None:
        self.name, self.kernel, self.found = name, kernel, found

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def record(*args: Any, **options: Any) -> None:
            launch = _launch(self.name, self.kernel.params, args, dict(options))
            num_bytes = sum(value.nbytes for value in args if isinstance(value, Tensor))
            self.found.append((launch, num_bytes))

        return record


@contextlib.contextmanager
def _recording(arch: int) -> Iterator[list[tuple[Launch, int]]]:
    if is_interpreted():
        raise RuntimeError("TRITON_INTERPRET is set: interpreted kernels can't be compiled")
    found: list[tuple[Launch, int]] = []
    architecture = triton_launch.architecture
    try:
        for name, (module, kernel) in _KERNELS.items():
            setattr(module, name, _Recorder(name, kernel, found))
        triton_launch.architecture = lambda: arch
        yield found
    finally:
        for name, (module, kernel) in _KERNELS.items():
            setattr(module, name, kernel)
        triton_launch.architecture = architecture


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
    """Call the operators of one layer's training step on meta tensors.

    Args:
        operators: module ``ops`` of a backend written in Python, with ``losses_forward`` and
            ``losses_backward``.
        dtype: of the features, the adapter and the products.
        rank: r.
        patches: P; there is one prefix token.
        images: B.
        width: D.
        target: whether the Gram target is not the teacher.
        gram: True for a last layer; False for a mid layer, which returns F̂ and receives its
            gradient.
        trains: whether there is a backward.
        trains_target: whether the Gram target receives a gradient.
    """

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def features() -> Tensor:
        return new(images, 1 + patches, width, dtype=dtype)

    student, teacher = features(), features()
    down, up = new(width, rank, dtype=dtype), new(rank, width, dtype=dtype)
    out = operators.losses_forward(
        ForwardInputs(
            student,
            teacher,
            down,
            up,
            features() if target else None,
            gram,
            0.97,
            1,
            has_refined=not gram,
            has_residual=trains,
            has_grad_hz=gram and trains,
            has_grad_target=trains_target,
            acc=torch.float32,
            product=dtype,
            gram_product=dtype,
        )
    )
    if not trains:
        return
    one = new()
    operators.losses_backward(
        BackwardInputs(
            student,
            teacher,
            up,
            out.hz,
            out.grad_hz if gram else None,
            out.residual,
            out.norms,
            out.threshold,
            out.outlier_weight,
            grad_kd=one,
            grad_outlier=one,
            grad_info=one if gram else None,
            grad_refined=None if gram else features(),
            num_prefix_tokens=1,
            acc=torch.float32,
            product=dtype,
            student_dtype=dtype,
            down_dtype=torch.float32,
            up_dtype=torch.float32,
        )
    )


_STEPS: tuple[tuple[int, dict[str, bool]], ...] = (
    (196, {}),
    (196, {"gram": False}),
    (196, {"target": True}),
    (196, {"target": True, "trains_target": True}),
    (1369, {}),
    (196, {"trains": False}),
)
"""Patches and options of the training steps whose launches are compiled."""


def launches(arch: int, operand: str, rank: int) -> list[Launch]:
    """Return the distinct launches of the training steps of one architecture, dtype and rank.

    Args:
        arch: one of ``configs.ARCHITECTURES``.
        operand: a key of ``DTYPES``.
        rank: r.

    Returns:
        The launches, in the order of their first appearance.

    Raises:
        RuntimeError: Triton's interpreter is on: there is nothing to compile.
    """
    with _recording(arch) as found:
        for patches, options in _STEPS:
            training_step(ops, DTYPES[operand], rank, patches, **options)
    return list(dict.fromkeys(launch for launch, _ in found))


def traffic(
    arch: int, operand: str, rank: int, patches: int, **sizes: Any
) -> list[tuple[str, int]]:
    """Return the launches of a last layer's training step, with the bytes of their tensors.

    A kernel reads or writes each of its tensors at least once: the sum is a lower bound of the
    step's memory traffic.

    Args:
        arch: one of ``configs.ARCHITECTURES``.
        operand: a key of ``DTYPES``.
        rank: r.
        patches: P.
        sizes: ``images`` and ``width``; see :func:`training_step`.

    Returns:
        Kernel and bytes of each launch.

    Raises:
        RuntimeError: Triton's interpreter is on.
    """
    with _recording(arch) as found:
        training_step(ops, DTYPES[operand], rank, patches, **sizes)
    return [(launch.kernel.removesuffix("_kernel"), num_bytes) for launch, num_bytes in found]


def _resource_usage(cuobjdump: Path, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "-res-usage", file.name]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=CUOBJDUMP_SECONDS
            ).stdout
        except (OSError, subprocess.SubprocessError) as error:
            raise RuntimeError(f"cuobjdump: {error}") from error


def compile_launch(arch: int, operand: str, rank: int, launch: Launch) -> Usage:
    """Compile one launch and read its resources.

    Args:
        arch: the architecture.
        operand: the dtype of the products' operands.
        rank: r.
        launch: the launch.

    Raises:
        RuntimeError: cuobjdump failed, or printed no resource usage.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _, kernel = _KERNELS[launch.kernel]
    source = ASTSource(
        kernel,
        signature=dict(launch.signature),
        constexprs={(position,): value for position, value in launch.constants},
        attrs={(position,): [["tt.divisibility", 16]] for position in launch.aligned},
    )
    options = dict(launch.options)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = _resource_usage(cuobjdump, compiled.asm["cubin"])
    read = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if read is None:
        raise RuntimeError(f"{launch.kernel}: no resource usage in {text!r}")
    registers, stack, local = map(int, read.groups())
    constants = {launch.signature[position][0]: value for position, value in launch.constants}
    rows = constants.get("BLOCK_T", constants.get("BLOCK_P", 0))
    inner = constants.get("BLOCK_C", constants.get("BLOCK_D", 0))
    return Usage(
        arch,
        operand,
        rank,
        launch.kernel.removesuffix("_kernel"),
        launch.variant,
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
        processes: number of compiling processes; None: one per core.

    Returns:
        The resources of each kernel; launches shared by several calls appear once.
    """
    jobs: dict[tuple[int, Launch], tuple[int, str, int, Launch]] = {}
    for arch in archs:
        for operand in operands:
            for rank in ranks:
                if DTYPES[operand] == torch.float16 and rank > configs.MAX_MATRIX_RANK:
                    continue
                for launch in launches(arch, operand, rank):
                    jobs.setdefault((arch, launch), (arch, operand, rank, launch))
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(compile_launch, *zip(*jobs.values(), strict=True)))


def table(found: list[Usage]) -> str:
    """Return the usages as a text table."""
    lines = [list(Usage._fields), *[[str(value) for value in usage] for usage in found]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(Usage._fields))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main(arguments: list[str] | None = None) -> None:
    """Print the table; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m singer_kernels.resources", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=configs.ARCHITECTURES, default=configs.ARCHITECTURES
    )
    parser.add_argument("--operand", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rank", type=int, nargs="+", default=RANKS)
    options = parser.parse_args(arguments)
    try:
        found = usages(tuple(options.arch), tuple(options.operand), tuple(options.rank))
    except RuntimeError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    if options.json:
        print(json.dumps([usage._asdict() for usage in found], indent=1))
    else:
        print(table(found))


if __name__ == "__main__":
    main()
