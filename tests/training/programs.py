"""Processes that run a function of a test, without the seconds for the training layer's imports.

They are forked off a process that has imported it and done nothing else: Python's fork server.
"""

import contextlib
import multiprocessing
import os
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import torch

import singer

PACKAGE_ROOT = Path(singer.__file__).parents[1]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["singer.engine.run", "singer.cli", "torch.distributed"])


def _start_server():
    # Python looks first where it is started: there must lie the package that is tested.
    folder = os.getcwd()
    os.chdir(PACKAGE_ROOT)
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(folder)


def _run(function, arguments, environment, paths):
    for path, stream in zip(paths, (sys.stdout, sys.stderr), strict=True):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.exit(function(*arguments))


class Program:
    """A process that calls a function of a test's module and exits with what it returns.

    Args:
        folder: where its output is written.
        function: defined at the top level of a module.
        arguments: its arguments.
        environment: variables to add to those of the tests.
    """

    def __init__(self, folder, function, *arguments, **environment):
        _start_server()
        name = f"program-{time.monotonic_ns()}"
        self._paths = [folder / f"{name}.{stream}" for stream in ("stdout", "stderr")]
        environment = {**os.environ, **environment}
        self._process = _CONTEXT.Process(
            target=_run, args=(function, arguments, environment, self._paths)
        )
        self._process.start()
        self.pid = self._process.pid

    def wait(self, timeout=300):
        """Wait for its end; return its exit code: of a signal, its negative number."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"no end after {timeout} s"
        return self._process.exitcode

    @property
    def stdout(self):
        return self._paths[0].read_text(encoding="utf-8")

    @property
    def stderr(self):
        return self._paths[1].read_text(encoding="utf-8")

    def kill(self):
        self._process.kill()
        self._process.join()


@contextlib.contextmanager
def killed_at_exit(programs):
    """Kill programs that still run when the block is left."""
    try:
        yield
    finally:
        for program in programs:
            program.kill()
