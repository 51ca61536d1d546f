"""The training loop."""

from __future__ import annotations

import logging
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from torch import Tensor

from singer.config.loading import to_yaml
from singer.config.schema import Config
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
from singer.errors import (
    DEBUG_HINT,
    NonFiniteError,
    SharedError,
    SingerError,
    StoppedError,
    one_line,
    typed_line,
)
from singer.models.backbones import BlockTokens

_logger = logging.getLogger("singer")

STUCK_LOADER_SECONDS = 15.0
"""Wait of one of several ranks for a batch after a request to stop: launchers kill after 30 s."""

TeacherTokens = Callable[[Tensor, Tensor], BlockTokens]
"""Images ``[b, 3, H, W]`` on the device and their sample IDs ``[b]`` to the teacher's tokens."""


@dataclass(eq=False)
class Trainer:
    """Trains one or several students on one forward pass of the teacher per batch.

    Attributes:
        teacher_tokens: returns the teacher's tokens of a batch.
        loader: this rank's batches of images, at the position of the next step.
        preemption: tells whether a signal asked the run to stop.
        steps: number of optimiser steps of the whole run.
        fingerprint: number of processes and digest of the image names; saved in checkpoints;
            must be unchanged when the run is resumed.
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
    fingerprint: dict[str, Any]
    resumed: InitVar[Checkpoint | None] = None
    reopen: bool = False

    def __post_init__(self, resumed: Checkpoint | None) -> None:
        self.completed_steps = 0
        self.saved_step: int | None = None
        self._is_updating = False
        self._waited_before_signal = 0.0
        self._buffers = [buffer for student in self.students for buffer in student.method.buffers()]
        self._created_dir = False
        self._trackers: Trackers | None = None  # of the main rank
        self._throughput = Throughput(self.config.train.batch_size, self.accelerator.device)
        num_images = len(self.loader.dataset.source)
        self.unreadable = UnreadableLimit(num_images, self.config.data.max_unreadable)
        self._new_unreadable: list[str] = []
        if resumed is not None:
            self._resume(resumed)
        self._first_step = self.completed_steps

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

    def _step_completed(self, step: int) -> None:
        """Keep what a failed next step would change: random generators, versions of buffers."""
        self.completed_steps = step
        self._random_state = random_state(self.accelerator.device)
        self._buffer_versions = [buffer._version for buffer in self._buffers]
        self._is_updating = False

    def _is_mid_update(self) -> bool:
        """Return whether weights, optimisers or buffers are no longer those of a whole step."""
        versions = [buffer._version for buffer in self._buffers]
        return self._is_updating or versions != self._buffer_versions

    def run(self) -> float:
        """Train to the end; return the seconds it took.

        Raises:
            SingerError: a loss or a weight is no longer finite, too many images can't be read,
                something can't be written, or any other exception (its cause) ended a step.
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
        except BaseException:
            self._close()
            if self._created_dir:
                shutil.rmtree(output, ignore_errors=True)
            raise

    @run_on_main
    def _plot(self) -> None:
        for student in self.students:
            student.plot()

    def _batches(self) -> Iterator[Batch]:
        """Yield this rank's micro-batches of the steps that are left."""
        # One iteration for all epochs: the workers don't pause between two.
        self.loader.batch_sampler.num_steps = self.steps - self.completed_steps
        self.loader.on_wait = self._stop_while_waiting
        yield from self.loader

    def _stop_while_waiting(self, waited: float) -> None:
        """Answer a request to stop that came while a batch was waited for."""
        if self._must_stop_now():
            if self.completed_steps > 0:
                self._save_completed_steps()
            raise self._stopped()
        if self.preemption.signal is None or waited < self._waited_before_signal:
            self._waited_before_signal = waited
        elif waited - self._waited_before_signal > STUCK_LOADER_SECONDS:
            # With several ranks a step is left together, which takes a batch on each.
            step = f"in step {self.completed_steps + 1} of {self.steps}, for which no batch came"
            raise StoppedError(self.preemption.signal, f"{step}; {self._saved()}", is_shared=False)

    def _saved(self) -> str:
        if self.saved_step is None:
            return "nothing was saved"
        return f"the run is saved after step {self.saved_step}"

    def _stopped(self) -> StoppedError:
        names = [name for name in gather_object([self.preemption.signal]) if name is not None]
        return StoppedError(names[0], f"after step {self.completed_steps} of {self.steps}")

    def _loop(self) -> None:
        train = self.config.train
        console = self.console if self.accelerator.is_main_process else None
        done = self.completed_steps
        with TrainingProgress(console, self.steps, train.batch_size, done) as progress:
            self._step_completed(done)
            self._stop_if_requested()
            batches = self._batches()
            for step in range(done + 1, self.steps + 1):
                try:
                    self._step(step, batches)
                    progress.step()
                    self._log_and_save(step, progress)
                except (NonFiniteError, StoppedError):
                    raise
                except (Exception, KeyboardInterrupt) as error:
                    self._save_after_error(error)
                    if isinstance(error, (SingerError, KeyboardInterrupt)):
                        raise
                    raise self._explain(error, step) from error

    def _log_and_save(self, step: int, progress: TrainingProgress) -> None:
        train = self.config.train
        is_save = step == self.steps or step % train.save_every == 0
        if is_save or step % train.log_every == 0 or self._must_stop_now():
            self._log_losses(progress)
            if self._log_unreadable() and self.unreadable.exceeded:
                if self.saved_step != self.completed_steps:
                    self._save()
                raise SharedError(str(self.unreadable.error()))
            if is_save:
                self._save()
            self._stop_if_requested()

    def _explain(self, error: Exception, step: int) -> SingerError:
        """Return the one-line error that replaces any other exception of a step."""
        train = self.config.train
        if isinstance(error, torch.OutOfMemoryError):
            return SingerError(
                f"train.batch_size: {train.batch_size} images in {train.grad_accum_steps} "
                f"parts and {self.accelerator.num_processes} processes need more memory "
                f"than there is; raise train.grad_accum_steps ({one_line(error)})"
            )
        return SingerError(
            f"step {step}: {typed_line(error)}; {self._saved()} ({self._keep_traceback()})"
        )

    def _keep_traceback(self) -> str:
        """Write the traceback of the current exception to a file; return where it is."""
        path = Path(self.config.output, f"traceback-{self.accelerator.process_index}.txt")
        try:
            path.write_text(traceback.format_exc())
        except OSError:  # a full disk, or the directory was removed
            return DEBUG_HINT
        return f"traceback: {path}"

    def _step(self, step: int, batches: Iterator[Batch]) -> None:
        grad_accum_steps = self.config.train.grad_accum_steps
        for micro_batch in range(grad_accum_steps):
            batch = self._throughput.wait_for(batches)
            self._new_unreadable += batch.unreadable
            if batch.unreadable and self.config.teacher.cache is not None:
                raise SingerError(
                    f"data.source: {batch.unreadable[0]} can't be read any more, but teacher.cache "
                    f"holds its tokens; restore it"
                )
            images = batch.images.to(self.accelerator.device, non_blocking=True)
            with torch.no_grad(), self.accelerator.autocast():
                teacher = self.teacher_tokens(images, batch.sample_ids)
            for student in self.students:
                student.backward(images, teacher, micro_batch)
                if micro_batch == grad_accum_steps - 1:
                    self._is_updating = True
                    student.step(step, int(batch.sample_ids[0]) // self.loader.dataset.epoch_size)
        self._step_completed(step)

    def _must_stop_now(self) -> bool:
        """Return whether to stop before the next log; several ranks must stop at the same step."""
        return self.preemption.signal is not None and self.accelerator.num_processes == 1

    def _log_losses(self, progress: TrainingProgress | None = None) -> None:
        losses: dict[str, float] = {}
        for student in self.students:
            newest = student.log()
            if newest and student is self.students[0]:
                losses = {name: newest[-1][name] for name in student.loss_names}
        step = self.completed_steps
        throughput = self._throughput.read(step)
        if progress is not None and losses:
            progress.losses(losses)
            if step % self.config.train.log_every == 0 or step == self.steps:
                progress.print_line(step, losses, throughput["train/images_per_second"])
        self._write_trackers(throughput)

    @run_on_all_ranks
    def _write_trackers(self, throughput: Mapping[str, float]) -> None:
        if self._trackers is not None:
            self._trackers.add(self.completed_steps, throughput)
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
        raise self._stopped()

    def _save_after_error(self, error: BaseException) -> None:
        """Save the completed steps; remove the directory if there are none."""
        if self.accelerator.num_processes > 1 and not isinstance(error, SharedError):
            if self.completed_steps != self.saved_step:  # the others may be at another step
                _logger.warning(
                    "the steps after the last checkpoint are lost (%s): where one of several "
                    "processes fails, there is only what train.save_every saved",
                    self._saved(),
                )
            return
        if self.completed_steps == 0:
            if self._created_dir:
                shutil.rmtree(self.config.output, ignore_errors=True)
            return
        try:
            self._save_completed_steps()
        except Exception as other:  # the first error is the one to be shown
            _logger.warning("step %d can't be saved: %s", self.completed_steps, typed_line(other))

    def _save_completed_steps(self) -> None:
        try:
            self._log_losses()
        except NonFiniteError:
            raise
        except Exception as error:  # of a tracker; a checkpoint takes none
            _logger.warning("step %d can't be logged: %s", self.completed_steps, typed_line(error))
        self._log_unreadable()
        if self.saved_step != self.completed_steps and not self._is_mid_update():
            self._save()

    def _save(self) -> None:
        """Write a checkpoint and the weights; every rank calls it after the same step."""
        for student in self.students:
            student.check_finite(self.completed_steps)
        device = self.accelerator.device
        states = self.accelerator.gather(self._random_state.to(device)[None])  # [ranks, bytes]
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
        steps = self.completed_steps - self._first_step
        state = {
            **self.fingerprint,
            "position": self.loader.batch_sampler.position_after(steps),
            "unreadable": self.unreadable.names,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        self.store.save(Checkpoint(self.completed_steps, tensors, state))

    @run_on_main
    def _export(self) -> None:
        for student in self.students:
            student.export(self.completed_steps)
