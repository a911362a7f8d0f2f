"""`realm perplexity`: how well a model predicts a text, and how far it is from a reference model."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from realm_jax.cli import output
from realm_jax.cli.adapters import adapter_options, load_adapters
from realm_jax.cli.decoding import arithmetic_option
from realm_jax.cli.divergence import divergence_json, divergence_rows
from realm_jax.cli.options import common_options, file_argument, pre_option
from realm_jax.cli.text import read_text_file

if TYPE_CHECKING:
    from realm_jax.evaluate import Divergence, Perplexity

DEFAULT_CONTEXT = 512  # llama.cpp's


@click.command(name="perplexity")
@file_argument("model", "MODEL")
@file_argument("textfile", "TEXTFILE")
@click.option(
    "--context",
    metavar="N",
    type=click.IntRange(min=3),
    help=f"Tokens a chunk; the second half is scored. Default: {DEFAULT_CONTEXT}, or the model's own if that is less.",
)
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    metavar="MODEL2",
    help="Model to compare with: KL divergence and how often both put the same token first.",
)
@click.option(
    "--cache-dtype",
    metavar="TYPE",
    help="Read keys and values from a cache of this type, as decoding does: float32, bfloat16, float16 or int8 "
    "(default: no cache). With MODEL itself as --reference, which has none, the divergence is its cost.",
)
@click.option(
    "--batch",
    metavar="N",
    type=click.IntRange(min=1),
    help="Chunks to run at once (default: as memory allows, up to 8).",
)
@arithmetic_option
@adapter_options
@pre_option
@common_options
def command(
    model: Path,
    textfile: Path,
    context: int | None,
    reference: Path | None,
    cache_dtype: str | None,
    batch: int | None,
    arithmetic: str,
    adapter: list[tuple[Path, float]],
    skip_misfits: bool,
    pre: str | None,
    as_json: bool,
) -> None:
    """Measure the perplexity of TEXTFILE, in llama.cpp's way.

    The text is cut into chunks of --context tokens; a line break at its very end is left out, as llama.cpp does.
    Needs at least two chunks. Adapters and --arithmetic act on MODEL, not on the --reference: where both are the same
    file, the divergence is what they change. Here int8 is for all tokens, not for few rows alone.
    """
    text = read_text_file(textfile).removesuffix("\n")
    from realm_jax.evaluate import Divergence, Perplexity, score, text_chunks
    from realm_jax.model import load

    with output.waiting("loading the model"):
        loaded = load(model, pre=pre).with_arithmetic(arithmetic)
        adapters = load_adapters(loaded, adapter, skip_misfits)
    context = context or min(DEFAULT_CONTEXT, loaded.config.context_length)
    if context > loaded.config.context_length:
        click.echo(
            f"warning: the model is made for {loaded.config.context_length} tokens, --context is {context}", err=True
        )
    chunks = text_chunks(loaded, text, context)
    with output.waiting("loading the reference"):
        compared = load(reference, pre=pre) if reference else None
    started = time.perf_counter()
    with output.progress() as bar:
        task = bar.add_task("chunks", total=len(chunks))
        scores = score(
            loaded,
            chunks,
            adapter=adapters,
            reference=compared,
            cache_dtype=cache_dtype,
            batch=batch,
            on_chunks=lambda count: bar.advance(task, count),
        )
    seconds = time.perf_counter() - started
    own = Perplexity.of(scores.nll)
    divergence = Divergence.of(scores) if compared else None
    facts = {"tokens": scores.nll.size, "chunks": len(chunks), "context": context, "seconds": seconds}
    facts |= {"cache_dtype": cache_dtype, "arithmetic": loaded.arithmetic}
    if as_json:
        output.print_json(_as_json(own, divergence) | facts)
    else:
        _show(own, divergence, facts)


def _as_json(own: "Perplexity", divergence: "Divergence | None") -> dict[str, Any]:
    result = {"perplexity": own.perplexity, "perplexity_error": own.error, "nll": own.nll.mean}
    result["nll_error"] = own.nll.error
    return result if divergence is None else result | divergence_json(divergence)


def _show(own: "Perplexity", divergence: "Divergence | None", facts: dict[str, Any]) -> None:
    made = output.table("measure", "value", "error", numbers=("value", "error"))
    output.add_row(made, "perplexity", f"{own.perplexity:.4f}", f"{own.error:.4f}")
    for row in divergence_rows(divergence) if divergence else ():
        output.add_row(made, *row)
    output.console(sys.stdout).print(made)
    speed = facts["chunks"] * facts["context"] / facts["seconds"]
    click.echo(
        f"{facts['tokens']} tokens scored in {facts['chunks']} chunks of {facts['context']}; "
        f"{facts['seconds']:.1f} s, {speed:.0f} tokens/s",
        err=True,
    )
