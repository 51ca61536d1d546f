"""The training loop. Accelerate holds devices, precision and processes."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from rich.console import Console
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from singer import figures
from singer.backbones import create_backbone, inspect_backbone
from singer.config import Config, SiNGERConfig, to_yaml
from singer.data import create_loader
from singer.errors import NonFiniteError, SingerError
from singer.methods import METHODS, Distiller
from singer.methods.base import match_models
from singer.nullspace import check_rank
from singer.progress import TrainingProgress
from singer.run_folder import CONFIG, STUDENT, RunFolder, check_new
from singer_kernels import resolve_backend

_logger = logging.getLogger("singer")

CALIBRATION_IMAGES = 2
"""Images on which a block's Jacobian is measured."""


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind.

    Attributes:
        folder: the run's folder.
        method: the trained method, on its device.
        losses: each loss, averaged over the last tenth of the steps.
        steps: optimiser steps.
        seconds: time in the loop.
        images_per_second: over all processes, saving and logging included.
    """

    folder: Path
    method: Distiller
    losses: dict[str, float]
    steps: int
    seconds: float
    images_per_second: float


def check(config: Config) -> DataLoader[Tensor]:
    """Check a configuration against the models' structures and the data, before any weight loads.

    Args:
        config: the run's configuration.

    Returns:
        The run's loader.

    Raises:
        SingerError: something does not fit; the message names the key.
    """
    check_new(config.output)
    teacher = inspect_backbone(
        config.teacher.name, config.image_size, "teacher", config.teacher.options
    )
    student = inspect_backbone(
        config.student.name, config.image_size, "student", config.student.options
    )
    match_models(teacher, student, config.method.layers)
    if isinstance(config.method, SiNGERConfig):
        check_rank(config.method.rank, teacher.dim)
    return create_loader(config)


def build_method(config: Config, loader: DataLoader[Tensor], device: torch.device) -> Distiller:
    """Load the teacher, make the student, and put them into the configured method.

    The student's weights depend on the seed alone, so that two methods start from the same.

    Args:
        config: the run's configuration.
        loader: gives the calibration images of methods that measure the teacher.
        device: where the teacher is measured, and the method ends up.

    Raises:
        SingerError: the backend can't run, weights can't be had, or see the method.
    """
    try:
        resolve_backend(config.method.backend, device)
    except (ValueError, RuntimeError) as error:
        key = "" if config.method.backend is None else "method."
        raise SingerError(f"{key}{error}") from error
    set_seed(config.train.seed)
    teacher = create_backbone(
        config.teacher.name,
        config.image_size,
        "teacher",
        config.teacher.weights,
        config.teacher.options,
    )
    set_seed(config.train.seed)  # again: loaded weights take less randomness than random ones
    student = create_backbone(
        config.student.name,
        config.image_size,
        "student",
        config.student.weights,
        config.student.options,
    )
    teacher.model.to(device)
    count = min(CALIBRATION_IMAGES, len(loader.dataset))
    images = torch.stack([loader.dataset[index] for index in range(count)]).to(device)
    options = config.method.model_dump(exclude={"name"})
    method = METHODS[config.method.name](
        teacher, student, images=images, seed=config.train.seed, **options
    )
    return method.to(device)


class _LossLog:
    """Keeps each step's losses on the device; reads them, and checks them, only when asked."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.names: list[str] = []
        self.pending: list[Tensor] = []

    def add(self, losses: dict[str, Tensor]) -> None:
        self.names = list(losses)
        self.pending.append(torch.stack([loss.detach().float() for loss in losses.values()]))

    def read(self) -> list[dict[str, float]]:
        """Return the losses of the steps since the last call, averaged over the processes."""
        if not self.pending:
            return []
        values = self.accelerator.reduce(torch.stack(self.pending), reduction="mean")
        self.pending.clear()
        return [dict(zip(self.names, row, strict=True)) for row in values.tolist()]


