"""FitNet: plain feature matching, the baseline."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from singer.methods.base import Distiller, Weight
from singer.models.backbones import Backbone, BlockTokens
from singer_kernels import kd_loss


class FitNet(Distiller):
    """Match the projected student tokens to the teacher's, at the layers SiNGER would take.

    ``loss`` = ``kd_weight`` · ``kd``, ``kd`` the sum over the layers of the mean squared error over
    all tokens. (SiNGER's ``official`` variant takes the mean over the layers: to compare with it,
    divide ``kd_weight`` by their number.)

    Args:
        teacher: the frozen model.
        student: the model to train.
        layers: see :class:`Distiller`.
        kd_weight: weight of the term.
        backend: which backend of ``singer_kernels`` computes it; None: the best that can run.
        images: unused.
        seed: of the projections' initialisation.

    Raises:
        SingerError: see :class:`Distiller`.

    Source: FitNets (arXiv 1412.6550); ``FitViT.py`` of SiNGER's authors' code.
    """

    def __init__(
        self,
        teacher: Backbone,
        student: Backbone,
        layers: Sequence[int] | None = None,
        *,
        kd_weight: Weight = 1.0,
        backend: str | None = None,
        images: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(teacher, student, layers, images=images, seed=seed)
        self.kd_weight = kd_weight
        self.backend = backend

    def losses(self, student: BlockTokens, teacher: BlockTokens) -> dict[str, Tensor]:
        """See :meth:`Distiller.losses`; the term is ``kd``."""
        kd = sum(
            kd_loss(*self.token_pair(layer, student, teacher), backend=self.backend)
            for layer in self.layers
        )
        return {"loss": self.kd_weight * kd, "kd": kd}
