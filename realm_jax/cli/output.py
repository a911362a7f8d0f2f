"""How commands show things: one JSON object, readable tables, progress bars. Every command uses it."""

import json
import math
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from realm_jax.cli.text import one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

WIDE = 10_000  # columns of a console that is no terminal: nothing is cut where a program reads


def print_json(value: Mapping[str, Any]) -> None:
    """Writes one JSON object on stdout: pure ASCII; numbers that JSON lacks are the strings NaN and [-]Infinity."""
    sys.stdout.write(json.dumps(_plain(value), allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def console(stream: IO[str]) -> "Console":
    """A rich console on stdout or stderr that takes text as it is: no markup, no emoji codes, no highlighting."""
    from rich.console import Console

    width = None if stream.isatty() else WIDE
    return Console(file=stream, width=width, markup=False, emoji=False, highlight=False)


def table(*columns: str, title: str | None = None, numbers: tuple[str, ...] = ()) -> "Table":
    """An empty table; the columns in `numbers` are set flush right. Fill it with `add_row`."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    for name in columns:
        made.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    return made


def add_row(made: "Table", *cells: Any) -> None:
    """Adds a row of cells, each as plain text on one line with control characters escaped."""
    from rich.text import Text

    made.add_row(*(Text(one_line(str(cell))) for cell in cells))


def progress() -> "Progress":
    """A progress bar on stderr, shown only where stderr is a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console(sys.stderr), disable=not sys.stderr.isatty(), transient=True)


def waiting(what: str) -> AbstractContextManager:
    """Shows that something goes on that cannot say how far it is, on stderr and only where that is a terminal."""
    return console(sys.stderr).status(one_line(what)) if sys.stderr.isatty() else nullcontext()


def size_text(count: int) -> str:
    """Bytes for people: 1234567 -> `1.23 MB` (powers of ten)."""
    return f"{_scaled(count)}B" if count >= 1000 else f"{count} B"


def count_text(count: int) -> str:
    """A large number for people: 1234567 -> `1.23 M`."""
    return _scaled(count).rstrip()


def _scaled(count: int) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 1000 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count} "
