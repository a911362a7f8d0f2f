"""What commands that run a model share: options of a draft, of the cache and of arithmetic; the model in one line."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from realm_jax.cli import output
from realm_jax.cli.adapters import parse_adapter

if TYPE_CHECKING:
    from realm_jax.model import Model

Command = Callable[..., Any]

cache_dtype_option = click.option(
    "--cache-dtype",
    metavar="TYPE",
    default="float32",
    show_default=True,
    help="Of keys and values: float32, bfloat16, float16 or int8.",
)

arithmetic_option = click.option(
    "--arithmetic",
    metavar="TYPE",
    default="float",
    show_default=True,
    help="Of MODEL's products by packed weights: float, or int8 (activations of few rows as 8-bit integers).",
)


def draft_options(command: Command) -> Command:
    """Adds --draft, --draft-tokens, --draft-adaptive and --draft-adapter, named as the arguments of `generate`."""
    options = (
        click.option(
            "--draft",
            metavar="PATH|ngram|self:FORMAT",
            help="Speculative decoding: what proposes tokens, of which MODEL keeps those that are right. A model of "
            "the same vocabulary, what followed the last tokens before, or MODEL itself in a cheaper format "
            "(self:Q2_K; with only 3 of its layers: self:Q2_K:3).",
        ),
        click.option(
            "--draft-tokens", metavar="G", type=int, default=4, show_default=True, help="Tokens proposed a round."
        ),
        click.option("--draft-adaptive", is_flag=True, help="Propose fewer where fewer are accepted, at most G."),
        click.option(
            "--draft-adapter",
            metavar="PATH[:SCALE]",
            callback=lambda _context, _parameter, value: value and [parse_adapter(value)],
            help="LoRA adapter of the draft model.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def model_text(model: "Model") -> str:
    """Its file, architecture, size, and the formats that hold most of it: `Q4_K 80%, Q6_K 19%`."""
    import jax

    from realm_jax.quant.tensor import QuantizedTensor

    dense = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    sizes: dict[str, int] = {}
    for weight in jax.tree.leaves(model.params, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor)):
        name = weight.format if isinstance(weight, QuantizedTensor) else dense[weight.dtype.name]
        sizes[name] = sizes.get(name, 0) + weight.size
    total = sum(sizes.values())
    largest = sorted(sizes.items(), key=lambda item: -item[1])
    formats = ", ".join(f"{name} {size / total:.0%}" for name, size in largest if size >= total / 200)
    return f"{model.origin.source}: {model.config.architecture}, {output.count_text(total)} weights: {formats}"
