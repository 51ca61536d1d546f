"""The backends: their base class, and the choice among them.

A backend is a module of this package whose ``backend`` is an instance of a :class:`Backend`. To
add one, write the module and name it in :data:`singer_kernels.types.BackendName`.
"""

from __future__ import annotations

import importlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeVar, cast, get_args

# Not "import torch": importing the backend of that name would replace PyTorch in this namespace,
# and likewise for "reference".
from torch import Tensor
from torch import device as Device
from torch._C import _are_functorch_transforms_active  # torch.autograd.Function asks it too
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from singer_kernels import reference as specification
from singer_kernels.backends.gradients import once_differentiable
from singer_kernels.backends.precision import MatmulPrecision
from singer_kernels.types import BackendName, FusedLossesInputs, FusedLossesOutput

_logger = logging.getLogger("singer_kernels")

NAMES: tuple[str, ...] = get_args(BackendName)
"""The backends, the preferred one first."""

ENVIRONMENT_VARIABLE = "SINGER_BACKEND"

# Dictionaries, not functools.cache: torch.compile traces a dictionary, but no import and no cache.
_loaded: dict[str, Backend] = {}
_chosen: dict[Device, str] = {}  # device to the backend chosen automatically
_logged_fallbacks: set[str] = set()  # messages, each logged once


class CallSpec(NamedTuple):
    """Sizes and dtypes of one call, by which a backend decides whether it supports it."""

    images: int  # B
    patches: int  # P
    rank: int  # r; 0 without an adapter
    precision: MatmulPrecision


class Backend(ABC):
    """A backend of the losses of :mod:`singer_kernels.reference`.

    Its methods get checked arguments and give gradients that can't be differentiated again. The
    pieces default to the reference: one or two ATen calls each, bound by memory.
    """

    def unavailable_reason(self, device: Device, explicit: bool) -> str | None:
        """Return None if the backend can run on the device, else the reason in one line.

        ``explicit``: the user named it. A backend that can run, but should not be the automatic
        choice, gives its reason only if ``explicit`` is False.
        """
        return None

    def unsupported_reason(self, spec: CallSpec) -> str | None:
        """Return None if the backend supports the call, else the reason in one line."""
        return None

    @abstractmethod
    def fused_losses(self, inputs: FusedLossesInputs) -> FusedLossesOutput:
        """See :func:`singer_kernels.reference.fused_losses`."""

    def refine(self, teacher: Tensor, down: Tensor, up: Tensor, num_prefix_tokens: int) -> Tensor:
        """See :func:`singer_kernels.reference.refine`."""
        down, up = once_differentiable(down), once_differentiable(up)
        return specification.refine(teacher, down, up, num_prefix_tokens)

    def token_norms(self, tokens: Tensor, num_prefix_tokens: int) -> Tensor:
        """See :func:`singer_kernels.reference.token_norms`."""
        return specification.token_norms(once_differentiable(tokens), num_prefix_tokens)

    def outlier_loss(self, norms: Tensor, quantile: float) -> Tensor:
        """See :func:`singer_kernels.reference.outlier_loss`."""
        return specification.outlier_loss(once_differentiable(norms), quantile)

    def gram_loss(self, tokens: Tensor, target: Tensor, num_prefix_tokens: int) -> Tensor:
        """See :func:`singer_kernels.reference.gram_loss`."""
        tokens, target = once_differentiable(tokens), once_differentiable(target)
        return specification.gram_loss(tokens, target, num_prefix_tokens)

    def kd_loss(self, student: Tensor, tokens: Tensor) -> Tensor:
        """See :func:`singer_kernels.reference.kd_loss`."""
        return specification.kd_loss(once_differentiable(student), once_differentiable(tokens))


Function = TypeVar("Function", bound=Callable[..., object])


