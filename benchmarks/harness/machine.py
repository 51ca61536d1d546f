"""Description of the machine: processor, versions, cache size, load."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import torch

from singer_kernels import __version__, extension

PACKAGES = ("torch", "triton", "timm", "numpy")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def slug(device: torch.device) -> str:
    """Return the name of a device's results file: lower-case letters, digits and hyphens."""
    name = device_name(device)
    if device.type == "cpu":
        name += f" {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last-level cache; 64 MiB where it can't be read."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()).groups()
        sizes.append(int(number) * 1024 ** " KMG".index(unit or " "))
    return max(sizes, default=64 * 2**20)


def _processor_times() -> tuple[int, int]:
    fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
    numbers = list(map(int, fields[:8]))  # user, nice, system, idle, iowait, irq, softirq, steal
    return sum(numbers), numbers[3] + numbers[4]


def busy_processors(seconds: float = 0.5) -> float | None:
    """Return how many processors other processes keep busy while this thread sleeps; Linux only.

    Args:
        seconds: how long to sleep.

    Returns:
        From 0 to the number of processors; None without ``/proc/stat``.
    """
    try:
        begin = _processor_times()
        time.sleep(seconds)
        total, idle = (b - a for a, b in zip(begin, _processor_times(), strict=True))
    except OSError:
        return None
    return (os.cpu_count() or 1) * (1 - idle / total) if total else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Return date, machine and versions: what the figures depend on.

    Args:
        device: the device to measure.
    """
    setting: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": device_name(device),
        "type": device.type,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "singer_kernels": __version__,
        "threads": torch.get_num_threads(),
        "cache_MiB": cache_bytes(device) / 2**20,
        "busy_processors": busy_processors(),
    }
    if device.type == "cuda":
        setting["cuda"] = torch.version.cuda
        setting["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        setting["tf32"] = torch.backends.cuda.matmul.allow_tf32
    else:
        setting["cpu_capability"] = {
            "torch": torch.backends.cpu.get_cpu_capability(),
            "extension": extension.cpu_capability(),
        }
    return setting
