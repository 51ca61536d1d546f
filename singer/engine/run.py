"""A training run, from its configuration to its results."""

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
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from singer.config.changes import differences
from singer.config.loading import load_config
from singer.config.schema import Config, ModelConfig
from singer.data.decoding import DECODING
from singer.data.loader import BatchLoader, create_loader
from singer.data.sampler import EpochBatchSampler
from singer.engine.checkpoints import Checkpoint, CheckpointStore, CorruptCheckpointError
from singer.engine.distributed import (
    PreemptionHandler,
    StoreBarrier,
    create_accelerator,
    is_output_registered,
    run_on_all_ranks,
    run_on_main,
)
from singer.engine.peer_monitor import monitor_peers
from singer.engine.run_dir import CHECKPOINTS, CONFIG, check_new, stale_tmp
from singer.engine.student import StudentTrainer
from singer.engine.trackers import check_trackers
from singer.engine.trainer import TeacherTokens, Trainer
from singer.errors import SharedError, SingerError, StoppedError
from singer.features.cache import TokenCache, weights_digest
from singer.methods import METHODS, Distiller
from singer.models.backbones import (
    RANDOM,
    Backbone,
    BlockTokens,
    check_activations,
    create_backbone,
    inspect_backbone,
)
from singer_kernels import resolve_backend

_logger = logging.getLogger("singer")

CALIBRATION_IMAGES = 2
"""Images on which a block's Jacobian is measured."""


@dataclass(frozen=True)
class RunResult:
    """The result of a run for one student.

    Attributes:
        folder: the student's output directory.
        method: the trained method, on its device.
        losses: each loss, averaged over the last tenth of the steps; empty except on the main rank.
        steps: optimiser steps, of the whole run.
        seconds: time in the training loop since the start or the resume.
        images_per_second: over all ranks, saving and logging included.
    """

    folder: Path
    method: Distiller
    losses: dict[str, float]
    steps: int
    seconds: float
    images_per_second: float


