"""Typed configs: TOML plus `key=value` overrides to one frozen dataclass, and back to TOML.

Called by the experiment command, by `realm finetune`, and by `Run`, which keeps a copy of the config.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from realm_jax.errors import RealmError

T = TypeVar("T")


def load_config(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """A config of dataclass `cls` from a TOML file and `key=value` overrides.

    Keys are dotted for nested dataclasses (`optimizer.steps=100`). A value is read as TOML; where it is not
    TOML it is taken as a plain string. Without a path the dataclass' own defaults are the start.

    Raises RealmError: unreadable or broken file, unknown or missing key, a value of the wrong type.
    """
    source, table = str(cls.__name__), {}
    if path is not None:
        source, table = str(path), read_toml(Path(path))
    for override in overrides:
        _merge(table, _parse_override(override))
    return _build(cls, table, source, "")


def dump_toml(config: Any) -> str:
    """The config as TOML text that `load_config` reads back to an equal config; None values are left out."""
    return "\n".join(_toml_lines(dataclasses.asdict(config), "")).lstrip("\n") + "\n"


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises RealmError where it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RealmError(f"{path}: cannot read the config: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RealmError(f"{path}: not a TOML file: {error}") from error


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys."""
    flat = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not key:
        raise RealmError(f"--set {text!r}: want key=value, for example optimizer.steps=100")
    for candidate in (value, json.dumps(value, ensure_ascii=False)):
        try:
            table = tomllib.loads(f"{key} = {candidate}")
        except tomllib.TOMLDecodeError:
            continue
        if "\n" not in candidate:
            return table
    raise RealmError(f"--set {text!r}: {key!r} is not a config key; want key=value with a dotted key")


def _merge(table: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(table.get(key), dict):
            _merge(table[key], value)
        else:
            table[key] = value


def _build(cls: type[T], table: Mapping[str, Any], source: str, prefix: str, default: T | None = None) -> T:
    """The dataclass `cls` from a table: keys left out come from `default`, else from the class' own defaults.

    `prefix` is the dotted path of the table in the file.
    """
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in table:
        if key not in known:
            raise RealmError(f"{source}: unknown key {prefix + key!r}; known keys here: {', '.join(known)}")
    values = {}
    for name, field in known.items():
        hint, key = hints[name], prefix + name
        standard = _field_default(field) if default is None else getattr(default, name)
        if dataclasses.is_dataclass(hint) and isinstance(table.get(name, {}), Mapping):
            known_default = None if standard is dataclasses.MISSING else standard
            values[name] = _build(hint, table.get(name, {}), source, key + ".", known_default)
        elif name in table:
            values[name] = _convert(hint, table[name], source, key)
        elif standard is dataclasses.MISSING:
            raise RealmError(f"{source}: missing key {key!r} ({_type_name(hint)})")
        else:
            values[name] = standard
    try:
        return cls(**values)
    except RealmError as error:
        raise RealmError(f"{source}: {error}") from error


def _field_default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _convert(hint: Any, value: Any, source: str, key: str) -> Any:
    """`value` as the type `hint`, element by element; integers serve as floats, lists as tuples."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):  # inside a list, a table or an optional
        return _build(hint, value, source, key + ".")
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _convert(option, value, source, key)
            except RealmError as error:
                if len([arg for arg in args if arg is not type(None)]) == 1 and option is not type(None):
                    raise error
    elif origin is Literal:
        if value in args and type(value) in {type(arg) for arg in args}:
            return value
    elif origin is tuple and isinstance(value, list):
        element_hints = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(element_hints) == len(value):
            pairs = enumerate(zip(element_hints, value, strict=True))
            return tuple(_convert(element, item, source, f"{key}[{i}]") for i, (element, item) in pairs)
    elif origin is dict and isinstance(value, Mapping):
        return {name: _convert(args[1], item, source, f"{key}.{name}") for name, item in value.items()}
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint in (int, bool, str) and type(value) is hint:
        return value
    raise RealmError(f"{source}: {key!r} must be {_type_name(hint)}, not {value!r}")


def _type_name(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return f"a table of {', '.join(field.name for field in dataclasses.fields(hint))}"
    if origin is Literal:
        return "one of " + ", ".join(json.dumps(arg) for arg in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in args if arg is not type(None))
    if origin is tuple:
        count = "" if args[-1] is Ellipsis else f"{len(args)} times "
        return f"a list of {count}{_type_name(args[0])}"
    if origin is dict:
        return f"a table of {_type_name(args[1])}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string", Path: "a path (a string)"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _toml_lines(table: Mapping[str, Any], prefix: str) -> Iterator[str]:
    nested = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    for key, value in table.items():
        if key not in nested and value is not None:
            yield f"{_toml_key(key)} = {_toml_value(value)}"
    for key, value in nested.items():
        yield f"\n[{prefix}{_toml_key(key)}]"
        yield from _toml_lines(value, f"{prefix}{_toml_key(key)}.")


def _toml_key(key: str) -> str:
    bare = key.isascii() and key.replace("_", "a").replace("-", "a").isalnum()
    return key if bare else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, Mapping):  # a table inside a list
        pairs = (f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value.items() if item is not None)
        return "{" + ", ".join(pairs) + "}"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
