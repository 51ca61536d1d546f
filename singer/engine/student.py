"""One student in training: what trains it, what is logged of it, what is saved of it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from singer.config.schema import Config, TrainConfig, TrainedModel
from singer.engine.distributed import together
from singer.engine.run_dir import STUDENT, STUDENT_EMA, TENSORBOARD, RunFolder, writing
from singer.engine.state_dicts import load_module, load_optimizer, optimizer_tensors
from singer.errors import NonFiniteError, SharedError
from singer.methods import Distiller
from singer.models.backbones import BlockTokens
from singer.report import figures

_logger = logging.getLogger("singer")


class LossLog:
    """Keeps each step's losses on the device; reads them, and checks them, only when asked.

    Args:
        accelerator: averages them over the processes.
        parts: how many times :meth:`add` is called in a step.
    """

    def __init__(self, accelerator: Accelerator, parts: int = 1) -> None:
        self.accelerator = accelerator
        self.parts = parts
        self.names: list[str] = []
        self._pending: list[Tensor] = []

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Note the losses of one part of a step's batch, scalars."""
        self.names = list(losses)
        self._pending.append(torch.stack([loss.detach().float() for loss in losses.values()]))

    def read(self, steps: int) -> list[dict[str, float]]:
        """Return the means of the steps since the last call, over their batches and processes.

        Args:
            steps: how many were completed; what was added of a further one is dropped.
        """
        pending, self._pending = self._pending[: steps * self.parts], []
        if not pending:
            return []
        parts = torch.stack(pending).unflatten(0, (steps, self.parts))  # [steps, parts, losses]
        values = self.accelerator.reduce(parts.mean(dim=1), reduction="mean")
        return [dict(zip(self.names, row, strict=True)) for row in values.tolist()]


