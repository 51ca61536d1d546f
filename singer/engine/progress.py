"""What a run shows while it trains, and when it has ended."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

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


class _ImagesPerSecond(ProgressColumn):
    def __init__(self, images_per_step: int) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self.images_per_step = images_per_step

    def render(self, task: Task) -> Text:
        speed = task.speed or task.finished_speed
        return Text("" if speed is None else f"{speed * self.images_per_step:.1f} img/s")


class TrainingProgress:
    """A live bar: step, losses, images per second, time left.

    Args:
        console: where to show it; None: nowhere.
        steps: the whole run's.
        images_per_step: over all processes.
        done: steps that an earlier part of the run has done.
    """

    def __init__(
        self, console: Console | None, steps: int, images_per_step: int, done: int = 0
    ) -> None:
        self._progress = Progress(
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
            disable=console is None,
        )
        self._task = self._progress.add_task("train", total=steps, completed=done, losses="")

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def step(self) -> None:
        """Count one step."""
        self._progress.advance(self._task)

    def losses(self, losses: Mapping[str, float]) -> None:
        """Show the newest losses."""
        text = " ".join(f"{name} {value:.3g}" for name, value in losses.items())
        self._progress.update(self._task, losses=text)


def summary_table(title: str, rows: Mapping[str, str]) -> Table:
    """Return a table of two columns, for the end of a run.

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
