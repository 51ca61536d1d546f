"""The order of samples: batches of sample ids, across epochs and processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler


class EpochBatchSampler(Sampler[list[int]]):
    """Sample ids of each micro-batch of one process, reshuffled every epoch.

    The order of an epoch is a function of the seed and the epoch alone. Optimiser step ``i`` of it
    takes the sample ids ``i * batch_size`` to ``(i + 1) * batch_size`` of that order, however many
    processes there are: each takes an equal, contiguous slice, in ``grad_accum_steps`` equal parts,
    one after the other. The rest of the order, too short for a step, is not used.

    Args:
        epoch_size: samples per epoch.
        seed: of the order.
        batch_size: samples per optimiser step, over all processes.
        grad_accum_steps: micro-batches in which a process takes its local batch.
        process_index: this process, from 0.
        num_processes: how many there are.

    Raises:
        ValueError: the batch can't be shared evenly, or there is no such process.
    """

    def __init__(
        self,
        epoch_size: int,
        seed: int,
        batch_size: int,
        grad_accum_steps: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        if batch_size % (num_processes * grad_accum_steps):
            raise ValueError(
                f"batch_size: got {batch_size}, expected a multiple of "
                f"num_processes * grad_accum_steps = {num_processes * grad_accum_steps}"
            )
        if not 0 <= process_index < num_processes:
            raise ValueError(
                f"process_index: got {process_index}, expected 0 to {num_processes - 1}"
            )
        self.epoch_size = epoch_size
        self.seed = seed
        self.batch_size = batch_size
        self.grad_accum_steps = grad_accum_steps
        self.process_index = process_index
        self.local_batch_size = batch_size // num_processes
        self.seek(0)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch: whole ones."""
        return self.epoch_size // self.batch_size

    def order(self, epoch: int) -> Tensor:
        """Return all sample ids of an epoch, ``[epoch_size]``, int64, in their order."""
        generator = torch.Generator().manual_seed(self.seed * 0x9E3779B1 + epoch)
        return torch.randperm(self.epoch_size, generator=generator) + epoch * self.epoch_size

    def seek(
        self, epoch: int, step: int = 0, *, offset: int = 0, num_steps: int | None = None
    ) -> None:
        """Set where the next iteration starts; iterating does not move it. Takes no time.

        Args:
            epoch: from 0.
            step: optimiser steps of the epoch to leave out.
            offset: samples of the epoch to leave out before these steps.
            num_steps: length of the iteration, which goes on in the next epochs; None: to the end
                of the epoch.

        Raises:
            ValueError: the epoch is negative, or has no such step or sample.
        """
        if epoch < 0 or not 0 <= step <= self.steps_per_epoch:
            raise ValueError(
                f"epoch, step: got {epoch}, {step}, expected an epoch from 0 and a step from 0 to "
                f"{self.steps_per_epoch}"
            )
        if not 0 <= offset <= self.epoch_size - step * self.batch_size:
            raise ValueError(
                f"offset: got {offset}, expected 0 to {self.epoch_size - step * self.batch_size}"
            )
        self.epoch = epoch
        self.start = offset + step * self.batch_size
        self.num_steps = self._steps_left if num_steps is None else num_steps

    @property
    def _steps_left(self) -> int:
        return (self.epoch_size - self.start) // self.batch_size

    def steps_until(self, epoch: int) -> int:
        """Return the steps from the current position to the start of an epoch; may be negative."""
        return self._steps_left + (epoch - self.epoch - 1) * self.steps_per_epoch

    def position_after(self, steps: int) -> tuple[int, int]:
        """Return the position a number of steps after the current one: epoch, sample of it."""
        if steps < self._steps_left:
            return self.epoch, self.start + steps * self.batch_size
        epochs, step = divmod(steps - self._steps_left, self.steps_per_epoch)
        return self.epoch + 1 + epochs, step * self.batch_size

    def __len__(self) -> int:
        """Return the number of micro-batches of the next iteration."""
        return self.num_steps * self.grad_accum_steps

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the sample ids of each micro-batch."""
        # A generator function would read the position at the first batch only.
        return self._draw(self.epoch, self.start, self.num_steps)

    def _draw(self, epoch: int, start: int, num_steps: int) -> Iterator[list[int]]:
        order = self.order(epoch)
        for _ in range(num_steps):
            if start + self.batch_size > self.epoch_size:
                epoch, start = epoch + 1, 0
                order = self.order(epoch)
            first = start + self.process_index * self.local_batch_size
            local_batch = order[first : first + self.local_batch_size]
            for micro_batch in local_batch.chunk(self.grad_accum_steps):
                yield micro_batch.tolist()
            start += self.batch_size
