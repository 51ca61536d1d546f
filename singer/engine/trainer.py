"""The training loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
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
from singer.engine.distributed import StopRequest, note_folder, on_main, together
from singer.engine.progress import TrainingProgress
from singer.engine.run_dir import CONFIG, RunFolder
from singer.engine.state_dicts import random_state, set_random_state
from singer.engine.student import Learner
from singer.errors import SharedError, SingerError, StoppedError
from singer.models.backbones import BlockTokens

_logger = logging.getLogger("singer")

TeacherTokens = Callable[[Tensor, Tensor], BlockTokens]
"""Images ``[b, 3, H, W]`` on the device and their tickets ``[b]`` to the teacher's tokens."""


class Trainer:
    """Trains one or several students on one pass of the teacher.

    Args:
        config: the run's configuration.
        accelerator: of the run.
        learners: the students.
        teacher_tokens: gives the tokens that all of them learn from.
        loader: the images.
        store: where checkpoints go.
        stop: whether the run is asked to stop.
        console: where progress is shown.
        steps: the whole run's.
        identity: what a later part of the run must find unchanged, for the checkpoints.
        resumed: where to go on; None: at the beginning.
        reopen: the run's folder is there already.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        learners: list[Learner],
        teacher_tokens: TeacherTokens,
        loader: BatchLoader,
        store: CheckpointStore,
        stop: StopRequest,
        console: Console,
        *,
        steps: int,
        identity: dict[str, Any],
        resumed: Checkpoint | None = None,
        reopen: bool = False,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.learners = learners
        self.teacher_tokens = teacher_tokens
        self.loader = loader
        self.store = store
        self.stop = stop
        self.console = console
        self.steps = steps
        self.identity = identity
        self.reopen = reopen
        self.done = 0
        self.saved_step: int | None = None
        self._is_mid_step = False
        self._made_folder = False
        self.unreadable = UnreadableLimit(len(loader.dataset.source), config.data.max_unreadable)
        self._new_unreadable: list[str] = []
        if resumed is not None:
            together(accelerator, lambda: self._resume(resumed))

    def _resume(self, checkpoint: Checkpoint) -> None:
        for learner in self.learners:
            learner.resume(checkpoint.tensors, checkpoint.step)
        self.unreadable.add(checkpoint.state["unreadable"])
        if self.accelerator.scaler is not None and checkpoint.state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
        own = checkpoint.tensors["random"].get(f"rank{self.accelerator.process_index}")
        if own is not None:  # a run forced to go on with more processes has none for the new ones
            set_random_state(own, self.accelerator.device)
        self.done = self.saved_step = checkpoint.step

    def run(self) -> float:
        """Train to the end; return the seconds it took, this part of the run alone.

        Raises:
            SingerError: a loss or a weight is no longer finite, too many images can't be read, or
                something can't be written.
            StoppedError: the run was asked to stop, and is saved.
        """
        on_main(self.accelerator, self._open)
        before = self.done
        try:
            started = time.perf_counter()
            self._loop()
            if self.done == before:  # a kill may have come between its checkpoint and its export
                on_main(self.accelerator, self._export)
            seconds = time.perf_counter() - started
        finally:
            self._close()
        on_main(self.accelerator, self._plot)
        return seconds

    def _close(self) -> None:
        for learner in self.learners:
            learner.close()

    def _open(self) -> None:
        output = self.config.output
        self._made_folder = not Path(output).exists()
        folder = RunFolder.reopen(output) if self.reopen else RunFolder(output)
        note_folder(output)
        try:
            folder.write_text(CONFIG, to_yaml(self.config))
            for learner in self.learners:
                learner.open(self.done)
        except SingerError:
            self._close()
            if self._made_folder:
                folder.remove()
            raise

    def _plot(self) -> None:
        for learner in self.learners:
            learner.plot()

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        """Yield this process's parts of the steps' batches from the next step on, for ever."""
        sampler = self.loader.batch_sampler
        epoch, step = divmod(self.done, sampler.steps_per_epoch)
        while True:
            sampler.seek(epoch, step)
            for batch in self.loader:
                yield epoch, batch
            epoch, step = epoch + 1, 0

    def _loop(self) -> None:
        train = self.config.train
        shown = self.console if self.accelerator.is_main_process else None
        with TrainingProgress(shown, self.steps, train.batch_size, self.done) as progress:
            self._heed_stop()
            batches = self._batches()
            for step in range(self.done + 1, self.steps + 1):
                try:
                    self._step(step, batches)
                except (SingerError, KeyboardInterrupt):
                    self._wind_up()
                    raise
                except torch.OutOfMemoryError as error:
                    self._wind_up()
                    raise SingerError(
                        f"train.batch_size: {train.batch_size} images in {train.grad_accum_steps} "
                        f"parts and {self.accelerator.num_processes} processes need more memory "
                        f"than there is; raise train.grad_accum_steps ({error})"
                    ) from error
                progress.step()
                is_epoch_end = step % self.loader.batch_sampler.steps_per_epoch == 0
                is_save = step == self.steps or step % train.save_every == 0 or is_epoch_end
                if is_save or step % train.log_every == 0 or self._stops_alone():
                    self._log_losses(progress)
                    self._share_unreadable()
                    if is_save:
                        self._save()
                    self._heed_stop()

    def _step(self, step: int, batches: Iterator[tuple[int, Batch]]) -> None:
        parts = self.config.train.grad_accum_steps
        for part in range(parts):
            epoch, batch = next(batches)
            self._new_unreadable += batch.unreadable
            if batch.unreadable and self.config.teacher.cache is not None:
                raise SingerError(
                    f"data.source: {batch.unreadable[0]} can't be read any more, but teacher.cache "
                    f"holds its tokens; restore it"
                )
            images = batch.images.to(self.accelerator.device, non_blocking=True)
            with torch.no_grad(), self.accelerator.autocast():
                teacher = self.teacher_tokens(images, batch.tickets)
            self._is_mid_step = True
            for learner in self.learners:
                learner.backward(images, teacher, part)
                if part == parts - 1:
                    learner.step(step, epoch)
        self.done = step
        self._is_mid_step = False

    def _stops_alone(self) -> bool:
        """Whether to stop now; with several processes, all must do so at the same step."""
        return self.stop.requested is not None and self.accelerator.num_processes == 1

    def _log_losses(self, progress: TrainingProgress | None = None) -> None:
        for learner in self.learners:
            newest = learner.log()
            if progress is not None and newest and learner is self.learners[0]:
                progress.losses({name: newest[-1][name] for name in learner.loss_names})

    def _take_unreadable(self) -> list[str]:
        own, self._new_unreadable = self._new_unreadable, []
        return own

    def _name_unreadable(self, names: list[str]) -> None:
        for name in self.unreadable.add(names):
            if self.accelerator.is_main_process:
                _logger.warning("%s can't be read; another image takes its place", name)

    def _share_unreadable(self) -> None:
        """Name newly found unreadable images in the log; end the run if there are too many."""
        own = self._take_unreadable()
        if not self._any(bool(own)):
            return
        self._name_unreadable(gather_object(own))
        if self.unreadable.exceeded:
            if self.saved_step != self.done:
                self._save()
            raise SharedError(str(self.unreadable.error()))

    def _any(self, here: bool) -> bool:
        """Return whether something is so in any process."""
        if self.accelerator.num_processes == 1:
            return here
        flag = torch.tensor([int(here)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item())

    def _heed_stop(self) -> None:
        if not self._any(self.stop.requested is not None):
            return
        if self.done > 0 and self.saved_step != self.done:
            self._save()
        names = [name for name in gather_object([self.stop.requested]) if name is not None]
        raise StoppedError(names[0], f"after step {self.done} of {self.steps}")

    def _wind_up(self) -> None:
        """Keep what a run did before a step failed; leave no folder if it did nothing."""
        if self.accelerator.num_processes > 1:
            return  # the others may be in another step
        if self.done == 0:
            if self._made_folder:
                RunFolder.reopen(self.config.output).remove()
            return
        self._log_losses()
        self._name_unreadable(self._take_unreadable())
        # In the middle of a step, weights or random generators may have moved on.
        if self.saved_step != self.done and not self._is_mid_step:
            self._save()

    def _save(self) -> None:
        """Write a checkpoint and the weights; every process calls it after the same step."""
        for learner in self.learners:
            learner.check_finite(self.done)
        states = self._random_states()
        on_main(self.accelerator, lambda: self._write_checkpoint(states))
        on_main(self.accelerator, self._export)
        for learner in self.learners:
            learner.saved_step = self.done
        self.saved_step = self.done

    def _random_states(self) -> dict[str, Tensor]:
        own = random_state(self.accelerator.device).to(self.accelerator.device)
        states = self.accelerator.gather(own[None])  # [processes, bytes]
        return {f"rank{rank}": state for rank, state in enumerate(states.cpu())}

    def _write_checkpoint(self, random_states: dict[str, Tensor]) -> None:
        tensors = {"random": random_states}
        for learner in self.learners:
            learner.sync()
            tensors.update(learner.checkpoint())
        scaler = self.accelerator.scaler
        state = {
            **self.identity,
            "unreadable": self.unreadable.names,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        self.store.save(Checkpoint(self.done, tensors, state))

    def _export(self) -> None:
        for learner in self.learners:
            learner.export(self.done)
