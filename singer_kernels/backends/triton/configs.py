"""Launch configurations of the kernels: a fixed table by architecture, dtype and rank.

A configuration changes results in the order of sums alone: with the fixed table they are
reproducible bit by bit. ``SINGER_AUTOTUNE=1`` measures instead; see ``tuning``.
"""

from __future__ import annotations

from typing import NamedTuple

ARCHITECTURES = (80, 86, 90, 100)
"""sm_80, sm_90, sm_100; sm_86 stands for all of 8.x and 12.x with 99 KiB of shared memory."""

SHARED_MEMORY = {80: 166912, 86: 101376, 90: 232448, 100: 232448}
"""Largest shared memory of one program, bytes."""

MAX_RANK = 256
MAX_IMAGES = 65535
"""Largest grid size along axes 1 and 2."""

MAX_PATCHES = 16384
"""One program of the outlier kernel holds an image's norms in registers."""

MAX_IDENTITY_RANK = 64
"""Largest rank for the Gram identity: above it, the extra tiles in ``refine`` spill."""

MAX_MATRIX_RANK = 128
"""Largest rank for float32 products on tensor cores: above it, three TF32 products spill. The IEEE
products used instead spill as well if float16 operands must be widened first."""

MAX_GRAM_ROWS_RANK = 64
"""Largest rank for a program that owns rows of the Gram matrices: above it, X [H | Z] of its rows
and two Gram tiles do not fit in registers."""

MIN_PATCHES_FOR_PAIRS = 512
"""Number of patches from which E is written to memory: a program that owns rows reads each token
P / BLOCK_P times, twice as often as pairs of tiles; from here that costs more than writing E."""

MAX_DIFFERENCE_BYTES = 2**28
"""Largest memory for E: more images are computed in groups, which does not change results. At
least one image at a time: 512 MiB in bfloat16 at ``MAX_PATCHES``."""

MAX_PARTIALS = 4096
"""Largest number of partial sums of a loss that one program adds; of more, many programs add a part
each first."""

SPLITS = 16
"""Splits of the tokens for dWd and dWu: with 8 blocks of columns at D = 1024 that is one program
for each of 128 multiprocessors, and the partial sums stay small compared to F."""


class Config(NamedTuple):
    """Launch configuration of a kernel.

    Attributes:
        rows: tokens or patches of a tile (BLOCK_T, BLOCK_P).
        inner: block of the inner loop, or columns of a program (BLOCK_D, BLOCK_C).
        warps: num_warps.
        stages: num_stages of the software pipeline.
        registers: maxnreg; None leaves it to ptxas. Some kernels spill unless it is set, others
            only if it is.
    """

    rows: int
    inner: int
    warps: int
    stages: int
    registers: int | None = None


class Choice(NamedTuple):
    """A row of the table, for these architectures, operand dtypes and ranks up to ``max_rank``."""

    architectures: tuple[int, ...]
    operands: tuple[str, ...]
    max_rank: int
    config: Config
    reason: str


INTERPRETER = Config(64, 64, 1, 1)
"""Large tiles: the interpreter's time depends on the number of operations, not on their sizes."""

SMALL = Config(0, 0, 4, 1, 255)
"""Small kernels, which choose their own tiles."""

_ALL = ARCHITECTURES
_BOTH = ("bfloat16", "float32")

_BF16, _F32 = ("bfloat16",), ("float32",)
_HOPPER, _AMPERE = (90, 100), (80, 86)
_BEFORE_100 = (80, 86, 90)

