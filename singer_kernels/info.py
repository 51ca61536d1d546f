"""``python -m singer_kernels.info``: versions, the compiled extension, devices, backends."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from singer_kernels import __version__, backends, extension


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"


def _extension() -> list[str]:
    reason = extension.load()
    entries: dict[str, str | None] = {**extension.install_record()}
    entries |= {"cpu_capability": extension.cpu_capability()} if reason is None else {}
    entries |= extension.build_report() or {}
    lines = [f"extension       {'loaded' if reason is None else f'off: {reason}'}"]
    return lines + [f"  {name:<18}  {value or '-'}" for name, value in entries.items()]


def _kernels(device: int) -> list[str]:
    usages, reason = extension.cuda_usages(device)
    if not usages:
        return [f"cuda kernels    {len(extension.cuda_kernels()) or 'none'}; {reason}"]
    lines = ["cuda kernels              registers  local bytes  shared bytes  blocks  occupancy"]
    for usage in sorted(usages):
        numbers = f"{usage.registers:>9}  {usage.local:>11}  {usage.shared:>12}  {usage.blocks:>6}"
        lines.append(f"  {usage.kernel:<24}{numbers}  {usage.occupancy:>9.0%}")
    return lines


def report() -> str:
    """Return the report, as lines of text.

    Returns:
        Versions; whether the compiled extension is loaded, or the reason why not, and how it was
        built; the backends that can run on each device, or the reason why not; the resources of the
        extension's CUDA kernels on each GPU (:class:`singer_kernels.extension.KernelUsage`), or the
        reason why they are unknown.
    """
    lines = [
        f"singer_kernels  {__version__}",
        f"python          {platform.python_version()}",
        f"torch           {torch.__version__} (CUDA {torch.version.cuda or 'not built in'})",
        f"triton          {_version('triton')}",
    ]
    forced = os.environ.get(backends.ENVIRONMENT_VARIABLE) or "not set"
    if forced not in (*backends.NAMES, "not set"):
        forced += f": expected one of {', '.join(backends.NAMES)}"
    lines.append(f"{backends.ENVIRONMENT_VARIABLE}  {forced}")
    lines += _extension()
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in (torch.device("cpu"), *gpus):
        lines.append(f"{device}: {_device_name(device)}")
        for name in backends.NAMES:
            reason = backends.unavailable_reason(name, device)
            lines.append(f"  {name:<12}  {'available' if reason is None else f'off: {reason}'}")
        if device.type == "cuda":
            lines += _kernels(device.index)
    if not torch.cuda.is_available():
        lines += _kernels(0)
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
