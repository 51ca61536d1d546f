"""A run from its configuration to its results."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor

from singer.config.changes import differences
from singer.config.schema import Config, load_config
from singer.data.loader import BatchLoader, calibration_images, create_loader
from singer.engine.checkpoints import Checkpoint, CheckpointStore, DamagedError
from singer.engine.distributed import (
    PatientBarrier,
    StopRequest,
    create_accelerator,
    is_noted,
    on_main,
    together,
    watching_peers,
)
from singer.engine.run_dir import CHECKPOINTS, CONFIG, check_new, leftovers
from singer.engine.student import Learner
from singer.engine.trainer import TeacherTokens, Trainer
from singer.errors import SharedError, SingerError, StoppedError
from singer.features.cache import TokenCache, weights_digest
from singer.methods import METHODS, Distiller
from singer.methods.base import match_models
from singer.models.backbones import BlockTokens, create_backbone, inspect_backbone
from singer_kernels import resolve_backend

_logger = logging.getLogger("singer")

CALIBRATION_IMAGES = 2
"""Images on which a block's Jacobian is measured."""


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind of one student.

    Attributes:
        folder: the student's folder.
        method: the trained method, on its device.
        losses: each loss, averaged over the last tenth of the steps; empty in all processes but the
            main one.
        steps: optimiser steps, of the whole run.
        seconds: time in the loop, of the part that ran now.
        images_per_second: over all processes, saving and logging included.
    """

    folder: Path
    method: Distiller
    losses: dict[str, float]
    steps: int
    seconds: float
    images_per_second: float


def check(
    config: Config, *, process_index: int = 0, num_processes: int = 1, resume: bool = False
) -> BatchLoader:
    """Check a configuration against the models' structures and the data, before any weight loads.

    Args:
        config: the run's configuration.
        process_index: of this process.
        num_processes: of the run.
        resume: the run's folder may be there.

    Returns:
        The run's loader, for this process.

    Raises:
        SingerError: something does not fit; the message names the key.
    """
    if process_index == 0 and not resume:
        check_new(config.output, ", or go on with the run in it by --resume")
    if config.train.precision == "fp16" and config.students:
        raise SingerError(
            "train.precision: got 'fp16' with several students, which can't share the scale of "
            "their gradients; take 'bf16' or 'fp32'"
        )
    teacher = inspect_backbone(
        config.teacher.name, config.image_size, "teacher", config.teacher.options
    )
    for key, model, _ in config.trained():
        student = inspect_backbone(model.name, config.image_size, key, model.options)
        match_models(teacher, student, config.method.layers)
    METHODS[config.method.name].check(teacher, config.method.model_dump())
    return create_loader(config, process_index, num_processes)


def build_methods(config: Config, loader: BatchLoader, device: torch.device) -> list[Distiller]:
    """Load the teacher, make the students, and put each into the configured method.

    A student's weights depend on the seed alone, so that two methods start from the same.

    Args:
        config: the run's configuration.
        loader: gives the calibration images of methods that measure the teacher.
        device: where the teacher is measured, and the methods end up.

    Returns:
        A method for each of ``config.trained()``; they share the teacher.

    Raises:
        SingerError: the backend can't run, weights can't be had, or see the method.
    """
    backend = getattr(config.method, "backend", None)
    try:
        resolve_backend(backend, device)
    except (ValueError, RuntimeError) as error:
        key = "" if backend is None else "method."
        raise SingerError(f"{key}{error}") from error
    set_seed(config.train.seed)
    teacher = create_backbone(
        config.teacher.name,
        config.image_size,
        "teacher",
        config.teacher.weights,
        config.teacher.options,
    )
    teacher.model.to(device)
    images = calibration_images(loader.dataset, CALIBRATION_IMAGES).to(device)
    options = config.method.model_dump(exclude={"name"})
    methods = []
    for key, model, _ in config.trained():
        set_seed(config.train.seed)  # again: loaded weights take less randomness than random ones
        student = create_backbone(model.name, config.image_size, key, model.weights, model.options)
        method = METHODS[config.method.name](
            teacher, student, images=images, seed=config.train.seed, **options
        )
        methods.append(method.to(device))
    # Last: where a block is linearised, its weights are taken as they came.
    precision = config.teacher.precision
    if precision == "bf16" or (precision == "auto" and config.train.precision == "bf16"):
        teacher.cast(torch.bfloat16)
    if config.train.compile:
        teacher.compile()
    return methods


def _layers(methods: list[Distiller]) -> list[int]:
    """Return the teacher's blocks that any of the methods reads."""
    return sorted({layer for method in methods for layer in method.teacher_layers})


