"""The stages of the losses: what each allocates, and how its kernels are launched."""

from singer_kernels.backends.triton.stages.backward import run_backward
from singer_kernels.backends.triton.stages.common import (
    Arithmetic,
    architecture,
    on_device,
    rows_contiguous,
)
from singer_kernels.backends.triton.stages.gram import (
    Gram,
    GramRows,
    mean_of_parts,
    row_norms,
    run_gram,
)
from singer_kernels.backends.triton.stages.outlier import run_outlier, sum_losses
from singer_kernels.backends.triton.stages.refine import run_refine

__all__ = [
    "Arithmetic",
    "Gram",
    "GramRows",
    "architecture",
    "mean_of_parts",
    "on_device",
    "row_norms",
    "rows_contiguous",
    "run_backward",
    "run_gram",
    "run_outlier",
    "run_refine",
    "sum_losses",
]
