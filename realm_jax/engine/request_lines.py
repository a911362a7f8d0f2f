"""A file of requests, one JSON object a line, to lines with an id each, and to requests. Knows no engine.

A line is read, checked and forgotten; only the ids stay in memory. What is wrong with a line is said in its `error`
and stops no other line.
"""

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from realm_jax.engine.request import Request
from realm_jax.errors import RealmError, RequestError
from realm_jax.gguf.chat import chat_text
from realm_jax.model.model import Model

KEYS = ("messages", *(f.name for f in dataclasses.fields(Request) if f.name not in ("on_text", "logprobs")))
"""What a line may have: the fields of `Request` that JSON can hold, and messages in place of a prompt."""

Key = str | int | tuple[str, int]


@dataclass(frozen=True)
class Line:
    """where: file and line, for messages. id: its own, or the number of the line; None if another line has it.

    fields: those of a request, None if there is an error.
    """

    where: str
    number: int
    id: str | int | None
    fields: dict[str, Any] | None
    error: str | None = None

    @property
    def key(self) -> Key:
        """What tells its result from all others."""
        return result_key(self.id, self.number)


def result_key(id: str | int | None, number: int) -> Key:
    """See `Line.key`."""
    return ("line", number) if id is None else id


def open_requests(path: Path | None) -> IO[bytes]:
    """The file of requests, to be read more than once; None: all of stdin. Raises RealmError if it cannot be read."""
    try:
        file = sys.stdin.buffer if path is None else path.open("rb")
        if path is not None and file.seekable():
            return file
        spool = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
        shutil.copyfileobj(file, spool)
        return spool
    except OSError as error:
        raise RealmError(f"{path or 'stdin'}: cannot be read: {error.strerror or error}") from None


def read_lines(file: IO[bytes], name: str) -> Iterator[Line]:
    """All lines from the beginning but blank ones. name: of the file, for messages."""
    first: dict[str | int, int] = {}
    file.seek(0)
    for number, raw in enumerate(file, 1):
        if not raw.strip():
            continue
        fields, error = _parse(raw, number)
        id = fields.pop("id", None) if fields else None
        if id is None:
            id = number
        elif isinstance(id, bool) or not isinstance(id, str | int):
            id, error = number, f"id is {id!r}; it must be a string or a whole number"
        if id in first:
            error, id = f"id {id!r} is that of line {first[id]} already; give another one", None
        else:
            first[id] = number
        yield Line(f"{name}:{number}", number, id, None if error else fields, error)


def _parse(raw: bytes, number: int) -> tuple[dict[str, Any] | None, str | None]:
    """The object in a line, and what is wrong with it."""
    try:
        fields = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
    except json.JSONDecodeError as error:
        return None, f"not JSON: {error.msg} at column {error.colno}"
    except UnicodeDecodeError as error:
        return None, f"not UTF-8: byte {error.start + 1} of the line"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {error}"
    if not isinstance(fields, dict):
        return None, f"a request is an object, and this is of type {type(fields).__name__}"
    unknown = next((key for key in fields if key not in KEYS), None)
    if unknown is not None:
        return fields, f"unknown key {unknown!r}; known: {', '.join(KEYS)}"
    if ("prompt" in fields) == ("messages" in fields):
        return fields, 'want either "prompt" or "messages"'
    return fields, None


def make_request(line: Line, model: Model) -> Request:
    """The request of a line without error. Raises RealmError for messages that make no prompt, or a bias of no tokens.

    All other values are for the engine to check.
    """
    fields = dict(line.fields)
    if "messages" in fields:
        fields["prompt"] = _chat(fields.pop("messages"), model)
        fields.setdefault("parse_special", True)
    if isinstance(fields.get("logit_bias"), dict):
        fields["logit_bias"] = {_token(key): value for key, value in fields["logit_bias"].items()}
    return Request(**fields, id=line.id)


def _chat(messages: Any, model: Model) -> str:
    if model.tokenizer is None:
        raise RequestError("messages need a chat template, and the model has no tokenizer: give a prompt of token ids")
    if messages == []:
        raise RequestError("messages is empty; at least one is needed")
    return chat_text(model.tokenizer, messages)


def _token(key: str) -> int:
    try:
        return int(key)
    except ValueError:
        raise RequestError(f'logit_bias has the key {key!r}; it must be a token id, as in {{"42": -5.5}}') from None
