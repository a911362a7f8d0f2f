"""`realm bench`: how fast a model runs on this machine."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from realm_jax.cli import output
from realm_jax.cli.decoding import arithmetic_option, cache_dtype_option
from realm_jax.cli.options import common_options, file_argument

if TYPE_CHECKING:
    from realm_jax.model import Model
    from realm_jax.speed import Timing

PROMPT_TOKENS = 512


@click.command(name="bench")
@file_argument("model", "[MODEL]", required=False)
@click.option(
    "--batch",
    "batches",
    metavar="N",
    multiple=True,
    default=(1,),
    show_default=True,
    type=click.IntRange(min=1),
    help="Rows at once; given more than once, each is measured.",
)
@click.option(
    "--prompt-tokens",
    metavar="N",
    type=click.IntRange(min=1),
    help=f"Default: {PROMPT_TOKENS}, or what the model's context leaves beside the new ones.",
)
@click.option("--new-tokens", metavar="N", default=128, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--repeats", metavar="N", default=5, show_default=True, type=click.IntRange(min=1), help="Medians are over so many."
)
@cache_dtype_option
@arithmetic_option
@click.option(
    "--dtype",
    metavar="TYPE",
    default="float32",
    show_default=True,
    help="Of the activations between products: float32, bfloat16 or float16.",
)
@common_options
def command(
    model: Path | None,
    batches: tuple[int, ...],
    prompt_tokens: int | None,
    new_tokens: int,
    repeats: int,
    cache_dtype: str,
    arithmetic: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Measure how many tokens a second MODEL (the bundled one where left out) takes in and makes.

    Prefill is prompts of --prompt-tokens into an empty cache; decoding is --new-tokens greedy steps after such a
    prompt, in one call of the loop. Compiling is not part of either. "Of the floor" sets the time of a decoding step
    against the least in which this device can read its weights, keys and values, by a read of memory timed in the same
    run.
    """
    from realm_jax import speed
    from realm_jax.model import load

    with output.waiting("loading the model"):
        loaded = load(model).with_arithmetic(arithmetic)
    prompt_tokens = prompt_tokens or max(1, min(PROMPT_TOKENS, loaded.config.context_length - new_tokens - 1))
    options = {"cache_dtype": cache_dtype, "dtype": dtype}
    speed.check_request(loaded, prompt_tokens, new_tokens, **options)
    ceiling = speed.read_ceiling()
    results = []
    with output.progress() as bar:
        task = bar.add_task("batch sizes", total=len(batches))
        for batch in batches:
            prefill = speed.time_prefill(loaded, batch, prompt_tokens, repeats, **options)
            decode = speed.time_decode(loaded, batch, prompt_tokens, new_tokens, repeats, **options)
            step_bytes = speed.step_bytes(loaded, batch, prompt_tokens, new_tokens, cache_dtype)
            floor = step_bytes / ceiling * new_tokens
            results.append({
                "batch": batch, "prefill": _timing(prefill), "decode": _timing(decode), "step_bytes": step_bytes,
                "share_of_floor": floor / decode.median,
            })  # fmt: skip
            bar.advance(task)
    facts = _facts(loaded) | options | {
        "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats,
        "read_bytes_per_second": ceiling, "results": results,
    }  # fmt: skip
    if as_json:
        output.print_json(facts)
    else:
        _show(facts)


def _timing(timing: "Timing") -> dict[str, Any]:
    return {
        "tokens_per_second": timing.tokens_per_second,
        "seconds": list(timing.seconds),
        "compile_seconds": timing.compile_seconds,
    }


def _facts(model: "Model") -> dict[str, Any]:
    """What ran, and on what."""
    import jax

    from realm_jax import speed

    return {
        "model": model.origin.source,
        "formats": speed.formats(model.params),
        "arithmetic": model.arithmetic,
        "weight_bytes": speed.weight_bytes(model.params),
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "versions": {name: version(name) for name in ("realm-jax", "jax", "jaxlib")},
    }


def _show(facts: dict[str, Any]) -> None:
    columns = ("batch", "prefill, tokens/s", "decode, tokens/s", "step, ms", "of the floor", "compile, s")
    made = output.table(*columns, numbers=columns)
    for one in facts["results"]:
        step = one["batch"] / one["decode"]["tokens_per_second"]
        compiling = one["prefill"]["compile_seconds"] + one["decode"]["compile_seconds"]
        output.add_row(
            made, one["batch"], f"{one['prefill']['tokens_per_second']:,.0f}",
            f"{one['decode']['tokens_per_second']:,.1f}", f"{1e3 * step:.2f}", f"{one['share_of_floor']:.1%}",
            f"{compiling:.1f}",
        )  # fmt: skip
    output.console(sys.stdout).print(made)
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    click.echo(
        f"{facts['model']}: a step reads {output.size_text(facts['weight_bytes'])} of weights; {facts['device']} reads "
        f"{facts['read_bytes_per_second'] / 1e9:,.1f} GB/s; {versions}",
        err=True,
    )