def _cached_tokens(
    config: Config,
    methods: list[Distiller],
    loader: BatchLoader,
    images_digest: str,
    accelerator: Accelerator,
    stop: StopRequest,
) -> TeacherTokens:
    """Return what reads the teacher's tokens from the configured cache, which is filled first."""
    teacher, layers, dataset = methods[0].teacher, _layers(methods), loader.dataset
    device = accelerator.device

    def crops(indices: list[int]) -> Tensor:
        if stop.requested is not None:  # complete shards stay
            raise StoppedError(stop.requested, "while teacher.cache was filled", is_shared=False)
        batch = dataset.batch(indices)
        if batch.unreadable:
            raise SingerError(
                f"data.source: {batch.unreadable[0]} can't be read, and teacher.cache needs every "
                f"image; remove or replace it"
            )
        return batch.images.to(device)

    @torch.no_grad()
    def compute(indices: list[int]) -> Mapping[int, Tensor]:
        with accelerator.autocast():
            return teacher.tokens(crops(indices), layers).tokens

    identity = {
        "teacher": config.teacher.name,
        "weights": weights_digest(teacher.model),
        "options": config.teacher.options,
        "normalization": [teacher.mean, teacher.std],
        "image_size": config.image_size,
        "source": [config.data.source, config.data.split, config.data.image_key],
        "layers": layers,
        "images": images_digest,
        "precision": [str(next(teacher.model.parameters()).dtype), config.train.precision],
    }
    with torch.no_grad(), accelerator.autocast():
        calls = teacher.tokens(crops([0]), layers).calls  # the same for every batch
    cache = TokenCache.open_or_build(
        Path(config.teacher.cache),
        identity,
        len(dataset.source),
        compute,
        batch_size=loader.batch_sampler.share // config.train.grad_accum_steps,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        wait=PatientBarrier(accelerator),
    )

    def read(images: Tensor, tickets: Tensor) -> BlockTokens:
        found = cache.read([dataset.source_index(ticket) for ticket in tickets.tolist()])
        tokens = {layer: value.to(device, non_blocking=True) for layer, value in found.items()}
        return BlockTokens(tokens, calls)

    return read


def _computed_tokens(methods: list[Distiller]) -> TeacherTokens:
    teacher, layers = methods[0].teacher, _layers(methods)

    def compute(images: Tensor, tickets: Tensor) -> BlockTokens:
        return teacher.tokens(images, layers)

    return compute


def source_digest(loader: BatchLoader) -> str:
    """Return the start of a SHA-256 over the names of the images, in their order."""
    source, digest = loader.dataset.source, hashlib.sha256()
    for index in range(len(source)):
        digest.update(f"{source.name(index)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _checkpoint_to_resume(
    config: Config, store: CheckpointStore, identity: Mapping[str, Any], force: bool
) -> int | None:
    """Return the step to go on from; None: from the beginning.

    Raises:
        SingerError: the folder holds something else, or a run with another configuration.
    """
    output = Path(config.output)
    if not output.exists():
        check_new(output)
        return None
    if not output.is_dir() or not os.access(output, os.W_OK):
        raise SingerError(f"output: {str(output)!r} is no writable folder")
    written = output / CONFIG
    if not written.exists():
        if set(output.iterdir()) - set(leftovers(output)):
            raise SingerError(f"output: {str(output)!r} is no run's folder: it has no {CONFIG}")
        return None
    try:
        before = load_config(written)
    except SingerError as error:
        raise SingerError(f"output: {written} is damaged ({error})") from error
    changed = differences(before, config)
    checkpoint = store.newest()
    if checkpoint is not None:
        for key, value in identity.items():
            found = checkpoint.state.get(key)
            if found != value:
                changed.append(f"{key}: {found} → {value}")
    if changed and not force:
        raise SingerError(
            f"output: {str(output)!r} is of a run with another configuration "
            f"({'; '.join(changed)}); change it back, or go on with it by --force"
        )
    if changed:
        _logger.warning("going on with another configuration (%s)", "; ".join(changed))
    if checkpoint is None:
        _logger.warning("%s holds no checkpoint: the run begins anew", output)
        return None
    _logger.info("going on after step %d", checkpoint.step)
    return checkpoint.step


