"""The training loop."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from torch import Tensor

from singer.config.schema import Config, to_yaml
from singer.data.loader import Batch, BatchLoader, UnreadableLimit
from singer.engine.checkpoints import Checkpoint, CheckpointStore
from singer.engine.distributed import (
    PreemptionHandler,
    register_output,
    run_on_all_ranks,
    run_on_main,
)
from singer.engine.progress import Throughput, TrainingProgress
from singer.engine.run_dir import CONFIG, RunDir
from singer.engine.state_dicts import random_state, set_random_state
from singer.engine.student import StudentTrainer
from singer.engine.trackers import Trackers
from singer.errors import SharedError, SingerError, StoppedError
from singer.models.backbones import BlockTokens

_logger = logging.getLogger("singer")

TeacherTokens = Callable[[Tensor, Tensor], BlockTokens]
"""Images ``[b, 3, H, W]`` on the device and their sample IDs ``[b]`` to the teacher's tokens."""


@dataclass(eq=False)
class Trainer:
    """Trains one or several students on one forward pass of the teacher per batch.

    Attributes:
        teacher_tokens: returns the teacher's tokens of a batch.
        loader: this rank's batches of images.
        preemption: tells whether a signal asked the run to stop.
        steps: number of optimiser steps of the whole run.
        identity: saved in checkpoints; must be unchanged when the run is resumed.
        resumed: the checkpoint to resume from; None: start from the beginning.
        reopen: the output directory may exist already.
    """

    config: Config
    accelerator: Accelerator
    students: list[StudentTrainer]
    teacher_tokens: TeacherTokens
    loader: BatchLoader
    store: CheckpointStore
    preemption: PreemptionHandler
    console: Console
    steps: int
    identity: dict[str, Any]
    resumed: InitVar[Checkpoint | None] = None
    reopen: bool = False

    def __post_init__(self, resumed: Checkpoint | None) -> None:
        self.completed_steps = 0
        self.saved_step: int | None = None
        self._is_mid_step = False
        self._created_dir = False
        self._trackers: Trackers | None = None  # of the main rank
        self._throughput = Throughput(self.config.train.batch_size, self.accelerator.device)
        num_images = len(self.loader.dataset.source)
        self.unreadable = UnreadableLimit(num_images, self.config.data.max_unreadable)
        self._new_unreadable: list[str] = []
        if resumed is not None:
            self._resume(resumed)

    @run_on_all_ranks
    def _resume(self, checkpoint: Checkpoint) -> None:
        for student in self.students:
            student.resume(checkpoint.tensors, checkpoint.step)
        self.unreadable.add(checkpoint.state["unreadable"])
        if self.accelerator.scaler is not None and checkpoint.state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
        own = checkpoint.tensors["random"].get(f"rank{self.accelerator.process_index}")
        if own is not None:  # a run that was resumed with more ranks has none for the new ones
            set_random_state(own, self.accelerator.device)
        self.completed_steps = self.saved_step = checkpoint.step

    def run(self) -> float:
        """Train to the end; return the seconds it took.

        Raises:
            SingerError: a loss or a weight is no longer finite, too many images can't be read, or
                something can't be written.
            StoppedError: the run was asked to stop, and is saved.
        """
        self._open()
        before = self.completed_steps
        try:
            started = time.perf_counter()
            self._throughput.start(self.completed_steps)
            self._loop()
            if self.completed_steps == before:  # a kill may have come between checkpoint and export
                self._export()
            seconds = time.perf_counter() - started
        finally:
            self._close()
        self._plot()
        return seconds

    def _close(self) -> None:
        if self._trackers is not None:
            self._trackers.close()

    @run_on_main
    def _open(self) -> None:
        output = Path(self.config.output)
        self._created_dir = not output.exists()
        run_dir = RunDir(output, reopen=self.reopen)
        register_output(self.config.output)
        try:
            run_dir.write_text(CONFIG, to_yaml(self.config))
            values = self.config.model_dump(mode="json")
            names = self.config.train.trackers
            self._trackers = Trackers(names, output, self.completed_steps, values)
            for student in self.students:
                student.open(self.completed_steps, self._trackers)
        except SingerError:
            self._close()
            if self._created_dir:
                shutil.rmtree(output)
            raise

    @run_on_main
    def _plot(self) -> None:
        for student in self.students:
            student.plot()

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        """Yield this rank's micro-batches from the next step on, with their epoch; endless."""
        sampler = self.loader.batch_sampler
        epoch, step = divmod(self.completed_steps, sampler.steps_per_epoch)
        while True:
            sampler.seek(epoch, step)
            for batch in self.loader:
                yield epoch, batch
            epoch, step = epoch + 1, 0

    def _loop(self) -> None:
        train = self.config.train
        console = self.console if self.accelerator.is_main_process else None
        done = self.completed_steps
        with TrainingProgress(console, self.steps, train.batch_size, done) as progress:
            self._stop_if_requested()
            batches = self._batches()
            for step in range(done + 1, self.steps + 1):
                try:
                    self._step(step, batches)
                except (SingerError, KeyboardInterrupt):
                    self._save_completed_steps()
                    raise
                except torch.OutOfMemoryError as error:
                    self._save_completed_steps()
                    raise SingerError(
                        f"train.batch_size: {train.batch_size} images in {train.grad_accum_steps} "
                        f"parts and {self.accelerator.num_processes} processes need more memory "
                        f"than there is; raise train.grad_accum_steps ({error})"
                    ) from error
                progress.step()
                is_epoch_end = step % self.loader.batch_sampler.steps_per_epoch == 0
                is_save = step == self.steps or step % train.save_every == 0 or is_epoch_end
                if is_save or step % train.log_every == 0 or self._must_stop_now():
                    self._log_losses(progress)
                    if self._log_unreadable() and self.unreadable.exceeded:
                        if self.saved_step != self.completed_steps:
                            self._save()
                        raise SharedError(str(self.unreadable.error()))
                    if is_save:
                        self._save()
                    self._stop_if_requested()

    def _step(self, step: int, batches: Iterator[tuple[int, Batch]]) -> None:
        grad_accum_steps = self.config.train.grad_accum_steps
        for micro_batch in range(grad_accum_steps):
            epoch, batch = self._throughput.wait_for(batches)
            self._new_unreadable += batch.unreadable
            if batch.unreadable and self.config.teacher.cache is not None:
                raise SingerError(
                    f"data.source: {batch.unreadable[0]} can't be read any more, but teacher.cache "
                    f"holds its tokens; restore it"
                )
            images = batch.images.to(self.accelerator.device, non_blocking=True)
            with torch.no_grad(), self.accelerator.autocast():
                teacher = self.teacher_tokens(images, batch.sample_ids)
            self._is_mid_step = True
            for student in self.students:
                student.backward(images, teacher, micro_batch)
                if micro_batch == grad_accum_steps - 1:
                    student.step(step, epoch)
        self.completed_steps = step
        self._is_mid_step = False

    def _must_stop_now(self) -> bool:
        """Return whether to stop before the next log; several ranks must stop at the same step."""
        return self.preemption.signal is not None and self.accelerator.num_processes == 1

    def _log_losses(self, progress: TrainingProgress | None = None) -> None:
        for student in self.students:
            newest = student.log()
            if progress is not None and newest and student is self.students[0]:
                progress.losses({name: newest[-1][name] for name in student.loss_names})
        self._write_trackers()

    @run_on_all_ranks
    def _write_trackers(self) -> None:
        if self._trackers is not None:
            self._trackers.add(self.completed_steps, self._throughput.read(self.completed_steps))
            self._trackers.write()

    def _log_unreadable(self) -> bool:
        """Log newly found unreadable images of all ranks; return whether there were any."""
        own, self._new_unreadable = self._new_unreadable, []
        if not self._on_any_rank(bool(own)):
            return False
        for name in self.unreadable.add(gather_object(own)):
            if self.accelerator.is_main_process:
                _logger.warning("%s can't be read; another image takes its place", name)
        return True

    def _on_any_rank(self, flag: bool) -> bool:
        """Return whether a flag is set on any rank."""
        if self.accelerator.num_processes == 1:
            return flag
        count = torch.tensor([int(flag)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(count, reduction="sum").item())

    def _stop_if_requested(self) -> None:
        if not self._on_any_rank(self.preemption.signal is not None):
            return
        if self.completed_steps > 0 and self.saved_step != self.completed_steps:
            self._save()
        names = [name for name in gather_object([self.preemption.signal]) if name is not None]
        raise StoppedError(names[0], f"after step {self.completed_steps} of {self.steps}")

    def _save_completed_steps(self) -> None:
        """After a failed step: save the completed ones; remove the directory if there are none."""
        if self.accelerator.num_processes > 1:
            return  # the others may be at another step
        if self.completed_steps == 0:
            if self._created_dir:
                shutil.rmtree(self.config.output)
            return
        self._log_losses()
        self._log_unreadable()
        # In the middle of a step, weights or random generators may have advanced.
        if self.saved_step != self.completed_steps and not self._is_mid_step:
            self._save()

    def _save(self) -> None:
        """Write a checkpoint and the weights; every rank calls it after the same step."""
        for student in self.students:
            student.check_finite(self.completed_steps)
        device = self.accelerator.device
        states = self.accelerator.gather(random_state(device).to(device)[None])  # [ranks, bytes]
        self._write_checkpoint({f"rank{rank}": own for rank, own in enumerate(states.cpu())})
        self._export()
        for student in self.students:
            student.saved_step = self.completed_steps
        self.saved_step = self.completed_steps

    @run_on_main
    def _write_checkpoint(self, random_states: dict[str, Tensor]) -> None:
        tensors = {"random": random_states}
        for student in self.students:
            student.sync()
            tensors.update(student.checkpoint())
        scaler = self.accelerator.scaler
        state = {
            **self.identity,
            "unreadable": self.unreadable.names,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        self.store.save(Checkpoint(self.completed_steps, tensors, state))

    @run_on_main
    def _export(self) -> None:
        for student in self.students:
            student.export(self.completed_steps)