def create_optimizer(method: Distiller, train: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW over all that a method trains.

    Args:
        method: names the parameters that timm exempts from weight decay.
        train: the recipe.
    """
    trainable = [p for p in method.parameters() if p.requires_grad]
    return create_optimizer_v2(
        trainable if train.decay_norm_and_bias else method,  # of a list, timm exempts nothing
        opt="adamw",
        lr=train.lr,
        weight_decay=train.weight_decay,
        betas=train.betas,
        fused=True,
    )


def create_schedule(
    optimizer: torch.optim.Optimizer, train: TrainConfig, steps: int
) -> CosineLRScheduler:
    """Return the learning rate's schedule: a linear warm-up, then a cosine.

    Args:
        optimizer: whose rate is set by ``step_update(step)``, steps counted from 0.
        train: the recipe.
        steps: the whole run's.
    """
    warmup = min(round(train.warmup * steps), steps - 1)
    return CosineLRScheduler(
        optimizer,
        t_initial=steps - warmup,
        lr_min=train.lr * train.min_lr,
        warmup_t=warmup,
        warmup_lr_init=train.lr / (warmup + 1),
        warmup_prefix=True,
        t_in_epochs=False,
    )


class Learner:
    """A student in training, with its method, optimiser, schedule, moving average and folder.

    Args:
        trained: which model it is, and where its files go.
        method: holds it, on its device.
        config: the run's configuration.
        accelerator: of the run.
        steps: the whole run's.

    Attributes:
        method: as it was given, not wrapped for the exchange of gradients.
        folder: its files; None until :meth:`open`, and in all processes but the main one.
    """

    def __init__(
        self,
        trained: TrainedModel,
        method: Distiller,
        config: Config,
        accelerator: Accelerator,
        steps: int,
    ) -> None:
        self.key, self.model_config, self.path = trained
        self.method = method
        self.config = config
        self.accelerator = accelerator
        train = config.train
        self.ema = (
            None
            if train.ema is None
            else ModelEmaV3(method.student, decay=train.ema, use_warmup=True)
        )
        if train.compile:  # after the moving average's copy, which is never run
            method.student_backbone.compile()
        self._optimizer = create_optimizer(method, train)
        self._schedule = create_schedule(self._optimizer, train, steps)
        self._model, self._stepper = accelerator.prepare(method, self._optimizer)
        self._model.train()
        self._parts = train.grad_accum_steps
        self._log = LossLog(accelerator, train.grad_accum_steps)
        self._setups: list[dict[str, Any]] = []  # of the steps whose losses are not read yet
        self.folder: RunFolder | None = None
        self._writer: SummaryWriter | None = None
        self.saved_step: int | None = None

    @property
    def loss_names(self) -> list[str]:
        """The names of the losses, once there are any."""
        return self._log.names

    def open(self, done: int) -> None:
        """Open its folder, and write what is known before the first step. Main process only.

        Args:
            done: steps that an earlier part of the run has done; records of later ones are dropped.
        """
        self.folder = RunFolder.reopen(self.path)
        self.folder.cut_metrics(done)
        for name, report in self.method.reports().items():
            self.folder.write_json(f"{name}.json", report)
        path = self.folder.path / TENSORBOARD
        with writing(path):
            self._writer = SummaryWriter(str(path), purge_step=done + 1)

    def close(self) -> None:
        """Flush what is written along the way; that it can't be is no error any more."""
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as error:
            _logger.warning("%s can't be written: %s", self.path / TENSORBOARD, error)

    def backward(self, images: Tensor, teacher: BlockTokens, part: int) -> None:
        """Add the gradients of one part of a step's batch.

        Args:
            images: ``[b, 3, H, W]``.
            teacher: its tokens for these images.
            part: 0, 1, ...; processes exchange gradients at the last one.

        Raises:
            SharedError: the loss does not depend on a parameter that is trained.
        """
        exchange: AbstractContextManager[Any] = nullcontext()
        if part < self._parts - 1:
            exchange = self.accelerator.no_sync(self._model)
        with exchange:
            losses = self._model(images, teacher)
            self.accelerator.backward(losses["loss"] / self._parts)
        if not self._log.names:
            self._check_gradients()
        self._log.add(losses)

    def _check_gradients(self) -> None:
        """Check, after the first backward, that every trained parameter takes part."""
        idle = [
            name
            for name, parameter in self.method.named_parameters()
            if parameter.requires_grad and parameter.grad is None
        ]
        if idle:  # several processes would wait for its gradient
            raise SharedError(
                f"method.name: {self.config.method.name!r} trains {', '.join(idle[:5])}"
                f"{', …' if len(idle) > 5 else ''}, which its loss does not depend on; use it, or "
                f"set requires_grad_(False)"
            )

    def step(self, step: int, epoch: int) -> None:
        """Update the weights.

        Args:
            step: from 1.
            epoch: from 0, for the records.
        """
        self._schedule.step_update(step - 1)
        if self.config.train.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(
                self.method.parameters(), self.config.train.max_grad_norm
            )
        self._stepper.step()
        self._stepper.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.method.student, step)
        rate = self._optimizer.param_groups[0]["lr"]
        self._setups.append({"step": step, "epoch": epoch, "lr": rate})

    def log(self) -> list[dict[str, Any]]:
        """Read, check and write the losses of the steps since the last call; return the records.

        Raises:
            NonFiniteError: one is NaN or infinite; those before it are written.
        """
        records: list[dict[str, Any]] = []
        setups, self._setups = self._setups, []
        for setup, losses in zip(setups, self._log.read(len(setups)), strict=True):
            bad = [name for name, value in losses.items() if not math.isfinite(value)]
            if bad:
                self._write(records)
                name = bad[-1]  # the sum, "loss", comes first: a term says more
                raise self._non_finite(setup["step"], f"{name} is {losses[name]}")
            records.append({**setup, **losses})
        self._write(records)
        return records

    def _write(self, records: list[dict[str, Any]]) -> None:
        together(self.accelerator, lambda: self._write_here(records))

    def _write_here(self, records: list[dict[str, Any]]) -> None:
        if self.folder is None or self._writer is None:
            return
        self.folder.append_metrics(records)
        with writing(self.folder.path / TENSORBOARD):
            for record in records:
                for name in ("lr", *self.loss_names):
                    self._writer.add_scalar(f"train/{name}", record[name], record["step"])

    def sync(self) -> None:
        """Make the records last that were written so far. Main process only."""
        if self.folder is not None:
            self.folder.sync_metrics()

    def _non_finite(self, step: int, what: str) -> NonFiniteError:
        if self.saved_step is None:
            good = "no checkpoint had been saved (lower train.save_every)"
        else:
            good = f"the last good checkpoint is {self.path / STUDENT}, of step {self.saved_step}"
        hint = "" if self.config.train.precision == "fp32" else ", or take train.precision=fp32"
        whose = f"{self.path.name}: " if self.config.students else ""
        return NonFiniteError(f"{whose}step {step}: {what}; {good}; lower train.lr{hint}")

    def check_finite(self, step: int) -> None:
        """Check every weight, before it is saved.

        Raises:
            NonFiniteError: one is not finite.
        """
        for name, tensor in self.method.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise self._non_finite(step, f"the weight {name} is not finite")

    def checkpoint(self) -> dict[str, dict[str, Tensor]]:
        """Return what it needs to go on: file name (no ending) to named tensors."""
        files = {
            f"{self.key}.weights": self.method.state_dict(),
            f"{self.key}.optimizer": optimizer_tensors(self._optimizer, self.method),
        }
        if self.ema is not None:
            files[f"{self.key}.ema"] = self.ema.module.state_dict()
        return files

    def resume(self, files: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Take back what :meth:`checkpoint` returned at a step.

        Raises:
            SingerError: it is of another model.
        """
        load_module(self.method, files.get(f"{self.key}.weights", {}), self.key)
        load_optimizer(self._optimizer, self.method, files.get(f"{self.key}.optimizer", {}))
        if self.ema is not None:
            # A run that is forced to go on with an average that it did not have starts it here.
            start = files.get(f"{self.key}.ema", self.method.student.state_dict())
            load_module(self.ema.module, start, f"{self.key}, its moving average")
        self.saved_step = step

    def export(self, step: int) -> None:
        """Write the weights for use elsewhere, the student last. Main process only."""
        self.saved_step = step
        if self.folder is None:
            return
        options = {
            "num_classes": 0,
            "img_size": self.config.image_size,
            **self.model_config.options,
        }
        metadata = {
            "format": "pt",
            "model": self.model_config.name,
            "options": json.dumps(options),
            "step": str(step),
        }
        for name, tensors in self.method.exports().items():
            self.folder.write_tensors(f"{name}.safetensors", tensors, metadata)
        if self.ema is not None:
            self.folder.write_tensors(STUDENT_EMA, self.ema.module.state_dict(), metadata)
        self.folder.write_tensors(STUDENT, self.method.student.state_dict(), metadata)

    def plot(self) -> None:
        """Draw the losses. Main process only."""
        if self.folder is None:
            return
        records = self.folder.read_metrics()
        if records:
            figures.plot_losses(records, self.folder.figure_path("losses"))
