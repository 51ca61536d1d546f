"""Crops of images, their order, and batches of them.

Order and augmentation are functions of the seed, the epoch and the sample alone: they do not
depend on the number of workers or processes, on the model, or on what ran before.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_convert
from torchvision.transforms import v2 as transforms

from singer.config.schema import Config, DataConfig
from singer.data.sources import ImageSource, open_source
from singer.errors import STOP_SIGNALS, SingerError
from singer.seeding import cpu_seed

_MAX_REPLACEMENTS = 20
"""Replacements drawn for one unreadable image."""

_MAX_IMAGES_TRIED = 1000
"""Images tried before the source is reported as unreadable."""

_MAX_NAMES_SHOWN = 5

_KEY = "data.source: "


class Batch(NamedTuple):
    """One process's micro-batch.

    Attributes:
        images: ``[b, 3, H, W]``, uint8.
        sample_ids: identifiers of the crops, ``[b]``, int64; see :class:`CropDataset`.
        unreadable: names of images that could not be read and were replaced.
    """

    images: Tensor
    sample_ids: Tensor
    unreadable: list[str]


class CropDataset(Dataset[Tensor]):
    """Square crops of images.

    Sample id ``t`` is the crop of epoch ``t // epoch_size``, sample ``t % epoch_size`` of it, from
    image ``sample % len(source)``. A random crop is a function of the seed and the id alone. A
    centre crop (the shorter side scaled to ``image_size``, bicubic with antialiasing, then cut) is
    the same in every epoch. An image that can't be read is replaced by another one, drawn from the
    seed and the sample id or, for centre crops, from the seed and the sample.

    Args:
        source: the images.
        image_size: pixels of a crop's side.
        data: kind of crop, crop scale, flips and the size of an epoch.
        seed: of the crops.
    """

    def __init__(self, source: ImageSource, image_size: int, data: DataConfig, seed: int) -> None:
        self.source = source
        self.image_size = image_size
        self.epoch_size = data.epoch_size or len(source)
        self.seed = seed
        self._is_fixed = data.crops == "center"
        bicubic = transforms.InterpolationMode.BICUBIC
        if self._is_fixed:
            crop = [
                transforms.Resize(image_size, interpolation=bicubic, antialias=True),
                transforms.CenterCrop(image_size),
            ]
        else:
            crop = [
                transforms.RandomResizedCrop(
                    image_size, scale=data.crop_scale, interpolation=bicubic, antialias=True
                ),
                transforms.RandomHorizontalFlip(data.hflip),
            ]
        self.transform = transforms.Compose([*crop, transforms.PILToTensor()])

    def __len__(self) -> int:
        """Return the number of samples per epoch."""
        return self.epoch_size

    def source_index(self, sample_id: int) -> int:
        """Return the index of a sample's image in the source."""
        return sample_id % self.epoch_size % len(self.source)

    def __getitem__(self, sample_id: int) -> Tensor:
        """Return one crop, ``[3, image_size, image_size]``, uint8.

        Raises:
            SingerError: neither its image nor one of 20 others can be read.
        """
        return self._crop(sample_id, [])

    def batch(self, sample_ids: Iterable[int]) -> Batch:
        """Return the batch of the given sample ids.

        Raises:
            SingerError: neither an image nor one of 20 others can be read.
        """
        numbers = torch.tensor(list(sample_ids), dtype=torch.int64)
        images = torch.empty(len(numbers), 3, self.image_size, self.image_size, dtype=torch.uint8)
        unreadable: list[str] = []
        for image, sample_id in zip(images, numbers.tolist(), strict=True):
            image.copy_(self._crop(sample_id, unreadable))
        return Batch(images, numbers, list(dict.fromkeys(unreadable)))

    def __getitems__(self, sample_ids: list[int]) -> Batch | SingerError:
        """Return a batch to the loader, or the error for :class:`BatchLoader` to raise.

        One raised in a worker would reach the main process inside the text of its traceback.
        """
        try:
            return self.batch(sample_ids)
        except SingerError as error:
            return error

    def _crop(self, sample_id: int, unreadable: list[str]) -> Tensor:
        """Return a crop, and add the names of the images that could not be read on the way."""
        key = sample_id % self.epoch_size if self._is_fixed else sample_id
        for index in self._candidates(sample_id, key):
            try:
                image = self.source.read(index)
            except SingerError as error:
                unreadable.append(self.source.name(index))
                reason = str(error).removeprefix(_KEY)
                continue
            with cpu_seed(self.seed * 0x9E3779B1 + key):
                return self.transform(image)
        raise SingerError(
            f"data.source: no readable image among {len(set(unreadable))} that were drawn; the "
            f"last: {reason}"
        )

    def _candidates(self, sample_id: int, key: int) -> Iterator[int]:
        yield self.source_index(sample_id)
        draws = np.random.default_rng([self.seed, key]).integers(
            len(self.source), size=_MAX_REPLACEMENTS
        )
        yield from draws.tolist()


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
        self.epoch = 0
        self.step = 0

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps per epoch: whole ones."""
        return self.epoch_size // self.batch_size

    def order(self, epoch: int) -> Tensor:
        """Return all sample ids of an epoch, ``[epoch_size]``, int64, in their order."""
        generator = torch.Generator().manual_seed(self.seed * 0x9E3779B1 + epoch)
        return torch.randperm(self.epoch_size, generator=generator) + epoch * self.epoch_size

    def seek(self, epoch: int, step: int = 0) -> None:
        """Set where the next iteration starts; iterating does not move it. Takes no time.

        Args:
            epoch: from 0.
            step: optimiser steps of the epoch to leave out.

        Raises:
            ValueError: the epoch is negative, or has no such step.
        """
        if epoch < 0 or not 0 <= step <= self.steps_per_epoch:
            raise ValueError(
                f"epoch, step: got {epoch}, {step}, expected an epoch from 0 and a step from 0 to "
                f"{self.steps_per_epoch}"
            )
        self.epoch = epoch
        self.step = step

    def __len__(self) -> int:
        """Return the number of micro-batches from the current step to the end of the epoch."""
        return (self.steps_per_epoch - self.step) * self.grad_accum_steps

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the sample ids of each micro-batch."""
        # A generator function would read epoch and step at the first batch only.
        return self._draw(self.epoch, self.step)

    def _draw(self, epoch: int, step: int) -> Iterator[list[int]]:
        order = self.order(epoch)
        for later in range(step, self.steps_per_epoch):
            first = later * self.batch_size + self.process_index * self.local_batch_size
            local_batch = order[first : first + self.local_batch_size]
            for micro_batch in local_batch.chunk(self.grad_accum_steps):
                yield micro_batch.tolist()


