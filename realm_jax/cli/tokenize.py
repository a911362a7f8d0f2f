"""`realm tokenize`: a model's tokens of a text. Needs no JAX; the file may be a vocabulary alone."""

import sys
from pathlib import Path

import click

from realm_jax.cli import output
from realm_jax.cli.options import common_options, file_argument, pre_option
from realm_jax.cli.text import read_stdin
from realm_jax.gguf.reader import open_gguf
from realm_jax.gguf.tokenizer import Tokenizer


# A text may begin with a dash: what is no option of this command is taken as it stands.
@click.command(name="tokenize", context_settings={"ignore_unknown_options": True})
@file_argument("model", "MODEL")
@click.argument("text")
@click.option("--no-special", is_flag=True, help="Add no BOS and no EOS.")
@click.option("--parse-special", is_flag=True, help="Let text that looks like a special token become it.")
@pre_option
@common_options
def command(model: Path, text: str, no_special: bool, parse_special: bool, pre: str | None, as_json: bool) -> None:
    """Show the token ids and pieces of TEXT ("-": all of stdin, as it stands).

    BOS and EOS are added by the file's own rules.
    """
    text = read_stdin() if text == "-" else text
    with open_gguf(model) as gguf:
        tokenizer = Tokenizer.from_metadata(gguf.metadata, pre=pre, source=gguf.path.name)
    ids = tokenizer.encode(text, special=not no_special, parse_special=parse_special)
    pieces = tokenizer.pieces(ids)
    if as_json:
        output.print_json({"ids": ids, "pieces": pieces})
        return
    made = output.table("id", "piece", numbers=("id",))
    for token, piece in zip(ids, pieces, strict=True):
        output.add_row(made, token, piece)
    screen = output.console(sys.stdout)
    screen.print(made)
    screen.print(f"{len(ids)} tokens")
