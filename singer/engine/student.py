"""The training state of one student: optimiser, schedule, moving average, logs, exports."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from singer.config.schema import Config, StudentSpec, TrainConfig
from singer.engine.distributed import run_on_all_ranks
from singer.engine.run_dir import STUDENT, STUDENT_EMA, RunDir
from singer.engine.state_dicts import load_module, load_optimizer, optimizer_tensors
from singer.engine.trackers import Trackers
from singer.errors import NonFiniteError, SharedError, SingerError, first_names
from singer.methods import Distiller
from singer.models.backbones import BlockTokens
from singer.report import figures

_GRAD_NORM = "grad_norm"


class LossLog:
    """Keeps losses and gradient norms on the device; copies them to the host in :meth:`read`.

    Args:
        accelerator: averages them over the ranks.
        grad_accum_steps: micro-batches per step, and so calls of :meth:`add`.
    """

    def __init__(self, accelerator: Accelerator, grad_accum_steps: int) -> None:
        self.accelerator = accelerator
        self.grad_accum_steps = grad_accum_steps
        self.names: list[str] = []
        self._pending: list[Tensor] = []
        self._norms: list[Tensor] = []

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Append the losses of one micro-batch, scalars."""
        self.names = list(losses)
        self._pending.append(torch.stack([loss.detach().float() for loss in losses.values()]))

    def add_norm(self, norm: Tensor) -> None:
        """Append the gradient norm of a step, a scalar."""
        self._norms.append(norm.detach().float())

    def read(self, steps: int) -> list[dict[str, float]]:
        """Return each step's losses since the last call, averaged over micro-batches and ranks.

        With them the gradient norm, as ``grad_norm``.

        Args:
            steps: number of completed steps; micro-batches of a further one are dropped.
        """
        pending, self._pending = self._pending[: steps * self.grad_accum_steps], []
        norms, self._norms = self._norms[:steps], []
        if not pending:
            return []
        # [steps, micro-batches, losses]
        losses = torch.stack(pending).unflatten(0, (steps, self.grad_accum_steps))
        means = torch.cat([losses.mean(dim=1), torch.stack(norms)[:, None]], dim=1)
        values = self.accelerator.reduce(means, reduction="mean")
        names = [*self.names, _GRAD_NORM]
        return [dict(zip(names, row, strict=True)) for row in values.tolist()]