def check(
    config: Config,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    resume: bool = False,
    structures: dict[str, Backbone] | None = None,
) -> BatchLoader:
    """Check a configuration against the models' structures and the data, before any weight loads.

    Args:
        config: the run's configuration.
        process_index: rank of this process.
        num_processes: number of ranks.
        resume: the output directory may exist.
        structures: gets the models' structures, by their keys, for :func:`build_methods`.

    Returns:
        This rank's loader.

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
    check_trackers(config.train.trackers)
    structures = {} if structures is None else structures
    teacher = structures["teacher"] = inspect_backbone(
        config.teacher.name, config.image_size, "teacher", config.teacher.options
    )
    for key, model, _ in config.student_specs():
        student = structures[key] = inspect_backbone(
            model.name, config.image_size, key, model.options
        )
        METHODS[config.method.name].check(teacher, student, config.method.model_dump())
    return create_loader(config, process_index, num_processes)


def build_methods(
    config: Config,
    loader: BatchLoader,
    device: torch.device,
    structures: Mapping[str, Backbone] | None = None,
) -> list[Distiller]:
    """Load the teacher, create the students, and wrap each in the configured method.

    A student's initial weights depend on the seed alone, so that methods can be compared.

    Args:
        config: the run's configuration.
        loader: gives the calibration images of methods that measure the teacher.
        device: of the calibration and of the methods.
        structures: of the models, by their keys, as :func:`check` gives them.

    Returns:
        A method for each of ``config.student_specs()``; they share the teacher.

    Raises:
        SingerError: the backend can't run, or weights can't be loaded or are so large that tokens
            are not finite; or see the method.
    """
    structures = structures or {}
    backend = getattr(config.method, "backend", None)
    try:
        resolve_backend(backend, device)
    except (ValueError, RuntimeError) as error:
        key = "" if backend is None else "method."
        raise SingerError(f"{key}{error}") from error

    def load(key: str, model: ModelConfig) -> Backbone:
        # Again for each: loading weights draws fewer random numbers than initialising them.
        set_seed(config.train.seed)
        backbone = create_backbone(
            model.name,
            config.image_size,
            key,
            model.weights,
            model.options,
            model.weights_prefix,
            structures.get(key),
        )
        if config.data.normalization == "imagenet":
            backbone.set_normalization(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        return backbone

    teacher = load("teacher", config.teacher)
    teacher.model.to(device)
    images = loader.dataset.batch(range(CALIBRATION_IMAGES)).images.to(device)
    if config.teacher.weights != RANDOM:
        check_activations(teacher, images, "teacher")
    options = config.method.model_dump(exclude={"name"})
    methods = []
    for key, model, _ in config.student_specs():
        student = load(key, model)
        if model.weights != RANDOM:
            check_activations(student, images.to("cpu"), key)
        method = METHODS[config.method.name](
            teacher, student, images=images, seed=config.train.seed, **options
        )
        methods.append(method.to(device))
    # Last: blocks are linearised with their full-precision weights.
    precision = config.teacher.precision
    if precision == "bf16" or (precision == "auto" and config.train.precision == "bf16"):
        teacher.cast(torch.bfloat16)
    if config.train.compile:
        teacher.compile()
    return methods


def _teacher_tokens(
    config: Config,
    methods: list[Distiller],
    loader: BatchLoader,
    images_digest: str,
    accelerator: Accelerator,
    preemption: PreemptionHandler,
) -> TeacherTokens:
    """Return how to get the teacher's tokens: from the model, or from the cache, filled first."""
    teacher, dataset, device = methods[0].teacher, loader.dataset, accelerator.device
    layers = sorted({layer for method in methods for layer in method.teacher_layers})
    if config.teacher.cache is None:
        return lambda images, sample_ids: teacher.tokens(images, layers)

    def crops(indices: list[int]) -> Tensor:
        if preemption.signal is not None:  # complete shards stay
            raise StoppedError(preemption.signal, "while teacher.cache was filled", is_shared=False)
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

    fingerprint = {
        "teacher": config.teacher.name,
        "weights": weights_digest(teacher.model),
        "options": config.teacher.options,
        "normalization": [teacher.mean, teacher.std],
        "interpolation": config.data.interpolation,
        "image_size": config.image_size,
        "source": [config.data.source, config.data.split, config.data.image_key],
        "background": config.data.background,
        "decoding": DECODING,
        "layers": layers,
        "images": images_digest,
        "precision": [str(next(teacher.model.parameters()).dtype), config.train.precision],
    }
    with torch.no_grad(), accelerator.autocast():
        calls = teacher.tokens(crops([0]), layers).calls  # the same for every batch
    cache = TokenCache.open_or_build(
        Path(config.teacher.cache),
        fingerprint,
        len(dataset.source),
        compute,
        batch_size=loader.batch_sampler.local_batch_size // config.train.grad_accum_steps,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        wait=StoreBarrier(accelerator, preemption),
    )

    def read(images: Tensor, sample_ids: Tensor) -> BlockTokens:
        cached = cache.read([dataset.source_index(sample_id) for sample_id in sample_ids.tolist()])
        tokens = {layer: value.to(device, non_blocking=True) for layer, value in cached.items()}
        return BlockTokens(tokens, calls)

    return read


