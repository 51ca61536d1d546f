"""SiNGER's losses, for any distillation code. Importing this package needs only torch."""

from singer_kernels import backends
from singer_kernels.backends import resolve_backend
from singer_kernels.functional import gram_loss, kd_loss, outlier_loss, refine, token_norms
from singer_kernels.losses import FusedLosses, fused_losses
from singer_kernels.types import FusedLossesOutput

__version__ = "0.1.0"

# Imported now: torch.compile can't trace an import. Triton itself is imported by its first call.
for _name in backends.NAMES:
    backends.load(_name)

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