class BatchLoader(DataLoader[Batch]):
    """A loader of :class:`Batch`; an error in a worker reaches the main process as it was raised.

    Raises:
        SingerError: while iterating: neither an image nor one of 20 others can be read.
    """

    dataset: CropDataset
    batch_sampler: EpochBatchSampler

    def __iter__(self) -> Iterator[Batch]:
        """Start at the sampler's position."""
        return self._raise_errors(super().__iter__())

    @staticmethod
    def _raise_errors(batches: Iterator[Batch | SingerError]) -> Iterator[Batch]:
        for batch in batches:
            if isinstance(batch, SingerError):
                # A new one: this one, raised, would refer to this frame and the frame to it, and
                # torch takes 5 s to end the workers of an iterator that is collected from a cycle.
                raise SingerError(str(batch))
            yield batch


def _ignore_signals(worker: int) -> None:
    """Ignore the signals that ask a run to stop (``worker_init_fn``).

    They reach the whole process group. The trainer must be able to finish its step and save; it
    then ends its workers by SIGTERM, which from it is obeyed. Workers whose trainer has gone end by
    themselves.
    """
    for name in STOP_SIGNALS:
        if name != "SIGTERM" and hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_of_parent, daemon=True).start()


def _exit_on_sigterm_of_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def check_batch(config: Config, num_processes: int) -> None:
    """Check that the processes can share the batch.

    Raises:
        SingerError: ``train.batch_size`` is no multiple of the number of processes times
            ``train.grad_accum_steps``.
    """
    batch_size, grad_accum_steps = config.train.batch_size, config.train.grad_accum_steps
    divisor = num_processes * grad_accum_steps
    if batch_size % divisor:
        below = batch_size // divisor * divisor
        nearest = f"{below} or {below + divisor}" if below else f"{divisor}"
        processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
        raise SingerError(
            f"train.batch_size: got {batch_size}, which {processes} with train.grad_accum_steps="
            f"{grad_accum_steps} can't share evenly; expected a multiple of {divisor}, such as "
            f"{nearest}"
        )