def create_optimizer(method: Distiller, train: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW over the trainable parameters of a method.

    Args:
        method: timm reads the parameters that it exempts from weight decay off it.
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
    """Return the learning rate schedule: a linear warm-up, then a cosine.

    Args:
        optimizer: its learning rate is set by ``step_update(step)``, from step 0.
        train: the recipe.
        steps: number of optimiser steps of the whole run.
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


def _first_non_finite(files: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """Return the name of the first tensor of a checkpoint that is not finite; None: all are."""
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                return f"{name} ({file.rpartition('.')[2]})"
    return None


class StudentTrainer:
    """Trains one student: its method, optimiser, schedule, moving average and output directory.

    Args:
        spec: the student's model and output directory.
        method: contains the student, on its device.
        config: the run's configuration.
        accelerator: of the run.
        steps: number of optimiser steps of the whole run.

    Attributes:
        method: not wrapped in DDP.
        run_dir: its output directory; None before :meth:`open`, and except on the main rank.
    """

    def __init__(
        self,
        spec: StudentSpec,
        method: Distiller,
        config: Config,
        accelerator: Accelerator,
        steps: int,
    ) -> None:
        self.key, self.model_config, self.path = spec
        self.method = method
        self.config = config
        self.accelerator = accelerator
        train = config.train
        self.ema: ModelEmaV3 | None = None
        if train.ema is not None:
            self.ema = ModelEmaV3(method.student, decay=train.ema, use_warmup=True)
        if train.compile:  # after the moving average copied it; the copy is never run
            method.student_backbone.compile()
        self._optimizer = create_optimizer(method, train)
        self._schedule = create_schedule(self._optimizer, train, steps)
        self._model, self._stepper = accelerator.prepare(method, self._optimizer)
        self._model.train()
        self._grad_accum_steps = train.grad_accum_steps
        self._log = LossLog(accelerator, train.grad_accum_steps)
        self._pending: list[dict[str, Any]] = []  # step, epoch, lr; the losses are not read yet
        self._unwritten: list[dict[str, Any]] = []  # records
        self.run_dir: RunDir | None = None
        self._trackers: Trackers | None = None
        self._prefix = f"{self.path.name}/train/" if config.students else "train/"
        self.saved_step: int | None = None

    @property
    def loss_names(self) -> list[str]:
        """The names of the losses, once there are any."""
        return self._log.names

    def open(self, done: int, trackers: Trackers) -> None:
        """Open the output directory, and write the method's reports. Main rank only.

        Args:
            done: number of completed steps of a resumed run; records of later ones are dropped.
            trackers: get the records too, under the student's name if there are several.
        """
        self._trackers = trackers
        self.run_dir = RunDir(self.path, reopen=True)
        self.run_dir.truncate_metrics(done)
        for name, report in self.method.reports().items():
            self.run_dir.write_json(f"{name}.json", report)

    def backward(self, images: Tensor, teacher: BlockTokens, micro_batch: int) -> None:
        """Accumulate the gradients of one micro-batch.

        Args:
            images: ``[b, 3, H, W]``.
            teacher: its tokens of these images.
            micro_batch: its index in the step; gradients are all-reduced at the last one.

        Raises:
            SharedError: the loss does not depend on a parameter that is trained.
        """
        sync: AbstractContextManager[Any] = nullcontext()
        if micro_batch < self._grad_accum_steps - 1:
            sync = self.accelerator.no_sync(self._model)
        with sync:
            losses = self._model(images, teacher)
            self.accelerator.backward(losses["loss"] / self._grad_accum_steps)
        if not self._log.names:
            self._check_gradients()
        self._log.add(losses)

    def _check_gradients(self) -> None:
        """Check, after the first backward, that every trainable parameter has a gradient."""
        unused = [
            name
            for name, parameter in self.method.named_parameters()
            if parameter.requires_grad and parameter.grad is None
        ]
        if unused:  # DDP would wait for its gradient
            raise SharedError(
                f"method.name: {self.config.method.name!r} trains {first_names(unused)}, "
                f"which its loss does not depend on; use it, or set requires_grad_(False)"
            )

    def step(self, step: int, epoch: int) -> None:
        """Update the weights.

        Args:
            step: from 1.
            epoch: from 0; logged.
        """
        self._schedule.step_update(step - 1)
        self._log.add_norm(self._clip_gradients())
        self._stepper.step()
        self._stepper.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.method.student, step)
        rate = self._optimizer.param_groups[0]["lr"]
        self._pending.append({"step": step, "epoch": epoch, "lr": rate})

    def _clip_gradients(self) -> Tensor:
        """Clip the gradients, if configured; return their norm before that, on the device."""
        max_norm = self.config.train.max_grad_norm
        if max_norm is not None:
            return self.accelerator.clip_grad_norm_(self.method.parameters(), max_norm)
        self.accelerator.unscale_gradients(self._stepper)  # of fp16
        gradients = [p.grad for p in self.method.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(gradients)

    def log(self) -> list[dict[str, Any]]:
        """Read, check and write the losses of the steps since the last call; return the records.

        A record holds the gradient norm beside step, epoch, lr and losses. Records that can't be
        written are kept for the next call.

        Raises:
            NonFiniteError: one is NaN or infinite; those before it are written.
        """
        pending, self._pending = self._pending, []
        for entry, values in zip(pending, self._log.read(len(pending)), strict=True):
            bad = [name for name in self.loss_names if not math.isfinite(values[name])]
            if bad:
                self._write()
                name = bad[-1]  # the sum, "loss", comes first: a term says more
                raise self._non_finite(entry["step"], f"{name} is {values[name]}")
            self._unwritten.append({**entry, **values})
        return self._write()

    @run_on_all_ranks
    def _write(self) -> list[dict[str, Any]]:
        records, self._unwritten = self._unwritten, []
        if self.run_dir is None or self._trackers is None:
            return records
        try:
            # Not the gradient norm: it is infinite where fp16 skips a step, which JSON has not.
            self.run_dir.append_metrics(
                [{k: v for k, v in record.items() if k != _GRAD_NORM} for record in records]
            )
        except BaseException:
            self._unwritten = records
            raise
        for record in records:
            names = ("lr", *self.loss_names, _GRAD_NORM)
            self._trackers.add(record["step"], {f"{self._prefix}{n}": record[n] for n in names})
        return records

    def sync(self) -> None:
        """Flush the records to the disk. Main rank only."""
        if self.run_dir is not None:
            self.run_dir.sync_metrics()

    def _non_finite(self, step: int, what: str) -> NonFiniteError:
        if self.saved_step is None:
            good = "no checkpoint had been saved (lower train.save_every)"
        else:
            good = f"the last good checkpoint is {self.path / STUDENT}, of step {self.saved_step}"
        hint = "" if self.config.train.precision == "fp32" else ", or take train.precision=fp32"
        whose = f"{self.path.name}: " if self.config.students else ""
        return NonFiniteError(f"{whose}step {step}: {what}; {good}; lower train.lr{hint}")

    def check_finite(self, step: int) -> None:
        """Check that all weights, optimiser states and moving averages are finite.

        Raises:
            NonFiniteError: one is not finite.
        """
        name = _first_non_finite(self.checkpoint())
        if name is not None:
            raise self._non_finite(step, f"{name} is not finite")

    def checkpoint(self) -> dict[str, dict[str, Tensor]]:
        """Return its state to save: file name without ending to named tensors."""
        files = {
            f"{self.key}.weights": self.method.state_dict(),
            f"{self.key}.optimizer": optimizer_tensors(self._optimizer, self.method),
        }
        if self.ema is not None:
            files[f"{self.key}.ema"] = self.ema.module.state_dict()
        return files

    def resume(self, files: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Load what :meth:`checkpoint` returned after a step.

        Raises:
            SingerError: it is of another model, or not finite.
        """
        own = {name: tensors for name, tensors in files.items() if name.startswith(f"{self.key}.")}
        bad = _first_non_finite(own)
        if bad is not None:
            raise SingerError(
                f"checkpoint: {bad} is not finite; delete the checkpoint of step {step}, and an "
                f"older one is taken"
            )
        load_module(self.method, files.get(f"{self.key}.weights", {}), self.key)
        load_optimizer(self._optimizer, self.method, files.get(f"{self.key}.optimizer", {}))
        if self.ema is not None:
            # A run resumed with --force may not have had a moving average: it starts here.
            start = files.get(f"{self.key}.ema", self.method.student.state_dict())
            load_module(self.ema.module, start, f"{self.key}, its moving average")
        self.saved_step = step

    def export(self, step: int) -> None:
        """Write the weights under timm's keys, the student last. Main rank only.

        The metadata of each file names the model and its options, the step, the inputs'
        normalisation, and, by teacher block, the student block that its projection belongs to.
        """
        self.saved_step = step
        if self.run_dir is None:
            return
        method, backbone = self.method, self.method.student_backbone
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
            "normalization": json.dumps({"mean": backbone.mean, "std": backbone.std}),
            "blocks": json.dumps(dict(zip(method.layers, method.student_layers, strict=True))),
        }
        for name, tensors in method.exports().items():
            self.run_dir.write_tensors(f"{name}.safetensors", tensors, metadata)
        if self.ema is not None:
            self.run_dir.write_tensors(STUDENT_EMA, self.ema.module.state_dict(), metadata)
        self.run_dir.write_tensors(STUDENT, method.student.state_dict(), metadata)

    def plot(self) -> None:
        """Plot the losses. Main rank only."""
        if self.run_dir is not None and (records := self.run_dir.read_metrics()):
            figures.plot_losses(records, self.path / "figures" / "losses.png")
