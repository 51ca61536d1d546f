"""Configuration section of a method, derived from its constructor."""

from __future__ import annotations

import functools
import inspect
import typing
from typing import Any

from pydantic import BaseModel, create_model

from singer.errors import SingerError
from singer.methods.base import Distiller

_RUN_ARGUMENTS = ("teacher", "student", "layers", "images", "seed")
"""Constructor arguments that the run passes to every method; the rest are options."""


def _parameters(method: type[Distiller]) -> dict[str, tuple[Any, Any]]:
    """Return each parameter's type hint and default; ``**kwargs`` stand for the parent's."""
    collected: dict[str, tuple[Any, Any]] = {}
    for owner in method.__mro__:
        constructor = vars(owner).get("__init__")
        if constructor is None:
            continue
        hints = typing.get_type_hints(constructor, include_extras=True)
        _, *parameters = inspect.signature(constructor).parameters.values()
        kinds = {parameter.kind for parameter in parameters}
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                hint = hints.get(parameter.name, parameter.empty)
                collected.setdefault(parameter.name, (hint, parameter.default))
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return collected


@functools.cache
def derive_options(name: str, method: type[Distiller], base: type[BaseModel]) -> type[BaseModel]:
    """Make the section of a method: its constructor's options, with their types and defaults.

    Options are all parameters but ``teacher``, ``student``, ``images`` and ``seed``. Where a
    constructor takes ``**kwargs``, its parent's parameters are options, too. A hint such as
    ``Annotated[float, pydantic.Field(gt=0)]`` bounds a value.

    Args:
        name: the method's key in ``METHODS``.
        method: the class; one without ``__init__`` has its parent's options.
        base: the section to extend; it has ``name`` and ``layers``.

    Returns:
        A subclass of ``base``; the same one at every call.

    Raises:
        SingerError: it is no method, or an option has no type hint or one that can't be checked.
    """
    what = f"method {name!r}: {getattr(method, '__name__', method)}"
    if not (isinstance(method, type) and issubclass(method, Distiller)):
        raise SingerError(f"{what} is no subclass of singer.methods.Distiller")
    try:
        parameters = _parameters(method)
    except NameError as error:  # a hint imported for type checkers alone
        raise SingerError(f"{what} has a type hint that can't be read: {error}") from error
    for argument in _RUN_ARGUMENTS:
        if argument not in parameters:
            raise SingerError(
                f"{what} takes no {argument!r}; let its __init__ take **kwargs and hand them on"
            )
    fields: dict[str, Any] = {"name": (typing.Literal[name], name)}
    for key, (hint, default) in parameters.items():
        if key == "layers":
            hint = base.model_fields["layers"].annotation
        elif key in _RUN_ARGUMENTS:
            continue
        elif key in fields or hint is inspect.Parameter.empty:
            reason = "is taken: rename it" if key in fields else "has no type hint"
            raise SingerError(f"{what}: its option {key!r} {reason}")
        fields[key] = (hint, ... if default is inspect.Parameter.empty else default)
    try:
        return create_model(f"{method.__name__}Config", __base__=base, **fields)
    except Exception as error:  # pydantic refuses a type or a name in several ways
        reason = str(error).splitlines()[0]
        raise SingerError(f"{what}: its options can't be checked: {reason}") from error
