"""Output that can't be written: of a closed terminal, a pipe without reader, a full disk."""

import io
import os
import pty
import signal

import pytest
import yaml
from interrupted_runs import saved_steps
from programs import Program
from rich.console import Console

from singer.cli import main
from singer.config.schema import parse_config
from singer.engine.progress import TrainingProgress
from singer.engine.trainer import Trainer


def main_that_loses_its_output(kind, name, arguments):
    """Run with an output that is closed at step 2, and is sent a signal at step 3."""
    reader, writer = pty.openpty() if kind == "terminal" else os.pipe()
    if kind == "disk":
        os.close(writer)
        writer = os.open("/dev/full", os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(writer, descriptor)
    original = Trainer._step

    def step(self, number, batches):
        if number == 2:
            os.close(reader)
        if number == 3 and name:
            os.kill(os.getpid(), getattr(signal, name))
        return original(self, number, batches)

    Trainer._step = step
    return main(arguments)


@pytest.mark.parametrize(
    ("kind", "name", "code", "saved"),
    [
        ("terminal", "SIGHUP", 75, 3),
        pytest.param("terminal", None, 0, 6, marks=pytest.mark.slow),
        ("pipe", None, 0, 6),
        pytest.param("pipe", "SIGINT", 130, 3, marks=pytest.mark.slow),
        pytest.param("disk", "SIGTERM", 75, 3, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_loses_its_output_goes_on(tmp_path, values, kind, name, code, saved):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    arguments = ["distill", "--config", str(path), "train.log_every=1"]
    program = Program(tmp_path, main_that_loses_its_output, kind, name, arguments)
    assert program.wait(120) == code
    assert saved_steps(parse_config(values))[-1] == saved


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_console_of_the_caller_may_fail_as_well(is_terminal, monkeypatch):
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # rich would turn pytest's output off

    class Lost(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

        def isatty(self):
            return is_terminal

    file = Lost()
    console = Console(file=io.StringIO(), force_terminal=is_terminal)
    with TrainingProgress(console, 2, 4) as progress:
        console.file = file
        progress.step()
        progress.print_line(1, {"loss": 1.0}, 1.0)


def test_a_file_gets_lines_even_with_colours_forced(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = Console(file=io.StringIO())
    assert console.is_terminal
    with TrainingProgress(console, 2, 4) as progress:
        progress.step()
        progress.print_line(1, {"loss": 1.0}, 1.0)
    assert console.file.getvalue() == "step 1/2  loss 1  1.0 img/s\n"