class _Trainer:
    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        method: Distiller,
        loader: DataLoader[Tensor],
        console: Console,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.method = method
        self.console = console
        optimizer = create_optimizer_v2(
            method,
            opt="adamw",
            lr=config.train.lr,
            weight_decay=config.train.weight_decay,
            betas=config.train.betas,
        )
        self.model, self.optimizer, self.loader = accelerator.prepare(method, optimizer, loader)
        if len(self.loader) == 0:
            raise SingerError(
                f"train.batch_size: got {config.train.batch_size} for each of "
                f"{accelerator.num_processes} processes, but an epoch has {len(loader.dataset)} "
                f"samples; lower it or raise data.epoch_size"
            )
        self.steps = config.train.steps or config.train.epochs * len(self.loader)
        warmup = min(round(config.train.warmup * self.steps), self.steps - 1)
        self.scheduler = CosineLRScheduler(
            optimizer,
            t_initial=self.steps - warmup,
            lr_min=config.train.lr * config.train.min_lr,
            warmup_t=warmup,
            warmup_lr_init=config.train.lr / (warmup + 1),
            warmup_prefix=True,
            t_in_epochs=False,
        )
        self.loss_log = _LossLog(accelerator)
        self.folder: RunFolder | None = None
        self.writer: SummaryWriter | None = None
        self.saved_step: int | None = None
        self.finished_step = 0
        self.step_setups: list[dict[str, Any]] = []  # of the steps whose losses are pending

    def _batches(self) -> Iterator[tuple[int, Tensor]]:
        epoch = 0
        while True:
            self.loader.set_epoch(epoch)
            for images in self.loader:
                yield epoch, images
            epoch += 1

    def _open(self, folder: RunFolder) -> None:
        """Write what is known before the first step."""
        folder.write_text(CONFIG, to_yaml(self.config))
        for name, report in self.method.reports().items():
            folder.write_json(f"{name}.json", report)
        self.writer = SummaryWriter(str(folder.path / "tensorboard"))

    def run(self) -> RunResult:
        if self.accelerator.is_main_process:
            self.folder = RunFolder(self.config.output)
        try:
            if self.folder is not None:
                self._open(self.folder)
            started = time.perf_counter()
            records = self._loop()
            seconds = time.perf_counter() - started
        except NonFiniteError:
            raise  # the weights are of no use, and the losses before it are written
        except (SingerError, KeyboardInterrupt) as error:
            self._wind_up(error)
            raise
        finally:
            if self.writer is not None:
                self.writer.close()
        if self.folder is not None:
            figures.plot_losses(self.folder.read_metrics(), self.folder.figure_path("losses"))
        losses = {
            name: sum(record[name] for record in records) / len(records)
            for name in self.loss_log.names
        }
        images = self.steps * self.config.train.batch_size * self.accelerator.num_processes
        return RunResult(
            folder=Path(self.config.output),
            method=self.method,
            losses=losses,
            steps=self.steps,
            seconds=seconds,
            images_per_second=images / seconds,
        )

    def _loop(self) -> Sequence[dict[str, Any]]:
        """Train, and return the records of the last tenth of the steps."""
        train = self.config.train
        records: deque[dict[str, Any]] = deque(maxlen=max(1, self.steps // 10))
        self.model.train()
        per_step = train.batch_size * self.accelerator.num_processes
        shown = self.console if self.accelerator.is_main_process else None
        with TrainingProgress(shown, self.steps, per_step) as progress:
            batches = self._batches()
            for step in range(1, self.steps + 1):
                epoch, images = next(batches)
                self.scheduler.step_update(step - 1)
                losses = self.model(images)
                self.accelerator.backward(losses["loss"])
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.loss_log.add(losses)
                rate = self.optimizer.param_groups[0]["lr"]
                self.step_setups.append({"step": step, "epoch": epoch, "lr": rate})
                self.finished_step = step
                progress.step()
                is_save = step == self.steps or step % train.save_every == 0
                if is_save or step % train.log_every == 0:
                    new = self._log()
                    records.extend(new)
                    progress.losses({name: new[-1][name] for name in self.loss_log.names})
                if is_save:
                    self._save(step)
        return records

    def _wind_up(self, error: BaseException) -> None:
        """Keep what a run that stops early has done; leave no folder if it has done nothing."""
        if self.folder is None or self.accelerator.num_processes > 1:
            return  # other processes may be in another step
        if self.finished_step == 0:
            self.folder.remove()
            return
        self._log()
        if not isinstance(error, KeyboardInterrupt):  # that may come in the middle of an update
            self._save(self.finished_step)

    def _log(self) -> list[dict[str, Any]]:
        """Read, check and write the losses of the steps since the last call."""
        records: list[dict[str, Any]] = []
        setups, self.step_setups = self.step_setups, []
        for setup, losses in zip(setups, self.loss_log.read(), strict=True):
            bad = [name for name, value in losses.items() if not math.isfinite(value)]
            if bad:
                self._write_records(records)
                name = bad[-1]  # the sum, "loss", comes first: a term says more
                raise NonFiniteError(
                    f"step {setup['step']}: {name} is {losses[name]}; {self._last_good()}; "
                    f"lower train.lr{self._precision_hint()}"
                )
            records.append({**setup, **losses})
        self._write_records(records)
        return records

    def _write_records(self, records: list[dict[str, Any]]) -> None:
        if self.folder is None or self.writer is None:
            return
        self.folder.append_metrics(records)
        for record in records:
            for name in ("lr", *self.loss_log.names):
                self.writer.add_scalar(f"train/{name}", record[name], record["step"])

    def _precision_hint(self) -> str:
        return "" if self.config.train.precision == "fp32" else ", or take train.precision=fp32"

    def _last_good(self) -> str:
        if self.saved_step is None:
            return "no checkpoint had been saved (lower train.save_every)"
        path = Path(self.config.output) / STUDENT
        return f"the last good checkpoint is {path}, of step {self.saved_step}"

    def _save(self, step: int) -> None:
        """Write the trained weights; the student last, so that it never is ahead of the others."""
        weights = {**self.method.exports(), "student": self.method.student.state_dict()}
        for name, tensors in weights.items():
            for key, tensor in tensors.items():
                if not tensor.isfinite().all():
                    raise NonFiniteError(
                        f"step {step}: the weight {name}.{key} is not finite; {self._last_good()}; "
                        f"lower train.lr{self._precision_hint()}"
                    )
        if self.folder is not None:
            metadata = {
                "format": "pt",
                "model": self.config.student.name,
                "options": json.dumps(
                    {
                        "num_classes": 0,
                        "img_size": self.config.image_size,
                        **self.config.student.options,
                    }
                ),
                "step": str(step),
            }
            for name, tensors in weights.items():
                self.folder.write_tensors(f"{name}.safetensors", tensors, metadata)
        self.saved_step = step
        self.accelerator.wait_for_everyone()


def _accelerator(precision: str) -> Accelerator:
    try:
        accelerator = Accelerator(
            mixed_precision={"fp32": "no"}.get(precision, precision),
            dataloader_config=DataLoaderConfiguration(non_blocking=True),
        )
    except ValueError as error:  # Accelerate keeps one precision per process
        raise SingerError(
            f"train.precision: got {precision!r}, but a run with another precision came before in "
            f"this process; start a new one"
        ) from error
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise SingerError("train.precision: got 'fp16', which needs a GPU; take 'bf16' or 'fp32'")
    return accelerator


def distill(config: Config, console: Console | None = None) -> RunResult:
    """Distil the configured teacher into the configured student, and write the run's folder.

    It seeds the global random generators.

    Args:
        config: the run's configuration.
        console: where progress is shown; None: standard error.

    Returns:
        The trained method, its last losses and its speed.

    Raises:
        SingerError: something in the configuration, the weights or the data does not fit (nothing
            has been written then), a loss or a weight is no longer finite, or an image can't be
            read.
    """
    loader = check(config)
    accelerator = _accelerator(config.train.precision)
    method = build_method(config, loader, accelerator.device)
    set_seed(config.train.seed, device_specific=True)
    trainer = _Trainer(config, accelerator, method, loader, console or Console(stderr=True))
    return trainer.run()
