"""Typed configuration files: TOML tables and `--a.b=c` overrides read into frozen dataclasses, anything else refused.

A dataclass is the schema: its fields are the keys, their annotations the types (bool, int, float, str, Literal, a tuple
of them, `X | None`, a nested dataclass, a dict for keys that another class checks); an `Annotated` number carries its
range. Every message names the key, the source it came from and, for an unknown key, the nearest one that exists.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

T = TypeVar("T")
MAX_BYTES = 1 << 20  # a configuration is a page or two; anything larger is another file


class ConfigError(ValueError):
    """A configuration file or an override is wrong; the message names the source, the key and what was expected."""


@dataclass(frozen=True)
class Within:
    """The range of a number: `least` and `most` included; `above` and `below` excluded."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        limits = (("at least", self.least), ("at most", self.most), ("above", self.above), ("below", self.below))
        return " and ".join(f"{words} {limit:g}" for words, limit in limits if math.isfinite(limit))


Count = Annotated[int, Within(least=1)]
Natural = Annotated[int, Within(least=0)]
Positive = Annotated[float, Within(above=0, below=math.inf)]
Fraction = Annotated[float, Within(least=0, most=1)]


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError for a missing, oversized or malformed one."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path}: {path.stat().st_size:,} bytes are too many for a configuration file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def from_table(schema: type[T], table: Mapping[str, Any], source: str, overrides: Iterable[str] = ()) -> T:
    """Build the dataclass `schema` from a table and overrides (`"optimizer.lr=3e-4"`, later ones win).

    source: what the table was read from, as the messages should call it. Raises ConfigError.
    """
    table = _deep_copy(table)
    origins = {}
    for override in overrides:
        key, text = _split_override(override)
        _place(schema, table, key, text)
        origins[key] = f"--{override}"
    return _dataclass(schema, table, "", _Sources(source, origins))


def to_table(config: Any) -> dict[str, Any]:
    """The inverse: nested dicts of plain values, without the keys that are None (TOML has no null)."""
    values = ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
    table = {}
    for name, value in values:
        if dataclasses.is_dataclass(value):
            table[name] = to_table(value)
        elif value is not None:
            table[name] = list(value) if isinstance(value, tuple) else value
    return table


def dump_toml(table: Mapping[str, Any]) -> str:
    """A table of plain values, as `to_table` gives it, as TOML text that `read_toml` reads back."""
    return "\n".join(_toml_lines(table, "")) + "\n"


def _toml_lines(table: Mapping[str, Any], prefix: str) -> list[str]:
    """The table's values first, then its sub-tables under their headers."""
    lines = [f"{key} = {_toml_value(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{prefix}{key}]", *_toml_lines(value, f"{prefix}{key}.")]
    return lines


def _toml_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_value, value))}]"
    # JSON's strings, numbers and booleans are TOML's too.
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class _Sources:
    """Where each key's value came from: the file, or the override that set it."""

    file: str
    overrides: Mapping[str, str]

    def of(self, key: str) -> str:
        return self.overrides.get(key, self.file)

    def fail(self, key: str, expected: str, got: Any) -> typing.NoReturn:
        raise ConfigError(f"{self.of(key)}: {key}: expected {expected}, got {got!r} ({_kind(got)})")


def _kind(value: Any) -> str:
    names = {dict: "table", list: "array", str: "string", bool: "boolean", int: "integer", float: "float"}
    return names.get(type(value), type(value).__name__)


def _deep_copy(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _deep_copy(value) if isinstance(value, Mapping) else value for key, value in table.items()}


def _split_override(text: str) -> tuple[str, str]:
    key, equals, value = text.removeprefix("--").partition("=")
    if not equals or not key:
        raise ConfigError(f"{text}: expected an override of the form --section.key=value")
    return key, value


def _place(schema: type, table: dict[str, Any], key: str, text: str) -> None:
    """Put an override's value into the table, read as the schema's type asks."""
    parts = key.split(".")
    source = f"--{key}={text}"
    annotation: Any = schema
    for depth, name in enumerate(parts):
        if typing.get_origin(annotation) is dict:
            annotation = Any
        elif dataclasses.is_dataclass(annotation):
            here = parts[:depth]
            annotation = _hint(annotation, name, ".".join([*here, name]), source, _keys(annotation, here))
        else:
            raise ConfigError(f"{source}: {'.'.join(parts[:depth])}: expected a section, it is a value")
        if depth < len(parts) - 1:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                section = ".".join(parts[: depth + 1])
                raise ConfigError(f"{source}: {section}: expected a table in the file, got {table!r}")
    if _is_section(annotation):
        raise ConfigError(f"{source}: {key}: expected a value, it is a section")
    table[parts[-1]] = _parse(annotation, text, key, source)


