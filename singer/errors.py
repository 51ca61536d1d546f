"""Errors that a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SingerError(Exception):
    """A mistake in what the user gave; its one-line message says what to do.

    The command line prints the message and exits with code 2.
    """


class NonFiniteError(SingerError):
    """A loss or a weight is NaN or infinite."""


DEMO_EXTRA_HINT = 'install the demo extra: pip install "singer-kernels[demo]" (or ".[demo]")'


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or an empty string."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
