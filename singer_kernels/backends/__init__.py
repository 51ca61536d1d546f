"""The backends, and the choice among them.

A backend is a module of this package that has the functions of :class:`Backend`. To add one, write
the module and name it in ``_PREFERENCE``.
"""

from __future__ import annotations

import importlib
import logging
import os
from typing import Protocol, cast

# Not "import torch": importing the backend of that name would put it in the place of PyTorch here.
from torch import Tensor
from torch import device as Device
from torch.compiler import is_compiling

from singer_kernels.backends.problem import Problem
from singer_kernels.types import FusedLossesOutput

_logger = logging.getLogger("singer_kernels")

_PREFERENCE = ("triton", "cuda", "cpu", "torch", "reference")
"""The backends that exist, the one to prefer first."""

ENVIRONMENT_VARIABLE = "SINGER_BACKEND"

# Dictionaries, not functools.cache: torch.compile traces a look-up, but no import and no cache.
_loaded: dict[str, Backend] = {}
_chosen: dict[Device, str] = {}  # device to the backend chosen automatically
_passed_over: set[str] = set()  # the reasons logged for calls that the chosen one doesn't serve


class Backend(Protocol):
    """What a backend's module offers.

    The losses are those of :mod:`singer_kernels.reference`. They are handed checked arguments,
    give gradients, and refuse to be differentiated twice.
    """

    def unavailable_reason(self, device: Device, asked: bool) -> str | None:
        """Return None if the backend can run on that device, else why not, in one line.

        ``asked`` tells whether it was asked for by name: one that can run, but should not be the
        automatic choice, gives its reason only if it was not.
        """

    def unsupported_reason(self, problem: Problem) -> str | None:
        """Return None if the backend serves calls of that size, else why not, in one line."""

    def fused_losses(
        self,
        student: Tensor,
        teacher: Tensor,
        down: Tensor,
        up: Tensor,
        *,
        gram_target: Tensor | None,
        gram: bool,
        quantile: float,
        num_prefix_tokens: int,
        return_refined: bool,
    ) -> FusedLossesOutput:
        """See :func:`singer_kernels.reference.fused_losses`."""

    def refine(self, teacher: Tensor, down: Tensor, up: Tensor, num_prefix_tokens: int) -> Tensor:
        """See :func:`singer_kernels.reference.refine`."""

    def token_norms(self, tokens: Tensor, num_prefix_tokens: int) -> Tensor:
        """See :func:`singer_kernels.reference.token_norms`."""

    def outlier_loss(self, norms: Tensor, quantile: float) -> Tensor:
        """See :func:`singer_kernels.reference.outlier_loss`."""

    def gram_loss(self, tokens: Tensor, target: Tensor, num_prefix_tokens: int) -> Tensor:
        """See :func:`singer_kernels.reference.gram_loss`."""

    def kd_loss(self, student: Tensor, tokens: Tensor) -> Tensor:
        """See :func:`singer_kernels.reference.kd_loss`."""


def names() -> tuple[str, ...]:
    """Return the names of the backends that exist, the preferred one first."""
    return _PREFERENCE


def load(name: str) -> Backend:
    """Import a backend's module.

    Raises:
        ImportError: something that the backend needs is missing.
    """
    if name not in _loaded:
        _loaded[name] = cast("Backend", importlib.import_module(f"singer_kernels.backends.{name}"))
    return _loaded[name]


def unavailable_reason(name: str, device: Device, asked: bool = True) -> str | None:
    """Say why a backend can't run on a device.

    Args:
        name: the backend's name.
        device: where it would run.
        asked: whether it was asked for by name; False: by the automatic choice.

    Returns:
        The reason in one line, or None if it can run.
    """
    try:
        return load(name).unavailable_reason(device, asked)
    except ImportError as error:
        return f"it can't be imported: {error}"


def _automatic(device: Device) -> str:
    if device in _chosen:
        return _chosen[device]
    skipped: list[str] = []
    for name in _PREFERENCE:
        reason = unavailable_reason(name, device, asked=False)
        if reason is None:
            note = f" ({'; '.join(skipped)})" if skipped else ""
            if not is_compiling():  # a call under torch.compile can't be logged
                _logger.info("backend %r chosen for %s%s", name, device, note)
            _chosen[device] = name
            return name
        skipped.append(f"{name}: {reason}")
    raise RuntimeError(f"no backend can run on {device}: {'; '.join(skipped)}")


def _serving(first: str, device: Device, problem: Problem) -> str:
    """Return the first backend, from the one chosen for the device on, that serves a problem."""
    skipped: list[str] = []
    for name in _PREFERENCE[_PREFERENCE.index(first) :]:
        if name != first and unavailable_reason(name, device, asked=False) is not None:
            continue
        reason = load(name).unsupported_reason(problem)
        if reason is None:
            note = f"backend {name!r} takes calls on {device} ({'; '.join(skipped)})"
            if skipped and not is_compiling() and note not in _passed_over:
                _passed_over.add(note)
                _logger.info(note)
            return name
        skipped.append(f"{name}: {reason}")
    raise RuntimeError(f"no backend serves this call on {device}: {'; '.join(skipped)}")


def check_name(backend: str | None, source: str = "backend") -> str | None:
    """Check that a backend of that name exists; None, the automatic choice, is returned as it is.

    Args:
        backend: the name.
        source: where it comes from, for the message.

    Raises:
        TypeError: it is no string.
        ValueError: there is no such backend.
    """
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"{source}: got {backend!r}, expected a string or None")
    if backend is not None and backend not in _PREFERENCE:
        raise ValueError(f"{source}: got {backend!r}, expected one of {', '.join(_PREFERENCE)}")
    return backend


def resolve_backend(backend: str | None, device: Device, problem: Problem | None = None) -> str:
    """Return the name of the backend that a call would use.

    Args:
        backend: a backend's name, or None for the one named by the environment variable
            ``SINGER_BACKEND`` or, if that is unset or empty, the best that can run on the device.
            The automatic choice is logged once per device at INFO.
        device: where the tensors are.
        problem: the call's sizes; None: any. A backend that does not serve them is passed over by
            the automatic choice, which is logged once per reason at INFO.

    Returns:
        The name.

    Raises:
        TypeError: ``backend`` is neither a string nor None.
        ValueError: there is no backend of that name.
        RuntimeError: the backend that was asked for can't run; the message has its reason.
    """
    source = "backend"
    if backend is None:
        source = ENVIRONMENT_VARIABLE
        backend = os.environ.get(ENVIRONMENT_VARIABLE) or None
    backend = check_name(backend, source)
    if backend is None:
        # "cpu" and "cpu:0", "cuda" and "cuda:0" are one device: chosen for, and logged, once.
        chosen = _automatic(
            Device("cpu") if device.type == "cpu" else Device(device.type, device.index or 0)
        )
        return chosen if problem is None else _serving(chosen, device, problem)
    reason = unavailable_reason(backend, device)
    if reason is not None:
        raise RuntimeError(f"{source}: {backend!r} can't run on {device}: {reason}")
    if problem is not None:
        reason = load(backend).unsupported_reason(problem)
        if reason is not None:
            raise RuntimeError(f"{source}: {backend!r} can't run this call: {reason}")
    return backend


def resolve(backend: str | None, device: Device, problem: Problem | None = None) -> Backend:
    """Return the module of the backend that a call asks for; see :func:`resolve_backend`."""
    return load(resolve_backend(backend, device, problem))
