"""The distillation methods, by name.

To add one, write a subclass of :class:`Distiller` and name it in ``METHODS``; its configuration
goes into :mod:`singer.config`.
"""

from singer.methods.base import Distiller
from singer.methods.fitnet import FitNet
from singer.methods.singer import SiNGER

METHODS: dict[str, type[Distiller]] = {"singer": SiNGER, "fitnet": FitNet}

__all__ = ["METHODS", "Distiller", "FitNet", "SiNGER"]
