"""Progress bar, throughput, and the summary of a run."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

T = TypeVar("T")


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory in bytes: allocated on a CUDA device, else resident; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.name != "posix":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class Throughput:
    """Measures speed, time spent waiting for data, and memory, on the host alone.

    Args:
        batch_size: images per optimiser step, over all ranks.
        device: of this rank.
    """

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.batch_size = batch_size
        self.device = device
        self.start(0)

    def start(self, step: int) -> None:
        """Begin an interval after a completed step."""
        self._step = step
        self._started = time.perf_counter()
        self._waited = 0.0

    def wait_for(self, batches: Iterator[T]) -> T:
        """Return the next batch; count the time until it is there."""
        started = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - started
        return batch

    def read(self, step: int) -> dict[str, float]:
        """Return the figures of the interval up to a completed step, and begin the next one.

        Returns:
            ``train/images_per_second``; ``train/data_seconds``, waited per step; and
            ``train/peak_memory_gib``, since the process started. Nothing without a step.
        """
        steps, seconds = step - self._step, time.perf_counter() - self._started
        waited = self._waited
        self.start(step)
        if steps < 1:
            return {}
        values = {
            "train/images_per_second": steps * self.batch_size / seconds,
            "train/data_seconds": waited / steps,
        }
        peak = peak_memory(self.device)
        return values if peak is None else {**values, "train/peak_memory_gib": peak / 2**30}


class _ImagesPerSecond(ProgressColumn):
    def __init__(self, images_per_step: int) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self.images_per_step = images_per_step

    def render(self, task: Task) -> Text:
        speed = task.speed or task.finished_speed
        return Text("" if speed is None else f"{speed * self.images_per_step:.1f} img/s")


class TrainingProgress(Progress):
    """A progress bar: step, losses, images per second, time left.

    A console that is no terminal (a file, a pipe) gets lines of text instead.

    Args:
        console: shows it; None: not shown.
        steps: number of optimiser steps of the whole run.
        images_per_step: over all ranks.
        done: number of completed steps of a resumed run.
    """

    def __init__(
        self, console: Console | None, steps: int, images_per_step: int, done: int = 0
    ) -> None:
        is_live = console is not None and (
            # Not is_terminal alone: FORCE_COLOR makes it true of a file.
            (console.is_terminal and not console.is_dumb_terminal and console.file.isatty())
            or console.is_jupyter
        )
        super().__init__(
            TextColumn("step"),
            MofNCompleteColumn(
                table_column=Column(no_wrap=True, min_width=2 * len(str(steps)) + 1)
            ),
            BarColumn(bar_width=12),
            TextColumn(
                "{task.fields[losses]}", table_column=Column(no_wrap=True, overflow="ellipsis")
            ),
            _ImagesPerSecond(images_per_step),
            TimeRemainingColumn(compact=True),
            console=console or Console(quiet=True),
            disable=not is_live,
        )
        self._text_console = None if is_live else console
        self._steps = steps
        self._training = self.add_task("train", total=steps, completed=done, losses="")

    def __exit__(self, *error: Any) -> None:
        """Remove the bar; a terminal that was closed is no error."""
        with suppress(OSError):
            super().__exit__(*error)

    def step(self) -> None:
        """Advance by one step."""
        self.advance(self._training)

    def losses(self, losses: Mapping[str, float]) -> None:
        """Show the newest losses."""
        self.update(self._training, losses=_losses_text(losses))

    def print_line(self, step: int, losses: Mapping[str, float], images_per_second: float) -> None:
        """Print a step's losses in a line, where there is no progress bar."""
        if self._text_console is not None:  # rich flushes it
            line = f"step {step}/{self._steps}  {_losses_text(losses)}"
            with suppress(OSError, SystemExit):  # rich exits where a pipe's reader has gone
                self._text_console.print(
                    f"{line}  {images_per_second:.1f} img/s",
                    soft_wrap=True,
                    markup=False,
                    highlight=False,
                )


def _losses_text(losses: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.3g}" for name, value in losses.items())


def summary_table(title: str, rows: Mapping[str, str]) -> Table:
    """Return a table of names and values, for the end of a run.

    Args:
        title: above the table.
        rows: name to value.
    """
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))  # not markup: a path may hold brackets
    return table
