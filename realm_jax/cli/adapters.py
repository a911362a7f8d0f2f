"""--adapter, which several commands share: what it looks like, and how the files it names come to a model."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from realm_jax.cli.text import one_line

if TYPE_CHECKING:
    from realm_jax.lora import Adapter
    from realm_jax.model import Model

Command = Callable[..., Any]


def parse_adapter(value: str) -> tuple[Path, float]:
    """`PATH[:SCALE]` as path and scale. A name that is there as a whole is a path, whatever follows its last colon."""
    path, colon, number = value.rpartition(":")
    if not colon or not path or Path(value).exists():
        return Path(value), 1.0
    try:
        scale = float(number)
    except ValueError:
        return Path(value), 1.0
    if not math.isfinite(scale):
        raise click.BadParameter(f"the scale in {value!r} must be a finite number")
    return Path(path), scale


def adapter_options(command: Command) -> Command:
    """Adds --adapter (argument `adapter`: pairs of path and scale) and --skip-misfits."""
    adapter = click.option(
        "--adapter",
        multiple=True,
        metavar="PATH[:SCALE]",
        callback=lambda _context, _parameter, values: [parse_adapter(value) for value in values],
        help="LoRA adapter (PEFT directory or GGUF) and its scale, 1 if left out. May be repeated: all act together.",
    )
    return adapter(skip_option(command))


def skip_option(command: Command) -> Command:
    """Adds --skip-misfits."""
    return click.option(
        "--skip-misfits",
        is_flag=True,
        help="Leave out what does not fit of an adapter, and say so, in place of an error.",
    )(command)


def load_adapters(
    model: "Model", named: Sequence[tuple[Path, float]], skip_misfits: bool
) -> "list[tuple[Adapter, float]] | None":
    """The adapters fitted to the model, with their scales; None for none. What was left out is said on stderr."""
    from realm_jax.lora import load_adapter

    loaded = [(load_adapter(path, model, strict=not skip_misfits), scale) for path, scale in named]
    for adapter, _ in loaded:
        report_skipped(adapter)
    return loaded or None


def report_skipped(adapter: "Adapter") -> None:
    """Says on stderr what a lenient load left out."""
    for line in adapter.skipped:
        click.echo(one_line(f"warning: {adapter.source}: left out: {line}"), err=True)
