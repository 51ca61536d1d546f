"""The losses of SiNGER, for anyone's distillation code. Importing this needs torch alone."""

from singer_kernels.backends import resolve_backend
from singer_kernels.functional import gram_loss, kd_loss, outlier_loss, refine, token_norms
from singer_kernels.losses import FusedLosses, fused_losses
from singer_kernels.types import FusedLossesOutput

__version__ = "0.1.0"

__all__ = [
    "FusedLosses",
    "FusedLossesOutput",
    "__version__",
    "fused_losses",
    "gram_loss",
    "kd_loss",
    "outlier_loss",
    "refine",
    "resolve_backend",
    "token_norms",
]
