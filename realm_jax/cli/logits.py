"""`realm logits`: the model's logits after every token, as a .npy file for other programs to read."""

import os
import tempfile
from pathlib import Path
from typing import IO

import click
import numpy as np

from realm_jax.cli import output
from realm_jax.cli.adapters import adapter_options, load_adapters
from realm_jax.cli.decoding import arithmetic_option
from realm_jax.cli.options import common_options, file_argument, pre_option
from realm_jax.errors import RealmError, RequestError


def _parse_tokens(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of token ids: write them as 1,2,3") from None


@click.command(name="logits")
@file_argument("model", "MODEL")
@click.option("--tokens", callback=_parse_tokens, metavar="1,2,3", help="Token ids to run; nothing is added.")
@click.option("--prompt", metavar="TEXT", help="Text to run; BOS and EOS are added by the file's own rules.")
@click.option("--out", required=True, metavar="FILE.npy", type=click.Path(path_type=Path), help="File to write.")
@arithmetic_option
@adapter_options
@pre_option
@common_options
def command(
    model: Path,
    tokens: list[int] | None,
    prompt: str | None,
    out: Path,
    arithmetic: str,
    adapter: list[tuple[Path, float]],
    skip_misfits: bool,
    pre: str | None,
    as_json: bool,
) -> None:
    """Write the logits after each of T tokens: float32, shape (T, vocabulary)."""
    if (tokens is None) == (prompt is None):
        raise click.UsageError("give either --tokens or --prompt")
    from realm_jax.logits import forward
    from realm_jax.model import load

    with output.waiting("loading the model"):
        loaded = load(model, pre=pre).with_arithmetic(arithmetic)
        adapters = load_adapters(loaded, adapter, skip_misfits)
    if tokens is None:
        if loaded.tokenizer is None:
            raise RequestError(f"{model}: has no tokenizer for --prompt: give --tokens")
        tokens = loaded.tokenizer.encode(prompt)
    _check_tokens(tokens, loaded.config.vocab_size)
    logits_TV = np.asarray(forward(loaded, np.asarray([tokens], np.int32), adapter=adapters)[0], np.float32)
    write_npy(out, logits_TV)
    if as_json:
        output.print_json(
            {"out": str(out), "tokens": tokens, "shape": logits_TV.shape, "arithmetic": loaded.arithmetic}
        )
    else:
        click.echo(f"{out}: float32 {logits_TV.shape}, {output.size_text(logits_TV.nbytes)}", err=True)


def _check_tokens(tokens: list[int], vocab_size: int) -> None:
    if not tokens:
        raise RequestError("there are no tokens to run: give at least one")
    for index, token in enumerate(tokens):
        if not 0 <= token < vocab_size:
            raise RequestError(f"token {index} has id {token}: the model's ids go from 0 to {vocab_size - 1}")


def write_npy(path: Path, array: np.ndarray) -> None:
    """Writes an array in numpy's format under exactly this name, which appears only when the file is complete.

    A name that stands for a device or a pipe is written to directly. Raises RealmError where that fails.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            with path.open("wb") as file:
                _write(file, array)
            return
        _replace(path.resolve(), array)
    except OSError as error:
        raise RealmError(f"{path}: cannot be written: {error.strerror or error}") from None


def _write(file: IO[bytes], array: np.ndarray) -> None:
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(np.ascontiguousarray(array).data)


def _replace(path: Path, array: np.ndarray) -> None:
    if path.is_dir():
        raise RealmError(f"{path}: is a folder: give the name of a file to write")
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:50]}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _write(file, array)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # what a plain open() would have given; mkstemp keeps the file to its owner
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
