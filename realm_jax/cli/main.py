"""The command group and the one place where errors become a line on stderr and an exit status.

0: done. 1: the work could not be done. 2: wrong usage. 130: interrupted.
"""

import contextlib
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import click

from realm_jax.cli.options import Settings, debug_option
from realm_jax.cli.text import one_line
from realm_jax.errors import RealmError

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130


def _print_version(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if not value:
        return
    from importlib.metadata import version

    import jax

    devices = jax.devices()
    click.echo(f"realm_jax {version('realm-jax')}")
    click.echo(f"jax       {jax.__version__}")
    click.echo(f"device    {devices[0].device_kind} x {len(devices)} ({jax.default_backend()})")
    context.exit()


class Commands(click.Group):
    """Loads the module of a command when it is asked for; each has a click command named `command`."""

    NAMES = (
        "batch",
        "bench",
        "convert-adapter",
        "finetune",
        "generate",
        "inspect",
        "logits",
        "merge",
        "perplexity",
        "quantize",
        "tokenize",
    )

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.NAMES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.NAMES:
            return None
        return importlib.import_module(f"realm_jax.cli.{cmd_name.replace('-', '_')}").command


@click.command(cls=Commands, context_settings={"max_content_width": 100})
@debug_option
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Show the versions in use and the device.",
)
def realm() -> None:
    """Run, inspect and measure GGUF models with their weights packed, in JAX.

    Errors are one line on stderr and exit status 1; wrong usage is exit status 2.
    """


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `realm`: runs `args` (those of the process where None) and exits."""
    sys.exit(run(sys.argv[1:] if args is None else args))


def run(args: Sequence[str]) -> int:
    """Runs one command line and returns its exit status; no exception leaves it."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # characters that the terminal's encoding lacks are escaped, never an error
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger("realm_jax").addHandler(logging.NullHandler())  # commands say themselves what it would
    settings = Settings()
    try:
        with realm.make_context("realm", list(args), obj=settings) as context:
            realm.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as stop:
        return _flushed(stop.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return WRONG_USAGE
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "realm"
        return _report(f"{error.format_message()} (see: {path} --help)", WRONG_USAGE)
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:  # whoever read stdout has seen enough
        _drop_stdout()
        return FAILED
    except Exception as error:
        if settings.debug:
            traceback.print_exc()
        return _flushed(_report(describe(error), FAILED))


def describe(error: Exception) -> str:
    """One line for a person: a RealmError's own message, what the system said, or the type and first line."""
    if isinstance(error, RealmError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, MemoryError):
        first = first or "not enough memory"
    return f"{type(error).__name__}: {first} (--debug shows where)"


def _report(message: str, status: int) -> int:
    with contextlib.suppress(OSError):  # a closed stderr changes nothing about the status
        click.echo(f"error: {one_line(message, 2000)}", err=True)
    return status


def _flushed(status: int) -> int:
    """Flushes what help or a failed command left in stdout, and drops it where stdout takes no more."""
    try:
        sys.stdout.flush()
    except OSError:
        _drop_stdout()
    return status


def _drop_stdout() -> None:
    """Points stdout at nothing, so that Python's own flush at exit has nothing to complain about."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
