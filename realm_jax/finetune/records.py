"""Data files to records, checked: what one document is, and where it stands. Knows no model.

A record is one of {"text": ...}, {"messages": [{"role": ..., "content": ...}, ...]} and {"prompt": ..., "completion":
...}; further keys are left alone.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realm_jax.errors import RealmError

FORMS = {"text": ("text",), "messages": ("messages",), "completion": ("prompt", "completion")}


@dataclass(frozen=True)
class Record:
    """form: a key of FORMS. content: has that form's keys. where: file and line, for messages."""

    form: str
    content: Mapping[str, Any]
    where: str


def read_records(path: Path, format: str = "auto", separator: str = "") -> list[Record]:
    """The documents of a file. format, separator: see `DataConfig`. Documents of white space alone in a text are none.

    Raises RealmError, one line with file and line, for what cannot be read or has no known form.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RealmError(f"{path}: cannot be read: {error.strerror or error}") from None
    if format == "jsonl" or (format == "auto" and path.suffix.lower() == ".jsonl"):
        records = list(_json_lines(raw, path))
    else:
        text = raw.decode("utf-8", "surrogateescape")  # bytes that are no UTF-8 stay, as tokenizers take them
        parts = text.split(separator) if separator else [text]
        records = [
            Record("text", {"text": part}, f"{path}: document {i}") for i, part in enumerate(parts, 1) if part.strip()
        ]
    if not records:
        raise RealmError(f"{path}: has no documents; want at least one")
    return records


def check_record(content: Any, where: str) -> Record:
    """The record, with its form. Raises RealmError, one line that begins with `where`."""
    if not isinstance(content, Mapping):
        raise RealmError(f"{where}: want an object, not {_kind(content)}")
    forms = [form for form, keys in FORMS.items() if any(key in content for key in keys)]
    if len(forms) != 1 or not all(key in content for key in FORMS[forms[0]]):
        known = " or ".join(" and ".join(json.dumps(key) for key in keys) for keys in FORMS.values())
        found = ", ".join(json.dumps(str(key)) for key in list(content)[:8]) or "no keys"
        raise RealmError(f"{where}: has {found}; want {known}, one of these forms")
    (form,) = forms
    if form == "messages":
        _check_messages(content["messages"], where)
    else:
        for key in FORMS[form]:
            if not isinstance(content[key], str):
                raise RealmError(f'{where}: "{key}" must be a string, not {_kind(content[key])}')
        if not content[FORMS[form][-1]]:
            raise RealmError(f'{where}: "{FORMS[form][-1]}" is empty; there is nothing to learn from')
    return Record(form, content, where)


def _json_lines(raw: bytes, path: Path) -> Iterator[Record]:
    for number, line in enumerate(raw.split(b"\n"), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            content = json.loads(line.decode("utf-8"))
        except json.JSONDecodeError as error:
            raise RealmError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
        except UnicodeDecodeError as error:
            raise RealmError(f"{where}: not UTF-8: byte {error.start + 1} of the line") from None
        except (ValueError, RecursionError) as error:
            raise RealmError(f"{where}: not JSON: {error}") from None
        yield check_record(content, where)


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise RealmError(f'{where}: "messages" must be a list of messages, not {_kind(messages)}')
    for i, message in enumerate(messages, 1):
        for key in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                raise RealmError(f'{where}: message {i} must be an object with "role" and "content", both strings')
    if not any(message["role"] == "assistant" for message in messages):
        raise RealmError(f'{where}: no message is of the role "assistant"; there is nothing to learn from')


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a string"}
    names |= {list: "a list", dict: "an object"}
    return f"an empty {type(value).__name__}" if value in ([], {}) else names.get(type(value), type(value).__name__)
