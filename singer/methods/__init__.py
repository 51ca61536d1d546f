"""The distillation methods, by name.

A method of your own is a subclass of :class:`Distiller` and one line that registers it::

    from typing import Annotated

    from pydantic import Field

    from singer.methods import METHODS, Distiller
    from singer_kernels import kd_loss


    class Scaled(Distiller):
        def __init__(self, *args, scale: Annotated[float, Field(gt=0)] = 0.5, **kwargs):
            super().__init__(*args, **kwargs)
            self.scale = scale

        def losses(self, student, teacher):
            pairs = [self.token_pair(layer, student, teacher) for layer in self.layers]
            kd = sum(kd_loss(student, self.scale * teacher) for student, teacher in pairs)
            return {"loss": kd, "kd": kd}


    METHODS["scaled"] = Scaled

Saved as ``scaled.py`` where Python finds it (installed, or in a folder on ``PYTHONPATH``), it is
chosen with ``plugins: [scaled]`` and ``method: {name: scaled, scale: 0.3}``. The options' types and
defaults are those of the constructor, see :func:`singer.methods.options.derive_options`. Every
parameter that requires a gradient must get one at each step: many processes wait for it.
"""

from singer.methods.base import Distiller
from singer.methods.fitnet import FitNet
from singer.methods.singer import SiNGER
from singer.methods.vitkd import ViTKD, ViTKDSameLayers

METHODS: dict[str, type[Distiller]] = {
    "singer": SiNGER,
    "fitnet": FitNet,
    "vitkd": ViTKD,
    "vitkd_same_layers": ViTKDSameLayers,
}

__all__ = ["METHODS", "Distiller", "FitNet", "SiNGER", "ViTKD", "ViTKDSameLayers"]
