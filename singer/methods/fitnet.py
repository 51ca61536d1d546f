"""FitNet: plain feature matching, the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from singer.errors import SingerError
from singer.methods.base import Distiller, Weight
from singer.models.backbones import Backbone, BlockTokens
from singer.models.layer_matching import resolve_layers
from singer_kernels import kd_loss


def _check_layer_weights(weights: Sequence[float] | None, layers: Sequence[int]) -> None:
    if weights is not None and len(weights) != len(layers):
        raise SingerError(
            f"method.layer_weights: got {len(weights)} weights, expected {len(layers)}, one for "
            f"each of the distilled layers {list(layers)}"
        )


class FitNet(Distiller):
    """Match the projected student tokens to the teacher's, at the layers SiNGER would take.

    ``loss`` = ``kd_weight`` · ``kd``, ``kd`` the sum over the layers of the mean squared error over
    all tokens, each times the layer's weight. (SiNGER's ``official`` variant takes the mean over
    the layers: to compare with it, divide ``kd_weight`` by their number.)

    Args:
        teacher: the frozen model.
        student: the model to train.
        layers: see :class:`Distiller`.
        kd_weight: weight of the term.
        layer_weights: weight of each layer in the sum, in the layers' ascending order; None: 1.
        backend: which backend of ``singer_kernels`` computes it; None: the best that can run.
        kwargs: see :class:`Distiller`.

    Raises:
        SingerError: see :class:`Distiller`; or there are more or fewer layer weights than layers.

    Source: ``FitViT.py`` of SiNGER's authors' code. FitNets itself (arXiv 1412.6550) trains one
    hint layer in a stage of its own, before the rest.
    """

    def __init__(
        self,
        teacher: Backbone,
        student: Backbone,
        layers: Sequence[int] | None = None,
        *,
        kd_weight: Weight = 1.0,
        layer_weights: list[Weight] | None = None,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(teacher, student, layers, **kwargs)
        _check_layer_weights(layer_weights, self.layers)
        self.kd_weight = kd_weight
        self.layer_weights = layer_weights
        self.backend = backend

    @classmethod
    def check(cls, teacher: Backbone, student: Backbone, options: Mapping[str, Any]) -> None:
        """See :meth:`Distiller.check`: as many layer weights as layers."""
        super().check(teacher, student, options)
        layers = resolve_layers(options["layers"], teacher.depth, "method.layers")
        _check_layer_weights(options["layer_weights"], layers)

    def losses(self, student: BlockTokens, teacher: BlockTokens) -> dict[str, Tensor]:
        """See :meth:`Distiller.losses`; the term is ``kd``."""
        errors: list[Tensor] = [
            kd_loss(*self.token_pair(layer, student, teacher), backend=self.backend)
            for layer in self.layers
        ]
        if self.layer_weights is not None:
            errors = [w * error for w, error in zip(self.layer_weights, errors, strict=True)]
        kd = sum(errors)
        return {"loss": self.kd_weight * kd, "kd": kd}
