"""Options and arguments that several commands share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

Command = Callable[..., Any]


@dataclass
class Settings:
    """What holds for a whole run of the program; click hands it on as the object of every context."""

    debug: bool = False


def _remember_debug(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Settings).debug = True


def debug_option(command: Command) -> Command:
    """Adds --debug, which may stand before or after the name of the command."""
    return click.option(
        "--debug",
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_remember_debug,
        help="Show the traceback of an error.",
    )(command)


def common_options(command: Command) -> Command:
    """Adds what every command takes: --json (argument `as_json`) and --debug."""
    as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
    return as_json(debug_option(command))


def pre_option(command: Command) -> Command:
    """Adds --pre: a pre-tokenizer in place of the one that the file names."""
    return click.option(
        "--pre", metavar="NAME", help="Pre-tokenizer to use in place of the file's tokenizer.ggml.pre."
    )(command)


def file_argument(name: str, metavar: str, required: bool = True) -> Callable[[Command], Command]:
    """An argument that names a file; whether it can be read shows when it is opened."""
    return click.argument(name, metavar=metavar, required=required, type=click.Path(path_type=Path))
