"""Local seeding that leaves the global random generators unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def cpu_seed(seed: int) -> Iterator[None]:
    """Seed the CPU generator inside the block, and restore its state afterwards.

    Not ``torch.manual_seed``: that would reseed every GPU too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield
