"""Figures of a run, as PNG files.

In every function ``images`` are ``[B, 3, H, W]``, uint8; ``tokens`` holds the patches of each
source by its name, ``[B, P, D]``; ``grid`` is (rows, columns) of patches, P = rows · columns; and
``path`` is the PNG file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from singer.io import atomic_write, writing

_SETUP = ("step", "epoch", "lr")
_LOG_FLOOR = 1e-8
"""Smaller singular values are drawn there."""


def _save(figure: Figure, path: Path) -> None:
    with writing(path):
        path.parent.mkdir(exist_ok=True)
    with writing(path), atomic_write(path) as tmp_path:
        figure.savefig(tmp_path, dpi=120, format="png")


def plot_losses(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot every loss of the records of ``metrics.jsonl`` against the step, and its mean."""
    names = [name for name in records[0] if name not in _SETUP]
    steps = [record["step"] for record in records]
    figure = Figure(figsize=(3.2 * len(names), 2.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        values = torch.tensor([float(record[name]) for record in records])
        marker = "." if len(steps) < 3 else None  # a line needs two points
        axes.plot(steps, values, color="0.75", linewidth=0.8, marker=marker)
        window = max(1, len(values) // 20)
        means = values.unfold(0, window, 1).mean(dim=1)
        axes.plot(steps[window - 1 :], means, color="C0")
        axes.set(title=name, xlabel="step")
        if (values > 0).all():
            axes.set_yscale("log")
    _save(figure, path)


def plot_spectra(spectra: Mapping[str, tuple[Tensor, Tensor]], path: Path) -> None:
    """Plot the singular values of each linearised block, and those behind the adapter.

    Args:
        spectra: title to all singular values ``[D]``, descending, and the chosen ones, ascending.
        path: the PNG file.
    """
    figure = Figure(figsize=(4.2 * len(spectra), 3), layout="constrained")
    panels = figure.subplots(1, len(spectra), squeeze=False)[0]
    for axes, (title, (values, chosen)) in zip(panels, spectra.items(), strict=True):
        axes.semilogy(values.clamp_min(_LOG_FLOOR), color="0.5", label="all")
        positions = [int((values - value).abs().argmin()) for value in chosen]
        axes.semilogy(positions, chosen.clamp_min(_LOG_FLOOR), ".", color="C3", label="adapter")
        axes.set(title=title, xlabel="index", ylabel="singular value")
        axes.legend()
    _save(figure, path)


def pca_rgb(tokens: Mapping[str, Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
    """Return the patches' projections on three principal components as colours.

    The components and the scale are those of the first source, all images together, so that one
    colour means the same everywhere.

    Returns:
        Name to ``[B, rows, columns, 3]`` in [0, 1].
    """
    first = next(iter(tokens.values())).float().flatten(0, 1)
    mean = first.mean(dim=0)
    _, _, directions = torch.linalg.svd(first - mean, full_matrices=False)
    directions = directions[:3]
    # A singular vector's sign is arbitrary; make its largest entry positive.
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    directions = directions * largest.sign()
    spread = (first - mean) @ directions.T
    low, high = spread.quantile(0.02, dim=0), spread.quantile(0.98, dim=0)
    colours = {}
    for name, patches in tokens.items():
        projected = (patches.float() - mean) @ directions.T
        scaled = (projected - low) / (high - low).clamp_min(1e-12)
        colours[name] = scaled.clamp(0, 1).unflatten(1, grid)
    return colours


def _image_grid(
    images: Tensor,
    columns: Mapping[str, Tensor],
    path: Path,
    colour_map: str | None = None,
    label: str = "",
) -> None:
    """Draw the images in the first column, then one column of panels per source.

    With a colour map, the panels of a row share one scale, drawn beside them.
    """
    count = images.shape[0]
    figure = Figure(figsize=(2.1 * (len(columns) + 1), 2.1 * count), layout="constrained")
    panels = figure.subplots(count, len(columns) + 1, squeeze=False)
    for row in range(count):
        panels[row][0].imshow(images[row].permute(1, 2, 0).numpy())
        shown = torch.stack([values[row] for values in columns.values()])
        limits = {"vmin": shown.min().item(), "vmax": shown.max().item()} if colour_map else {}
        for axes, values in zip(panels[row][1:], shown, strict=True):
            drawn = axes.imshow(values.numpy(), cmap=colour_map, **limits)
        if colour_map is not None:
            figure.colorbar(drawn, ax=panels[row].tolist(), shrink=0.8, label=label)
    for axes, name in zip(panels[0], ("image", *columns), strict=True):
        axes.set_title(name)
    for axes in panels.flat:
        axes.set_axis_off()
    _save(figure, path)


def plot_norm_maps(
    images: Tensor, tokens: Mapping[str, Tensor], grid: tuple[int, int], path: Path
) -> None:
    """Draw each patch's norm, as a multiple of its image's median."""
    maps = {}
    for name, patches in tokens.items():
        norms = torch.linalg.vector_norm(patches.float(), dim=-1)
        maps[name] = (norms / norms.median(dim=1, keepdim=True).values).unflatten(1, grid)
    _image_grid(images, maps, path, "magma", "norm / median")


def plot_pca_maps(
    images: Tensor, tokens: Mapping[str, Tensor], grid: tuple[int, int], path: Path
) -> None:
    """Draw the patches, all of one width, in the first source's principal components as RGB."""
    _image_grid(images, pca_rgb(tokens, grid), path)


def plot_gram_matrices(images: Tensor, tokens: Mapping[str, Tensor], path: Path) -> None:
    """Draw the cosine similarity of every pair of patches."""
    rows = {name: torch.nn.functional.normalize(t.float(), dim=-1) for name, t in tokens.items()}
    grams = {name: unit @ unit.mT for name, unit in rows.items()}
    _image_grid(images, grams, path, "viridis", "cosine")
