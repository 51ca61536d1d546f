"""Crops of images, and batches of them from worker processes.

Order and augmentation are functions of the seed, the epoch and the sample alone: they do not
depend on the number of workers or processes, on the model, or on what ran before.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from multiprocessing import active_children, connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert

from singer.config.schema import Config, DataConfig
from singer.data.crops import create_crop
from singer.data.decoding import decoding_errors
from singer.data.sampler import EpochBatchSampler
from singer.data.sources import ImageSource, open_source
from singer.errors import STOP_SIGNALS, SingerError, first_names
from singer.seeding import cpu_seed

_MAX_REPLACEMENTS = 20
"""Replacements drawn for one unreadable image."""

_MAX_IMAGES_TRIED = 1000
"""Images tried before the source is reported as unreadable."""

_KEY = "data.source: "

SHARED_MEMORY = "/dev/shm"
"""Where workers place their batches (Linux)."""

LOADER_TIMEOUT = 600.0
"""Seconds without a batch from any worker after which the loader counts as hung."""

_POLL_SECONDS = 0.5
"""Between two looks at the workers and at stop requests, while a batch is waited for."""

_END_SECONDS = 5.0
"""For a worker whose connection is lost to end."""

_PREFETCH_FACTOR = 2


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
        self.transform = create_crop(data, image_size)

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
                with (
                    decoding_errors(self.source.name(index)),
                    cpu_seed(self.seed * 0x9E3779B1 + key),
                ):
                    return self.transform(image)
            except SingerError as error:
                unreadable.append(self.source.name(index))
                reason = str(error).removeprefix(_KEY)
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


class BatchLoader(DataLoader[Batch]):
    """A loader of :class:`Batch`; an error in a worker reaches the main process in one line.

    Its ``timeout`` is the time between two calls of ``on_wait``; an iteration waits for a batch up
    to :data:`LOADER_TIMEOUT`.

    Attributes:
        on_wait: called with the seconds for which a batch of a worker was waited for; it may raise.

    Raises:
        SingerError: while iterating: neither an image nor one of 20 others can be read, or a worker
            failed, ended or hangs.
    """

    dataset: CropDataset
    batch_sampler: EpochBatchSampler
    on_wait: Callable[[float], None] | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Start at the sampler's position."""
        others = active_children()
        with _unchanged_child_handler():
            batches = super().__iter__()
        workers = [child for child in active_children() if child not in others]
        return self._received(batches, workers)

    def _received(
        self, batches: Iterator[Batch | SingerError], workers: list[BaseProcess]
    ) -> Iterator[Batch]:
        try:
            while (batch := self._next(batches, workers)) is not None:
                if isinstance(batch, SingerError):
                    # A new one: this one, raised, would refer to this frame and the frame to it,
                    # and torch takes 5 s to end the workers of an iterator collected from a cycle.
                    raise SingerError(str(batch))
                yield batch
        except GeneratorExit:  # torch ends its workers
            raise
        except BaseException:
            for worker in workers:  # one that hangs does not end when it is asked to
                worker.kill()
            raise

    def _next(
        self, batches: Iterator[Batch | SingerError], workers: list[BaseProcess]
    ) -> Batch | SingerError | None:
        """Return the next batch, or the error of a worker; None: it was the last."""
        waited = 0.0  # not by the clock: the whole process may have been suspended
        while waited < LOADER_TIMEOUT:
            try:
                return next(batches, None)
            except Exception as error:
                if str(error) != f"DataLoader timed out after {self.timeout} seconds":
                    if not workers:
                        raise
                    raise _worker_error(error, workers) from error
            waited += self.timeout
            if self.on_wait is not None:
                self.on_wait(waited)
        raise SingerError(
            f"data.num_workers: no batch has come for {LOADER_TIMEOUT:.0f} s: the file system of "
            f"data.source hangs, or shared memory ({SHARED_MEMORY}) is full; see to it, or lower "
            f"data.num_workers"
        )


@contextmanager
def _unchanged_child_handler() -> Iterator[None]:
    """Leave the handler of SIGCHLD as it was.

    torch's raises an error at any line of the trainer, in an update of the weights, say. While a
    batch is waited for, torch looks at the workers anyway.
    """
    number = getattr(signal, "SIGCHLD", None)  # Windows has none
    former = None if number is None else signal.getsignal(number)
    yield
    if former is not None and threading.current_thread() is threading.main_thread():
        signal.signal(number, former)


def _worker_error(error: Exception, workers: Sequence[BaseProcess]) -> SingerError:
    """Return the one-line error for an exception of a worker, or for its end."""
    is_raised = str(error).startswith("Caught ")  # then torch's message holds a traceback
    if not is_raised:  # a connection that is lost is noticed before the end of its process
        ended = connection.wait([worker.sentinel for worker in workers], timeout=_END_SECONDS)
        for worker in workers:
            if worker.sentinel in ended:
                worker.join(_END_SECONDS)  # its files are closed a moment before its exit code
    codes = [worker.exitcode for worker in workers if worker.exitcode]
    if is_raised or not codes:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[-1] if lines else type(error).__name__
        return SingerError(f"data: a worker of the loader failed: {reason}")
    name = signal.Signals(-codes[0]).name if codes[0] < 0 else f"exit code {codes[0]}"
    cause = {
        "SIGKILL": ", as the kernel does when memory runs out",
        "SIGBUS": f": shared memory ({SHARED_MEMORY}) is full",
    }.get(name, "")
    return SingerError(
        f"data.num_workers: a worker of the loader was ended by {name}{cause}; lower "
        f"data.num_workers or train.batch_size"
    )


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


def free_shared_memory() -> int | None:
    """Return the free bytes of shared memory; None: unknown."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return None


def check_shared_memory(config: Config, num_processes: int) -> None:
    """Check that the batches of the workers fit into shared memory.

    Each worker prefetches two micro-batches, and one more is in use.

    Raises:
        SingerError: they don't.
    """
    workers, free = config.data.num_workers, free_shared_memory()
    if workers == 0 or free is None:
        return
    announced = os.environ.get("LOCAL_WORLD_SIZE", "")
    local_processes = min(num_processes, int(announced)) if announced.isdecimal() else 1
    images = config.train.batch_size // num_processes // config.train.grad_accum_steps
    batch = images * 3 * config.image_size**2
    needed = local_processes * (workers * _PREFETCH_FACTOR + 1) * batch
    if needed > free:
        raise SingerError(
            f"data.num_workers: {workers} workers keep up to {needed / 2**20:.0f} MiB of images in "
            f"shared memory ({SHARED_MEMORY}), which has {free / 2**20:.0f} MiB free; lower "
            f"data.num_workers or train.batch_size, or enlarge it (docker run --shm-size=...)"
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
            readable image, an epoch has fewer samples than a batch or than there are images, or
            shared memory is too small for the workers.
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
    check_shared_memory(config, num_processes)
    named = config.data.source
    check_readable(source, named if isinstance(named, str) else ", ".join(named))
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
        prefetch_factor=_PREFETCH_FACTOR if workers else None,
        timeout=_POLL_SECONDS if workers else 0,
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
        return SingerError(
            f"data.source: {len(self._names)} of {self.total} images can't be read, and "
            f"data.max_unreadable={self.max_unreadable} allows {self.allowed}: "
            f"{first_names(self.names)}; remove or replace them, or raise data.max_unreadable"
        )