def _read_on_all(store: CheckpointStore, step: int) -> Checkpoint:
    try:
        return store.read(step)
    except DamagedError as error:
        raise SingerError(
            f"output: the checkpoint of step {step} can't be read here ({error}); with several "
            f"machines, the folder must be on a file system that they share"
        ) from error


def train(
    config: Config, console: Console | None = None, *, resume: bool = False, force: bool = False
) -> list[RunResult]:
    """Distil the configured teacher into the configured students, and write the run's folder.

    It seeds the global random generators. Every process that a launcher (torchrun, accelerate
    launch) started calls it. When torchrun restarts them, they go on with the folder that they
    made. (A new torchrun does not know of it: where a scheduler starts the whole job anew, resume
    from the start.)

    Args:
        config: the run's configuration.
        console: where progress is shown; None: standard error.
        resume: go on from the newest checkpoint in the run's folder, if there is one.
        force: resume although the configuration, the images or the number of processes changed.

    Returns:
        For each student the trained method, its last losses and its speed.

    Raises:
        SingerError: something in the configuration, the weights or the data does not fit (nothing
            has been written then), a loss or a weight is no longer finite, too many images can't be
            read, or a file can't be written.
        StoppedError: SIGTERM or SIGUSR1 came; the run is saved.
    """
    accelerator = create_accelerator(config.train.precision)
    resume = resume or on_main(accelerator, lambda: is_noted(config.output))
    with StopRequest() as stop, watching_peers(accelerator, stop):
        return _train(config, accelerator, stop, console or Console(stderr=True), resume, force)


def _train(
    config: Config,
    accelerator: Accelerator,
    stop: StopRequest,
    console: Console,
    resume: bool,
    force: bool,
) -> list[RunResult]:
    rank, size = accelerator.process_index, accelerator.num_processes
    loader = together(
        accelerator, lambda: check(config, process_index=rank, num_processes=size, resume=resume)
    )
    store = CheckpointStore(Path(config.output, CHECKPOINTS), config.train.keep_checkpoints)
    identity = {"processes": size, "images": source_digest(loader)}
    checkpoint = None
    if resume:
        step = on_main(accelerator, lambda: _checkpoint_to_resume(config, store, identity, force))
        if step is not None:
            checkpoint = together(accelerator, lambda: _read_on_all(store, step))
    methods = together(accelerator, lambda: build_methods(config, loader, accelerator.device))
    if config.teacher.cache is None:
        tokens = _computed_tokens(methods)
    else:
        tokens = _cached_tokens(config, methods, loader, identity["images"], accelerator, stop)
    set_seed(config.train.seed, device_specific=True)
    steps_per_epoch = loader.batch_sampler.steps_per_epoch
    steps = config.train.steps or config.train.epochs * steps_per_epoch
    if checkpoint is not None and checkpoint.step > steps:
        raise SharedError(
            f"train.steps: got {steps} in all, but the run in {config.output!r} has done "
            f"{checkpoint.step}"
        )
    learners = [
        Learner(trained, method, config, accelerator, steps)
        for trained, method in zip(config.trained(), methods, strict=True)
    ]
    trainer = Trainer(
        config,
        accelerator,
        learners,
        tokens,
        loader,
        store,
        stop,
        console,
        steps=steps,
        identity=identity,
        resumed=checkpoint,
        reopen=resume,
    )
    first = trainer.done
    seconds = trainer.run()
    images = (steps - first) * config.train.batch_size
    return [
        RunResult(
            folder=learner.path,
            method=learner.method,
            losses=_last_losses(learner, steps),
            steps=steps,
            seconds=seconds,
            images_per_second=images / seconds,
        )
        for learner in learners
    ]


def _last_losses(learner: Learner, steps: int) -> dict[str, float]:
    if learner.folder is None:
        return {}
    records = learner.folder.read_metrics()[-max(1, steps // 10) :]
    if not records:  # the file is lost, and no step was left to do
        return {}
    names = [name for name in records[0] if name not in ("step", "epoch", "lr")]
    return {name: sum(record[name] for record in records) / len(records) for name in names}


def distill(
    config: Config, console: Console | None = None, *, resume: bool = False, force: bool = False
) -> RunResult:
    """Train one student, see :func:`train`.

    Raises:
        SingerError: see :func:`train`; or the configuration names several students.
    """
    if config.student is None:
        raise SingerError("students: got several; call singer.engine.run.train")
    return train(config, console, resume=resume, force=force)[0]