def _is_section(annotation: Any) -> bool:
    return dataclasses.is_dataclass(annotation) or typing.get_origin(annotation) is dict


def _parse(annotation: Any, text: str, key: str, source: str) -> Any:
    """A command-line value: a bare word where a string can stand, else what TOML reads."""
    if text == "none" and _allows_none(annotation):
        return None
    if _is_text(annotation):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if annotation is Any:
            return text
        raise ConfigError(f"{source}: {key}: expected {_expected(annotation)}, got {text!r}") from error


def _keys(schema: type, sections: Iterable[str]) -> list[str]:
    prefix = "".join(f"{section}." for section in sections)
    return [prefix + field.name for field in dataclasses.fields(schema)]


def _hint(schema: type, name: str, key: str, source: str, known: list[str]) -> Any:
    """The annotation of field `name`; unknown names are refused with the nearest known key."""
    hints = typing.get_type_hints(schema, include_extras=True)
    if name in hints and name in {field.name for field in dataclasses.fields(schema)}:
        return hints[name]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    advice = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    raise ConfigError(f"{source}: {key}: unknown key; {advice}")


def _dataclass(schema: type[T], table: Mapping[str, Any], prefix: str, sources: _Sources) -> T:
    if not isinstance(table, Mapping):
        sources.fail(prefix.rstrip("."), "a table", table)
    sections = prefix.split(".")[:-1]
    values = {}
    for name, value in table.items():
        key = prefix + name
        annotation = _hint(schema, name, key, sources.of(key), _keys(schema, sections))
        values[name] = _value(annotation, value, key, sources)
    for field in dataclasses.fields(schema):
        nested = typing.get_type_hints(schema, include_extras=True)[field.name]
        if field.name in values or field.default is not dataclasses.MISSING:
            continue
        if dataclasses.is_dataclass(nested):
            values[field.name] = _dataclass(nested, {}, f"{prefix}{field.name}.", sources)
        elif field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{sources.file}: {prefix}{field.name}: missing; expected {_expected(nested)}")
    try:
        return schema(**values)
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{sources.file}: {prefix.rstrip('.') or 'configuration'}: {error}") from error


def _value(annotation: Any, value: Any, key: str, sources: _Sources) -> Any:
    """`value` as the annotation asks, checked."""
    if dataclasses.is_dataclass(annotation):
        return _dataclass(annotation, value, f"{key}.", sources)
    if typing.get_origin(annotation) is dict:
        if not isinstance(value, Mapping):
            sources.fail(key, "a table", value)
        return dict(value)
    kind, limits = _unwrap(annotation)
    if value is None and _allows_none(annotation):
        return None
    kind, inner_limits = _unwrap(_without_none(kind))
    limits = limits or inner_limits
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        if not isinstance(value, list):
            sources.fail(key, _expected(annotation), value)
        return tuple(_value(element, item, key, sources) for item in value)
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind) or isinstance(value, bool):
            sources.fail(key, _expected(annotation), value)
        return value
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (limits is not None and value not in limits):
        sources.fail(key, _expected(annotation), value)
    return value


def _unwrap(annotation: Any) -> tuple[Any, Within | None]:
    if typing.get_origin(annotation) is Annotated:
        kind, *extras = typing.get_args(annotation)
        return kind, next((extra for extra in extras if isinstance(extra, Within)), None)
    return annotation, None


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _allows_none(annotation: Any) -> bool:
    kind, _ = _unwrap(annotation)
    return _is_union(kind) and type(None) in typing.get_args(kind)


def _without_none(annotation: Any) -> Any:
    if not _is_union(annotation):
        return annotation
    (kind,) = (arg for arg in typing.get_args(annotation) if arg is not type(None))
    return kind


def _is_text(annotation: Any) -> bool:
    kind, _ = _unwrap(_without_none(_unwrap(annotation)[0]))
    return kind is str or typing.get_origin(kind) is Literal


def _expected(annotation: Any) -> str:
    """A type in words: "an integer at least 1", "one of 'cosine', 'constant'"."""
    kind, limits = _unwrap(annotation)
    optional = " (or leave the key out)" if _allows_none(annotation) else ""
    kind, inner_limits = _unwrap(_without_none(kind))
    limits = limits or inner_limits
    if typing.get_origin(kind) is tuple:
        return f"an array, each element {_expected(typing.get_args(kind)[0])}{optional}"
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(kind)))}{optional}"
    words = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}[kind]
    return f"{words} {limits}{optional}" if limits else words + optional
