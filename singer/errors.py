"""Errors that a user can mend, and how the command line ends."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_USER_ERROR = 2
EXIT_PEER_LOST = 70
"""Another process of the run has died."""
EXIT_STOPPED = 75
"""A signal asked the run to stop; it has saved, and can be resumed."""
EXIT_INTERRUPTED = 130
"""As a shell reports a program that SIGINT ended."""


class SingerError(Exception):
    """A mistake in what the user gave; its one-line message says what to do.

    The command line prints the message and exits with code 2.
    """


class SharedError(SingerError):
    """One that every process of the run raises: it is enough that one of them shows it."""


class NonFiniteError(SharedError):
    """A loss or a weight is NaN or infinite."""


class StoppedError(Exception):
    """A signal asked the run to stop, and it has saved what it had.

    The command line exits with code 75, or 130 for Ctrl-C.

    Args:
        signal: its name.
        place: where the run was.
        is_shared: every process of the run raises it.
    """

    def __init__(self, signal: str, place: str, is_shared: bool = True) -> None:
        super().__init__(f"stopped by {signal} {place}")
        self.signal = signal
        self.is_shared = is_shared


DEMO_EXTRA_HINT = 'install the demo extra: pip install "singer-kernels[demo]" (or ".[demo]")'


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or an empty string."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