def constant_while_tracing(function: Function) -> Function:
    """Mark a function that torch.compile calls once at trace time; its result is a constant.

    ``torch.compiler.assume_constant_result`` sets the same mark, but would import the compiler now.
    """
    # mypy knows of no such attribute of a function.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def load(name: str) -> Backend:
    """Import a backend's module and return the backend.

    Raises:
        ImportError: something that the backend needs is missing.
    """
    if name not in _loaded:
        module = importlib.import_module(f"singer_kernels.backends.{name}")
        _loaded[name] = cast("Backend", module.backend)
    return _loaded[name]


def unavailable_reason(name: str, device: Device, explicit: bool = True) -> str | None:
    """Say why a backend can't run on a device.

    Args:
        name: the backend's name.
        device: where it would run.
        explicit: whether the user named it; False: the automatic choice.

    Returns:
        The reason in one line, or None if it can run.
    """
    try:
        return load(name).unavailable_reason(device, explicit)
    except ImportError as error:
        return f"it can't be imported: {error}"


def _unsupported_reason(name: str, spec: CallSpec) -> str | None:
    if not is_compiling() and name != "reference":
        if _are_functorch_transforms_active():
            return "under the transforms of torch.func there is 'reference' alone"
        if forward_ad._current_level >= 0:
            return "for forward-mode differentiation there is 'reference' alone"
    return load(name).unsupported_reason(spec)


def _select_for_device(device: Device) -> str:
    if device in _chosen:
        return _chosen[device]
    skipped: list[str] = []
    for name in NAMES:
        reason = unavailable_reason(name, device, explicit=False)
        if reason is None:
            note = f" ({'; '.join(skipped)})" if skipped else ""
            if not is_compiling():  # a call under torch.compile can't be logged
                _logger.info("backend %r chosen for %s%s", name, device, note)
            _chosen[device] = name
            return name
        skipped.append(f"{name}: {reason}")
    raise RuntimeError(f"no backend can run on {device}: {'; '.join(skipped)}")


def _select_for_call(first: str, device: Device, spec: CallSpec) -> str:
    """Return the first backend, from the one chosen for the device on, that supports a call."""
    skipped: list[str] = []
    for name in NAMES[NAMES.index(first) :]:
        if name != first and unavailable_reason(name, device, explicit=False) is not None:
            continue
        reason = _unsupported_reason(name, spec)
        if reason is None:
            note = f"backend {name!r} takes calls on {device} ({'; '.join(skipped)})"
            if skipped and not is_compiling() and note not in _logged_fallbacks:
                _logged_fallbacks.add(note)
                _logger.info(note)
            return name
        skipped.append(f"{name}: {reason}")
    raise RuntimeError(f"no backend serves this call on {device}: {'; '.join(skipped)}")


def check_name(backend: str | None, source: str = "backend") -> BackendName | None:
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
    if backend is not None and backend not in NAMES:
        raise ValueError(f"{source}: got {backend!r}, expected one of {', '.join(NAMES)}")
    return cast("BackendName | None", backend)


def resolve_backend(backend: str | None, device: Device, spec: CallSpec | None = None) -> str:
    """Return the name of the backend that a call would use.

    Args:
        backend: a backend's name, or None for the one named by the environment variable
            ``SINGER_BACKEND`` or, if that is unset or empty, the best that can run on the device.
            The automatic choice is logged once per device at INFO.
        device: where the tensors are.
        spec: the call's sizes and dtypes; None: any. The automatic choice skips a backend that does
            not support them, and logs that once per reason at INFO.

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
        chosen = _select_for_device(
            Device("cpu") if device.type == "cpu" else Device(device.type, device.index or 0)
        )
        return chosen if spec is None else _select_for_call(chosen, device, spec)
    reason = unavailable_reason(backend, device)
    if reason is not None:
        raise RuntimeError(f"{source}: {backend!r} can't run on {device}: {reason}")
    if spec is not None:
        reason = _unsupported_reason(backend, spec)
        if reason is not None:
            raise RuntimeError(f"{source}: {backend!r} can't run this call: {reason}")
    return backend


def resolve(backend: str | None, device: Device, spec: CallSpec | None = None) -> Backend:
    """Return the backend of a call; see :func:`resolve_backend`."""
    return load(resolve_backend(backend, device, spec))
