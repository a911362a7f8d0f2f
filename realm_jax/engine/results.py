"""The file of results: one JSON object a line, appended as requests end, so that a killed run loses none.

Of a run that was killed, whole lines count; a last line that was cut short is cut off and done again.
"""

import contextlib
import fcntl
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from realm_jax.engine.request_lines import Key, result_key
from realm_jax.errors import RealmError

FIRST_KEYS = ("id", "text", "tokens", "stop_reason", "error")
BEGINNING = b'{"id": '


class ResultsFile:
    """Open, and locked against other runs, until closed.

    done: the keys (see `Line.key`) of all results, and whether they are errors. appended, errors: counts of this run.
    overwrite: what the file has does not count. Nothing is changed before `begin`. Raises RealmError if the file cannot
    be written, belongs to a running process, or has lines that are no results.
    """

    def __init__(self, path: Path, overwrite: bool = False):
        self.path = path
        self.done: dict[Key, bool] = {}
        self.appended = self.errors = self._end = 0
        try:
            self._is_new = not path.exists()
            self._file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise RealmError(f"{path}: cannot be written: {error.strerror or error}") from None
        try:
            self._lock()
            if not overwrite:
                self._read()
        except BaseException:
            self._file.close()
            raise

    def begin(self) -> None:
        """Cut off what does not count, and be ready to append."""
        self._file.truncate(self._end)
        self._file.seek(self._end)

    def append(self, key: Key, result: Mapping[str, Any]) -> None:
        """One more result, handed to the system when this returns. Raises RealmError if it does not take it."""
        try:
            self._file.write(json.dumps(result).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise RealmError(f"{self.path}: cannot be written: {error.strerror or error}") from None
        self.done[key] = result["error"] is not None
        self.appended += 1
        self.errors += self.done[key]

    def __enter__(self) -> "ResultsFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_new and not self.appended:
            self.path.unlink(missing_ok=True)  # a run that came to nothing leaves nothing behind
        with contextlib.suppress(OSError):  # of a result that could not be written, which has been said
            self._file.close()

    def _lock(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            raise RealmError(f"{self.path}: is no regular file, which results need to be resumed: give another")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RealmError(f"{self.path}: another run writes to it: wait for that, or give another file") from None
        except OSError as error:
            raise RealmError(f"{self.path}: cannot be locked: {error.strerror or error}") from None

    def _read(self) -> None:
        for number, raw in enumerate(self._file, 1):
            result = _parse(raw)
            if not raw.endswith(b"\n") and (result is not None or _is_cut_short(raw)):
                return
            if result is None:
                raise RealmError(
                    f"{self.path}:{number}: not a result, so the file is left as it is: give another, or overwrite it"
                )
            self.done[result_key(result["id"], result.get("line", 0))] = result["error"] is not None
            self._end += len(raw)


def _parse(raw: bytes) -> dict[str, Any] | None:
    """The result in a line; None if there is none."""
    try:
        result = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(result, dict) or tuple(result)[: len(FIRST_KEYS)] != FIRST_KEYS:
        return None
    return result if result["id"] is None or isinstance(result["id"], str | int) else None


def _is_cut_short(raw: bytes) -> bool:
    """Whether a last line can be the beginning of a result; a whole object of some other kind is none."""
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return raw.startswith(BEGINNING) or BEGINNING.startswith(raw)
    return False
