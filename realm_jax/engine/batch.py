"""From request lines to results: feeds an engine, so that few requests wait in memory, and writes what comes out."""

from collections.abc import Callable, Iterable
from typing import Any

from realm_jax.engine.engine import Engine
from realm_jax.engine.request import Handle
from realm_jax.engine.request_lines import Line, make_request
from realm_jax.engine.results import ResultsFile
from realm_jax.errors import RealmError, RequestError

AHEAD = 4
"""Requests in the engine at once, for each slot. Priorities hold among these."""
LONGEST_ERROR = 2000


def serve(engine: Engine, lines: Iterable[Line], results: ResultsFile, on_step: Callable[[], None]) -> None:
    """Append a result for every line that has none. on_step: called after every step of the engine.

    Raises RealmError, or what else it was, if the engine breaks off; then no result is made up.
    """
    results.begin()
    todo = (line for line in lines if line.key not in results.done)
    open_lines: dict[Handle, Line] = {}
    more = True
    while more or open_lines:
        while more and len(open_lines) < AHEAD * engine.slots:
            line = next(todo, None)
            more = line is not None
            if more and (handle := _submit(engine, line, results)) is not None:
                open_lines[handle] = line
        engine.step()
        for handle in engine.take_finished():
            line = open_lines.pop(handle)
            results.append(line.key, _result(line, handle))
        on_step()


def _submit(engine: Engine, line: Line, results: ResultsFile) -> Handle | None:
    """The handle of a line's request; None, and a result that says why, if it cannot be served."""
    error = line.error
    if error is None:
        try:
            request = make_request(line, engine.model)
        except RealmError as wrong:
            error = str(wrong)
    if error is None:
        try:
            return engine.submit(request)
        except RequestError as wrong:
            error = str(wrong)
    results.append(line.key, _as_dict(line, "", [], None, error))
    return None


def _result(line: Line, handle: Handle) -> dict[str, Any]:
    if handle.error is not None:
        return _as_dict(line, handle.text, handle.tokens, "failed", str(handle.error))
    completion = handle.completion
    result = _as_dict(line, completion.text, completion.tokens, completion.stop_reason, None)
    ahead = completion.stats and completion.stats.speculative
    return result | ({"speculative": ahead.as_dict()} if ahead else {})


def _as_dict(line: Line, text: str, tokens: list[int], stop_reason: str | None, error: str | None) -> dict[str, Any]:
    """A result line. One whose id is another line's has no id, and says which line it is of."""
    if error is not None:
        error = " ".join(f"{line.where}: {error}".split())[:LONGEST_ERROR]
    result = {"id": line.id, "text": text, "tokens": tokens, "stop_reason": stop_reason, "error": error}
    return result | ({"line": line.number} if line.id is None else {})
