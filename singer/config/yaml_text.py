"""YAML whose unquoted scalars keep their text, for keys that hold text."""

from __future__ import annotations

import collections.abc
import itertools
import math
import os
import re
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TextIO, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

from singer.errors import typed_line

_MERGE_TAG = "tag:yaml.org,2002:merge"


class Plain(str):
    """Text as written, and what YAML reads in it.

    Args:
        text: as written.
        value: what YAML reads.
    """

    value: Any

    def __new__(cls, text: str, value: Any) -> Plain:  # noqa: D102
        plain = super().__new__(cls, text)
        plain.value = value
        return plain


class _Loader(yaml.SafeLoader):
    """Reads an unquoted scalar as :class:`Plain`; refuses a key that stands twice."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
        try:
            value = super().construct_object(node, True)  # an alias to what holds it is refused
        except Exception:  # of 2024-02-30, 0x_, =, <<, too many digits: no value, but a text
            if not is_plain or node.tag != self.resolve(type(node), node.value, (True, False)):
                raise
            del self.recursive_objects[node]
            value = node.value
        return Plain(node.value, value) if is_plain else value

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_TAG:
                if key.value in keys:
                    raise yaml.composer.ComposerError(
                        None, None, f"found the key {key.value!r} twice", key.start_mark
                    )
                keys.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes what :class:`_Loader` would not read as the same text."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds some line breaks in single quotes.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)

# YAML 1.1 takes 1e3 and 3e-4 for text.
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")
for _grammar in (_Loader, _Dumper):
    _grammar.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def load_yaml(source: str | TextIO) -> Any:
    """Read YAML; unquoted scalars are :class:`Plain`.

    Raises:
        yaml.YAMLError: it is no YAML, or a key stands twice.
    """
    try:
        return yaml.load(source, _Loader)
    except (ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise yaml.YAMLError(typed_line(error)) from error  # of !!int x, !!bool x, [[[[...


def dump_yaml(values: Any) -> str:
    """Return YAML that :func:`load_yaml` and :func:`resolve` read back equal."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def parse_override(text: str) -> Plain:
    """Return an override's value: its text, and what it is for a key that holds no text."""
    try:
        value = load_yaml(text)
    except yaml.YAMLError:
        return Plain(text, text)
    stripped = text.strip()
    if isinstance(value, Plain):
        return Plain(text, value.value if value == stripped else text)
    is_comment = value is None and stripped
    is_block_list = isinstance(value, list) and not stripped.startswith("[")
    return Plain(text, text if is_comment or is_block_list else value)


def _members(hint: Any) -> list[Any]:
    """Return the types of a union, or the one type; those of a literal's values."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _members(get_args(hint)[0])
    if origin in (Union, UnionType):
        return [member for inner in get_args(hint) for member in _members(inner)]
    return [type(value) for value in get_args(hint)] if origin is Literal else [hint]


def _is_text(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, (str, os.PathLike))


def _is_container(member: Any) -> bool:
    origin = get_origin(member) or member
    kinds = (collections.abc.Collection, BaseModel)
    return isinstance(origin, type) and issubclass(origin, kinds) and not _is_text(member)


def _takes_as_written(plain: Plain, members: list[Any]) -> bool:
    if plain.value is None and (NoneType in members or not plain):
        return False
    others = [member for member in members if not _is_text(member) and member is not NoneType]
    if len(others) == len(members) or not all(map(_is_container, others)):
        return False
    kinds = [get_origin(member) or member for member in others]
    are_mappings = [issubclass(kind, (collections.abc.Mapping, BaseModel)) for kind in kinds]
    if isinstance(plain.value, dict):
        return not any(are_mappings)
    return not isinstance(plain.value, list) or all(are_mappings)


def resolve(value: Any, hint: Any) -> Any:
    """Replace every :class:`Plain` by its text where a type takes text, else by its value.

    Args:
        value: of :func:`load_yaml` or :func:`parse_override`; what else it holds stays.
        hint: the type; a :class:`Section` in it resolves its own fields.
    """
    members = _members(hint)
    if isinstance(value, Plain):
        return str(value) if _takes_as_written(value, members) else resolve(value.value, hint)
    inner = [get_args(member) for member in members if _is_container(member) and get_args(member)]
    if isinstance(value, list):
        hints = [each for each in (inner[0] if inner else ()) if each is not Ellipsis] or [Any]
        return [resolve(each, of) for each, of in zip(value, itertools.cycle(hints), strict=False)]
    if isinstance(value, dict):
        models = [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]
        if not models:
            of = inner[0][-1] if inner else Any
            return {str(key): resolve(each, of) for key, each in value.items()}
        if not issubclass(models[0], Section):
            return _resolve_fields(models[0], value)
    return value


def _resolve_fields(model: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    hints = {name: field.annotation for name, field in model.model_fields.items()}
    return {str(key): resolve(value, hints.get(key, Any)) for key, value in values.items()}


class Section(BaseModel):
    """A section of a configuration, which may hold :class:`Plain` values."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, values: Any) -> Any:
        return _resolve_fields(cls, values) if isinstance(values, dict) else values
