"""State of optimisers and random generators as tensors, for checkpoints."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from singer.errors import SingerError, one_line


def _positions(optimizer: Optimizer, model: nn.Module) -> dict[str, int]:
    """Return the index of each parameter in the optimiser's state dict, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {names[id(parameter)]: index for index, parameter in enumerate(held)}


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return an optimiser's state as tensors named ``parameter/quantity``.

    Its options (learning rate, decay, ...) are left out: they come from the configuration.

    Args:
        optimizer: over parameters of ``model`` only.
        model: gives the names.
    """
    state = optimizer.state_dict()["state"]
    tensors = {}
    for name, index in _positions(optimizer, model).items():
        for key, value in state.get(index, {}).items():
            tensors[f"{name}/{key}"] = torch.as_tensor(value)
    return tensors


def load_optimizer(optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load the tensors of :func:`optimizer_tensors` into an optimiser.

    Raises:
        SingerError: the tensors are of another model.
    """
    positions = _positions(optimizer, model)
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("/")
        if name not in positions:
            raise SingerError(f"checkpoint: it holds {full_name}, a parameter that is not trained")
        expected = parameters[name].shape
        if value.ndim > 0 and value.shape != expected:
            raise SingerError(
                f"checkpoint: {full_name} has the shape {tuple(value.shape)}, "
                f"expected {tuple(expected)}"
            )
        state.setdefault(positions[name], {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def load_module(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load a module's state dict.

    Args:
        module: the module.
        tensors: named tensors.
        what: its name in messages.

    Raises:
        SingerError: names or shapes differ: the checkpoint is of another model.
    """
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        reason = one_line(error)[:300]
        raise SingerError(f"checkpoint: {what} is of another model: {reason}") from error


def _device_generators(device: torch.device) -> Any:
    return None if device.type == "cpu" else getattr(torch, device.type)


def _bits(value: float | None) -> int:
    return int(np.float64(value or 0.0).view(np.int64))


def _float(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))


def random_state(device: torch.device) -> Tensor:
    """Return the state of this process's random generators: Python's, NumPy's and torch's.

    Args:
        device: its generator is included beside the CPU's.

    Returns:
        1-D, uint8; the length is the same on all ranks with the same kind of device.
    """
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    parts = [
        # Through NumPy: torch.tensor takes ten times as long, and each step calls this.
        torch.from_numpy(np.array([version, *words, gauss is not None, _bits(gauss)], np.int64)),
        torch.from_numpy(np.append(keys.astype(np.int64), [position, has_gauss, _bits(cached)])),
        torch.get_rng_state(),
    ]
    generators = _device_generators(device)
    if generators is not None:
        parts.append(generators.get_rng_state())
    return torch.cat([part.cpu().contiguous().view(torch.uint8) for part in parts])


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Restore the state that :func:`random_state` returned.

    Raises:
        SingerError: the state was saved with another kind of device.
    """
    expected = random_state(device)
    if state.shape != expected.shape:
        raise SingerError(
            f"checkpoint: the random generators' state has {state.numel()} bytes, expected "
            f"{expected.numel()} with the device {device.type}"
        )
    _, words, _ = random.getstate()
    _, keys, *_ = np.random.get_state()
    lengths = [8 * (len(words) + 3), 8 * (len(keys) + 3), torch.get_rng_state().numel()]
    python, numpy, cpu, own = state.split([*lengths, state.numel() - sum(lengths)])
    # A view as int64 needs an offset that is a multiple of 8: copy the slices.
    version, *inner, present, bits = python.clone().view(torch.int64).tolist()
    random.setstate((version, tuple(inner), _float(bits) if present else None))
    *inner, position, present, bits = numpy.clone().view(torch.int64).tolist()
    keys = np.array(inner, dtype=np.uint32)
    np.random.set_state(("MT19937", keys, position, present, _float(bits)))
    torch.set_rng_state(cpu.clone())
    generators = _device_generators(device)
    if generators is not None:
        generators.set_rng_state(own.clone())