def check_readable(source: ImageSource, title: str) -> None:
    """Check that an image can be read: one at least of all, or of the first 1000.

    Args:
        source: the images.
        title: what to call the source.

    Raises:
        SingerError: none can.
    """
    tried = min(len(source), _MAX_IMAGES_TRIED)
    first = ""
    for index in range(tried):
        try:
            source.read(index)
        except SingerError as error:
            first = first or str(error).removeprefix(_KEY)
        else:
            return
    raise SingerError(
        f"data.source: {title} holds no readable image ({tried} of {len(source)} tried; first: "
        f"{first})"
    )


def create_loader(config: Config, process_index: int = 0, num_processes: int = 1) -> BatchLoader:
    """Build one process's loader of a run.

    Its batches are ``[train.batch_size / num_processes / train.grad_accum_steps, 3, H, W]``, uint8:
    they are normalised on the device. The global random generators are left alone.

    Args:
        config: the run's configuration.
        process_index: this process, from 0.
        num_processes: how many take part.

    Raises:
        SingerError: the batch can't be shared evenly, the source can't be opened or holds no
            readable image, or an epoch has fewer samples than a batch or than there are images.
    """
    check_batch(config, num_processes)
    train, workers = config.train, config.data.num_workers
    source = open_source(config.data)
    crops = CropDataset(source, config.image_size, config.data, train.seed)
    if len(crops) < len(source):  # the images beyond would never be seen
        raise SingerError(
            f"data.epoch_size: got {len(crops)}, expected at least {len(source)}, the number of "
            f"images; train.steps and train.save_every may be smaller than an epoch"
        )
    if len(crops) < train.batch_size:
        raise SingerError(
            f"train.batch_size: got {train.batch_size}, expected at most {len(crops)}, the samples "
            f"of an epoch; lower it or raise data.epoch_size"
        )
    check_readable(source, config.data.source)
    return BatchLoader(
        crops,
        batch_sampler=EpochBatchSampler(
            len(crops),
            train.seed,
            train.batch_size,
            train.grad_accum_steps,
            process_index,
            num_processes,
        ),
        collate_fn=default_convert,  # the dataset collates
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=_ignore_signals,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or every epoch would draw from the global one
    )


class UnreadableLimit:
    """Counts the images of a source that can't be read, each once.

    Args:
        total: images in the source.
        max_unreadable: fraction of them that may be unreadable.

    Attributes:
        allowed: how many may be: the fraction as it is written in decimals, rounded down.
    """

    def __init__(self, total: int, max_unreadable: float) -> None:
        self.total = total
        self.max_unreadable = max_unreadable
        self.allowed = math.floor(Fraction(repr(max_unreadable)) * total)
        self._names: set[str] = set()

    @property
    def names(self) -> list[str]:
        """The unreadable images, sorted: what a checkpoint keeps."""
        return sorted(self._names)

    @property
    def exceeded(self) -> bool:
        """Whether more are unreadable than may be."""
        return len(self._names) > self.allowed

    def add(self, names: Sequence[str]) -> list[str]:
        """Count some images, and return those that are new, in the order given."""
        new = [name for name in dict.fromkeys(names) if name not in self._names]
        self._names.update(new)
        return new

    def error(self) -> SingerError:
        """Return the error that stops a run whose limit is exceeded."""
        shown = ", ".join(self.names[:_MAX_NAMES_SHOWN])
        more = ", …" if len(self._names) > _MAX_NAMES_SHOWN else ""
        return SingerError(
            f"data.source: {len(self._names)} of {self.total} images can't be read, and "
            f"data.max_unreadable={self.max_unreadable} allows {self.allowed}: {shown}{more}; "
            f"remove or replace them, or raise data.max_unreadable"
        )
