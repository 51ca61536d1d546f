"""Errors shown to users, and exit codes of the command line."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Sequence

EXIT_USER_ERROR = 2
EXIT_PEER_LOST = 70
"""Another rank of the run has died."""
EXIT_STOPPED = 75
"""A signal stopped the run; it is saved and can be resumed."""
EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP")
"""Ctrl-C; what schedulers and torchrun send; a limit of CPU time; a closed terminal."""


class SingerError(Exception):
    """An error that the user can fix; its one-line message says how.

    The command line prints the message and exits with code 2.
    """


class SharedError(SingerError):
    """Raised on every rank at the same point; only the main process prints it."""


class NonFiniteError(SharedError):
    """A loss or a weight is NaN or infinite."""


class StoppedError(Exception):
    """A signal stopped the run; the completed steps are saved, or the message says which are.

    The command line exits with code 75, or 130 for Ctrl-C.

    Args:
        signal: name of the signal.
        place: where the run stopped, for the message.
        is_shared: raised on every rank at the same point.
    """

    def __init__(self, signal: str, place: str, is_shared: bool = True) -> None:
        super().__init__(f"stopped by {signal} {place}")
        self.signal = signal
        self.is_shared = is_shared


DEBUG_VARIABLE = "SINGER_DEBUG"
"""Environment variable; if it is set, the command line prints tracebacks."""

DEBUG_HINT = f"{DEBUG_VARIABLE}=1 shows the traceback"

DEMO_EXTRA_HINT = 'install the demo extra: pip install "singer-kernels[demo]" (or ".[demo]")'


MAX_NAMES_SHOWN = 5


def first_names(names: Sequence[str], count: int | None = None) -> str:
    """Return the first names for a message, with ``, …`` if there are more.

    Args:
        names: all of them, or at least the first ``MAX_NAMES_SHOWN``.
        count: how many there are; None: ``len(names)``.
    """
    count = len(names) if count is None else count
    return ", ".join(names[:MAX_NAMES_SHOWN]) + (", …" if count > MAX_NAMES_SHOWN else "")


def is_exhaustion(error: BaseException) -> bool:
    """Return whether an error is about memory or the number of open files, not about its object."""
    exhausted = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
    is_about_files = isinstance(error, OSError) and error.errno in exhausted
    return is_about_files or isinstance(error, MemoryError)


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks; its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def typed_line(error: BaseException) -> str:
    """Return an error's type and message in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or an empty string."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