TABLE: dict[str, tuple[Choice, ...]] = {
    "refine": (
        Choice(_HOPPER, _BF16, 64, Config(64, 32, 8, 3, 255), "64 rows fill wgmma"),
        Choice(_ALL, _BF16, 256, Config(32, 32, 8, 2, 255), "64 rows spill on sm_80"),
        Choice(_ALL, _F32, 16, Config(32, 32, 8, 2, 255), "64 rows spill"),
        Choice(_ALL, _F32, 32, Config(32, 16, 8, 2, 255), "32 columns spill at rank 32"),
        Choice(_BEFORE_100, _F32, 64, Config(32, 32, 8, 2, 255), "64 rows spill"),
        Choice((100,), _F32, 64, Config(32, 16, 8, 2, 255), "32 columns spill with Triton 3.8"),
        Choice(_ALL, _F32, 128, Config(16, 32, 8, 2, 255), "32 rows spill at rank 128"),
        Choice((80,), _F32, 256, Config(16, 16, 8, 2, 255), "spills without 255, Triton 3.8"),
        Choice(_ALL, _F32, 256, Config(16, 16, 8, 2), "32 columns spill at rank 256"),
    ),
    "gram_rows": (
        Choice(_HOPPER, _BF16, 64, Config(64, 64, 8, 3), "64 rows fill wgmma; 128 spill"),
        Choice(_AMPERE, _BF16, 64, Config(32, 64, 4, 2, 255), "64 rows spill on sm_80"),
        Choice(_ALL, _F32, 64, Config(16, 32, 8, 3), "32 rows spill; so do 2 stages with 3.8"),
    ),
    "gram_rows_recompute": (
        Choice(_HOPPER, _BF16, 64, Config(64, 32, 8, 2), "64 columns spill; rows as gram_rows"),
        Choice(_AMPERE, _BF16, 64, Config(32, 16, 4, 2), "32 columns spill; rows as gram_rows"),
    ),
    "gram_pairs": (
        Choice(_ALL, _BF16, 256, Config(64, 64, 8, 3), "128 rows spill, by 24 to 64 bytes"),
        Choice(_HOPPER, _F32, 256, Config(64, 32, 8, 2), "64 columns spill on sm_90"),
        Choice(_AMPERE, _F32, 256, Config(32, 32, 8, 2), "64 rows spill on sm_80"),
    ),
    "gram_pairs_recompute": (
        Choice(_HOPPER, _BF16, 64, Config(64, 64, 8, 3), "as gram_pairs"),
        Choice(_AMPERE, _BF16, 64, Config(64, 32, 8, 2), "64 columns spill; rows as gram_pairs"),
    ),
    "gram_gradient": (
        Choice(_ALL, _BF16, 256, Config(64, 128, 8, 3), "[H | Z] of rank 64 in one pass over E"),
        Choice(_HOPPER, _F32, 256, Config(64, 64, 8, 2), "two stages fit beside three products"),
        Choice(_AMPERE, _F32, 256, Config(32, 64, 4, 2), "64 rows spill on sm_80"),
    ),
    "backward_rows": (
        Choice(_ALL, _BF16, 128, Config(32, 32, 4, 2), "bound by memory: many small programs"),
        Choice(_ALL, _F32, 128, Config(32, 32, 8, 2, 255), "4 warps spill with Triton 3.8"),
        Choice(_ALL, _BOTH, 256, Config(16, 32, 8, 2), "32 rows spill at rank 256"),
    ),
    "backward_tokens": (
        Choice(_HOPPER, _BF16, 64, Config(32, 128, 8, 2, 255), "wide: H is read D / 128 times"),
        Choice(_AMPERE, _BF16, 64, Config(32, 32, 8, 2), "64 columns spill on sm_86"),
        Choice(_HOPPER, _BF16, 128, Config(16, 64, 8, 2), "32 rows spill with Triton 3.7"),
        Choice(_AMPERE, _BF16, 128, Config(16, 32, 8, 2), "32 rows spill on sm_80"),
        Choice(_ALL, _BF16, 256, Config(16, 16, 8, 2), "32 columns spill at rank 256"),
        Choice(_ALL, _F32, 32, Config(32, 32, 8, 2, 255), "4 warps spill"),
        Choice(_AMPERE, _F32, 64, Config(32, 32, 8, 2), "4 warps spill"),
        Choice(_HOPPER, _F32, 64, Config(16, 32, 8, 2), "32 rows spill with Triton 3.8"),
        Choice(_ALL, _F32, 128, Config(16, 32, 8, 2), "32 rows spill at rank 128"),
        Choice(_ALL, _F32, 256, Config(16, 16, 8, 1), "two stages spill on sm_90"),
    ),
}
"""Spills as reported by ``python -m singer_kernels.resources`` with Triton 3.6, 3.7, 3.8 and 3.9.
Among the configurations that fit, the choice is computed, not yet measured on a device."""


def architecture(capability: tuple[int, int]) -> int:
    """Return the table's architecture for a device's compute capability."""
    if capability in ((8, 0), (9, 0)):
        return capability[0] * 10
    return 100 if capability[0] in (10, 11) else 86


def takes_identity(rank: int, width: int) -> bool:
    """Whether the Gram identity is cheaper: its six products of width r against one of width D."""
    return rank <= MAX_IDENTITY_RANK and 6 * rank <= width


def takes_gram_rows(rank: int, patches: int) -> bool:
    """Whether ``gram_rows`` computes X [H | Z] (no ``[P, P]`` in memory), not ``gram_pairs``."""
    return patches < MIN_PATCHES_FOR_PAIRS and rank <= MAX_GRAM_ROWS_RANK


def outlier_warps(block_p: int) -> int:
    """Return num_warps of the outlier kernel: at least 8 norms per thread."""
    return max(1, min(8, block_p // 256))


def lookup(kernel: str, arch: int | None, operand: str, rank: int) -> Config:
    """Return a kernel's configuration.

    Args:
        kernel: a key of ``TABLE``.
        arch: one of ``ARCHITECTURES``; None: the interpreter.
        operand: "bfloat16", "float32", or "float64" (the interpreter alone).
        rank: r.
    """
    if arch is None:
        return INTERPRETER
    for choice in TABLE[kernel]:
        if arch in choice.architectures and operand in choice.operands and rank <= choice.max_rank:
            return choice.config
    raise LookupError(f"{kernel}: no configuration for sm_{arch}, {operand}, rank {rank}")