def source_digest(loader: BatchLoader) -> str:
    """Return the first 16 digits of a SHA-256 over the names of the images, in order."""
    source, digest = loader.dataset.source, hashlib.sha256()
    for index in range(len(source)):
        digest.update(f"{source.name(index)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


@run_on_main
def _step_to_resume(
    config: Config, store: CheckpointStore, fingerprint: Mapping[str, Any], force: bool
) -> int | None:
    """Return the step of the checkpoint to resume from; None: start from the beginning.

    Raises:
        SingerError: the directory holds something else, or a run with another configuration.
    """
    output = Path(config.output)
    if not output.exists():
        check_new(output)
        return None
    if not output.is_dir() or not os.access(output, os.W_OK):
        raise SingerError(f"output: {str(output)!r} is no writable folder")
    written = output / CONFIG
    if not written.exists():
        if set(output.iterdir()) - set(stale_tmp(output)):
            raise SingerError(
                f"output: {str(output)!r} is no run's output directory: it has no {CONFIG}"
            )
        return None
    try:
        before = load_config(written)
    except SingerError as error:
        raise SingerError(f"output: {written} is damaged ({error})") from error
    changed = differences(before, config)
    checkpoint = store.newest()
    if checkpoint is not None:
        if missing := {"position", "unreadable", "scaler"} - checkpoint.state.keys():
            raise SingerError(
                f"output: the checkpoint {store.path(checkpoint.step)} is of another version of "
                f"singer: it has no {', '.join(sorted(missing))}; start anew in another folder"
            )
        for key, value in fingerprint.items():
            saved = checkpoint.state.get(key)
            if saved != value:
                changed.append(f"{key}: {saved} → {value}")
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
    _logger.info(
        "going on after step %d, in epoch %d from its sample %d on",
        checkpoint.step,
        *checkpoint.state["position"],
    )
    return checkpoint.step


@run_on_all_ranks
def _read_checkpoint(store: CheckpointStore, step: int) -> Checkpoint:
    try:
        return store.read(step)
    except CorruptCheckpointError as error:
        raise SingerError(
            f"output: the checkpoint of step {step} can't be read here ({error}); with several "
            f"machines, the folder must be on a file system that they share"
        ) from error


def _seek(sampler: EpochBatchSampler, checkpoint: Checkpoint) -> None:
    """Go on from the samples that the checkpoint's run has seen, whatever its batch size was."""
    epoch, sample = checkpoint.state["position"]
    sampler.seek(epoch, offset=min(sample, sampler.epoch_size))


def train(
    config: Config, console: Console | None = None, *, resume: bool = False, force: bool = False
) -> list[RunResult]:
    """Distil the configured teacher into the configured students; write the output directory.

    It seeds the global random generators. Under a launcher (torchrun, accelerate launch) every
    process calls it. Processes that torchrun restarts resume by themselves; where a scheduler
    starts a new torchrun, pass ``resume`` from the first time on.

    Args:
        config: the run's configuration.
        console: shows the progress; None: standard error.
        resume: resume from the newest checkpoint in the output directory, if there is one.
        force: resume although the configuration, the images or the number of processes changed.

    Returns:
        For each student the trained method, its last losses and its speed.

    Raises:
        SingerError: the configuration, the weights or the data are invalid (nothing has been
            written then), a loss or a weight is no longer finite, too many images can't be read,
            or a file can't be written.
        StoppedError: a signal of ``STOP_SIGNALS`` came; the completed steps are saved.
    """
    accelerator = create_accelerator(config.train.precision)
    resume = resume or is_output_registered(config.output)
    console = console or Console(stderr=True)
    is_monitored = config.train.peer_monitor
    with PreemptionHandler() as preemption, monitor_peers(accelerator, preemption, is_monitored):
        return _train(config, accelerator, preemption, console, resume, force)


def _train(
    config: Config,
    accelerator: Accelerator,
    preemption: PreemptionHandler,
    console: Console,
    resume: bool,
    force: bool,
) -> list[RunResult]:
    rank, size = accelerator.process_index, accelerator.num_processes
    with preemption.stopping_at_once("before training began"):
        structures: dict[str, Backbone] = {}
        loader = run_on_all_ranks(check)(
            config,
            process_index=rank,
            num_processes=size,
            resume=resume,
            structures=structures,
        )
        store = CheckpointStore(Path(config.output, CHECKPOINTS), config.train.keep_checkpoints)
        fingerprint = {"processes": size, "images": source_digest(loader)}
        checkpoint = None
        if resume:
            step = _step_to_resume(config, store, fingerprint, force)
            if step is not None:
                checkpoint = _read_checkpoint(store, step)
        methods = run_on_all_ranks(build_methods)(config, loader, accelerator.device, structures)
    tokens = _teacher_tokens(
        config, methods, loader, fingerprint["images"], accelerator, preemption
    )
    set_seed(config.train.seed, device_specific=True)
    completed = 0 if checkpoint is None else checkpoint.step
    if checkpoint is not None:
        _seek(loader.batch_sampler, checkpoint)
    steps = config.train.steps or completed + loader.batch_sampler.steps_until(config.train.epochs)
    if checkpoint is not None and checkpoint.step > steps:
        raise SharedError(
            f"train.steps: got {steps} in all, but the run in {config.output!r} has done "
            f"{checkpoint.step}"
        )
    if completed == steps:
        _logger.info("all %d steps are done: nothing is left to train", steps)
    students = [
        StudentTrainer(spec, method, config, accelerator, steps)
        for spec, method in zip(config.student_specs(), methods, strict=True)
    ]
    trainer = Trainer(
        config,
        accelerator,
        students,
        tokens,
        loader,
        store,
        preemption,
        console,
        steps=steps,
        fingerprint=fingerprint,
        resumed=checkpoint,
        reopen=resume,
    )
    first = trainer.completed_steps
    seconds = trainer.run()
    num_images = (steps - first) * config.train.batch_size
    return [
        RunResult(
            folder=student.path,
            method=student.method,
            losses=_last_losses(student, steps),
            steps=steps,
            seconds=seconds,
            images_per_second=num_images / seconds,
        )
        for student in students
    ]


def _last_losses(student: StudentTrainer, steps: int) -> dict[str, float]:
    if student.run_dir is None:
        return {}
    records = student.run_dir.read_metrics()[-max(1, steps // 10) :]
    if not records:  # the file was deleted, and no step was left
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
