"""Experiment trackers: those of Accelerate, chosen by name (``train.trackers``)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from singer.engine.run_dir import TENSORBOARD
from singer.errors import SingerError, did_you_mean, one_line, typed_line
from singer.io import writing

_logger = logging.getLogger("singer")

_PROJECT = "singer"
_RUN_NAME_OPTION = {"wandb": "name", "trackio": "name", "mlflow": "run_name"}


def check_trackers(names: Sequence[str]) -> None:
    """Check that all trackers are known and their packages installed.

    Raises:
        SingerError: one is not; the message names it.
    """
    installed = {tracker.value for tracker in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(map(repr, LOGGER_TYPE_TO_CLASS))
            hint = did_you_mean(name, LOGGER_TYPE_TO_CLASS)
            raise SingerError(f"train.trackers: got {name!r}, expected some of {known}{hint}")
        if name not in installed:
            raise SingerError(
                f"train.trackers: the package of {name!r} is not installed; install it "
                f"(pip install {name}), or take {name!r} out of train.trackers"
            )


class Trackers:
    """The trackers of a run. Main rank only.

    TensorBoard's events are in ``tensorboard/`` of the output directory; those of steps that a
    resumed run repeats are purged. Other trackers get a new run in the project ``singer``, unless
    an environment variable of theirs (``WANDB_RUN_ID``, ``MLFLOW_RUN_ID``) names an old one.

    Args:
        names: of Accelerate's trackers.
        output: the run's output directory.
        done: number of completed steps of a resumed run.
        config: the run's configuration, flat.

    Raises:
        SingerError: one can't be started.
    """

    def __init__(
        self, names: Sequence[str], output: Path, done: int, config: Mapping[str, Any]
    ) -> None:
        self._path = output / TENSORBOARD
        self._pending: dict[int, dict[str, float]] = {}
        self._trackers = {name: self._start(name, output, done, config) for name in names}

    def _start(
        self, name: str, output: Path, done: int, config: Mapping[str, Any]
    ) -> GeneralTracker:
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        options: dict[str, Any] = {}
        if tracker_class.requires_logging_directory:
            options["logging_dir"] = str(output)
        if name == "tensorboard":
            tracker = tracker_class(TENSORBOARD, **options, purge_step=done + 1)
            with self._naming(name):
                tracker.start()
            return tracker
        if name in _RUN_NAME_OPTION:
            options[_RUN_NAME_OPTION[name]] = output.name
        try:
            tracker = tracker_class(_PROJECT, **options)
            tracker.start()
            tracker.store_init_configuration(dict(config))
        except Exception as error:  # each package raises errors of its own
            raise SingerError(
                f"train.trackers: {name!r} can't be started: {typed_line(error)}"
            ) from error
        return tracker

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add scalars of a step; :meth:`write` sends them."""
        self._pending.setdefault(step, {}).update(values)

    def write(self) -> None:
        """Send the scalars that were added, in the order of the steps.

        Raises:
            SingerError: a tracker can't; the message names it.
        """
        pending, self._pending = self._pending, {}
        for name, tracker in self._trackers.items():
            with self._naming(name):
                for step, values in sorted(pending.items()):
                    tracker.log(values, step=step)

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Raise errors of a tracker as a SingerError that names it: each package has its own."""
        if name == "tensorboard":
            with writing(self._path):
                yield
            return
        try:
            yield
        except Exception as error:
            raise SingerError(f"train.trackers: {name!r}: {typed_line(error)}") from error

    def close(self) -> None:
        """Send what was added, and flush all trackers; a failure is only logged at this point."""
        try:
            self.write()
        except Exception as error:
            _logger.warning("%s", one_line(error))
        for name, tracker in self._trackers.items():
            try:
                with self._naming(name):
                    tracker.finish()
            except Exception as error:
                _logger.warning("%s", one_line(error))
