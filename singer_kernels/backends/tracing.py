"""What torch.compile is to call while it traces, and not to trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant_while_tracing(function: Function) -> Function:
    """Mark a function that torch.compile is to call once, and keep the answer of.

    ``torch.compiler.assume_constant_result`` sets the same mark, but would import the compiler now.
    """
    # mypy knows of no such attribute of a function.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
