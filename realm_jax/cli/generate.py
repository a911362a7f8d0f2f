"""`realm generate`: a prompt in, text out, as it comes; then what ran and how fast."""

import itertools
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from realm_jax.cli import output
from realm_jax.cli.adapters import adapter_options, load_adapters
from realm_jax.cli.decoding import arithmetic_option, draft_options, model_text
from realm_jax.cli.options import common_options, file_argument, pre_option
from realm_jax.cli.text import one_line, read_stdin, visible
from realm_jax.errors import RequestError

if TYPE_CHECKING:
    from realm_jax.decode.completion import Completion, Speculative
    from realm_jax.gguf.tokenizer import Tokenizer
    from realm_jax.model import Model


def _parse_bias(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[int, float]:
    bias = {}
    for value in values:
        token, _, number = value.partition("=")
        try:
            bias[int(token)] = float(number)
        except ValueError:
            raise click.BadParameter(f"{value!r} is not ID=VALUE, as in 42=-5.5 or 42=-inf") from None
    return bias


@click.command(name="generate")
@file_argument("model", "[MODEL]", required=False)
@click.option("--prompt", required=True, metavar="TEXT", help='Text to go on with ("-": all of stdin).')
@click.option("--chat", is_flag=True, help="Take the prompt as a user's message, in the model's chat template.")
@click.option(
    "--max-new-tokens", metavar="N", type=click.IntRange(min=0), default=64, show_default=True, help="Tokens at most."
)
@click.option(
    "--temperature", metavar="T", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy."
)
@click.option(
    "--top-k", metavar="K", type=click.IntRange(min=0), default=0, help="Keep the K likeliest tokens (0: all)."
)
@click.option(
    "--top-p",
    metavar="P",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    help="Keep the likeliest tokens that together have probability P (1: all).",
)
@click.option(
    "--min-p",
    metavar="P",
    type=click.FloatRange(min=0, max=1),
    default=0.0,
    help="Keep tokens at least P times as likely as the likeliest (0: all).",
)
@click.option(
    "--repetition-penalty", metavar="X", type=float, default=1.0, help="Divides the logits of tokens seen (1: off)."
)
@click.option(
    "--presence-penalty", metavar="X", type=float, default=0.0, help="Taken off the logits of generated tokens."
)
@click.option("--frequency-penalty", metavar="X", type=float, default=0.0, help="The same, once for each occurrence.")
@click.option(
    "--logit-bias",
    multiple=True,
    callback=_parse_bias,
    metavar="ID=VALUE",
    help="Added to the logit of a token; -inf bans it. May be repeated.",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. May be repeated.")
@click.option("--seed", metavar="S", type=click.IntRange(min=0, max=2**64 - 1), default=0, help="Seed of the draws.")
@click.option(
    "--logprobs", metavar="N", type=click.IntRange(min=0), default=0, help="Report log-probabilities of N top tokens."
)
@draft_options
@arithmetic_option
@adapter_options
@pre_option
@common_options
def command(
    model: Path | None,
    prompt: str,
    chat: bool,
    adapter: list[tuple[Path, float]],
    skip_misfits: bool,
    arithmetic: str,
    pre: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Go on with a prompt. MODEL left out means the bundled model.

    The text goes to stdout as it comes; what ran and how fast goes to stderr. Text from stdin loses one line
    break at its end.
    """
    if prompt == "-":
        prompt = read_stdin().removesuffix("\n")
    from realm_jax.decode.generate import generate, stream
    from realm_jax.model import load

    started = time.perf_counter()
    with output.waiting("loading the model"):
        loaded = load(model, pre=pre).with_arithmetic(arithmetic)
        settings["adapter"] = load_adapters(loaded, adapter, skip_misfits)
    load_seconds = time.perf_counter() - started
    if chat:
        prompt = _as_chat(loaded, prompt)
    if as_json:
        (completion,) = generate(loaded, [prompt], parse_special=chat, **settings)
        output.print_json(_as_json(loaded, completion) | {"adapters": _named(adapter)})
        return
    pieces = stream(loaded, prompt, parse_special=chat, **settings)
    with output.waiting("compiling, reading the prompt"):
        first = next(pieces, "")
    for piece in itertools.chain([first], pieces):
        click.echo(visible(piece) if to_terminal() else piece, nl=False)
    click.echo()
    if pieces.completion.logprobs:
        output.console(sys.stderr).print(_logprob_table(loaded.tokenizer, pieces.completion))
    click.echo("\n" + _summary(loaded, pieces.completion, load_seconds, _named(adapter)), err=True)


def _named(adapters: list[tuple[Path, float]]) -> list[dict[str, Any]]:
    return [{"path": str(path), "scale": scale} for path, scale in adapters]


def to_terminal() -> bool:
    """Whether stdout is a terminal, which control characters must not reach."""
    return sys.stdout.isatty()


def _as_chat(model: "Model", message: str) -> str:
    """The prompt text of one user message."""
    from realm_jax.gguf.chat import chat_text

    if model.tokenizer is None or not model.tokenizer.chat_template:
        raise RequestError(f"{model.origin.source}: has no chat template for --chat: leave --chat out")
    return chat_text(model.tokenizer, [{"role": "user", "content": message}])


def _as_json(model: "Model", completion: "Completion") -> dict[str, Any]:
    stats = completion.stats
    result = {
        "text": completion.text,
        "tokens": completion.tokens,
        "prompt_tokens": completion.prompt_tokens,
        "tokens_per_second": stats.tokens_per_second,
        "stop_reason": completion.stop_reason,
        "speculative": stats.speculative and stats.speculative.as_dict(),
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
        "compile_seconds": stats.compile_seconds,
        "device": stats.device,
        "matmul": stats.matmul,
        "arithmetic": model.arithmetic,
        "model": model.origin.source,
    }
    if completion.logprobs is not None:
        piece = model.tokenizer.pieces
        result["logprobs"] = [
            {
                "token": entry.token,
                "piece": piece([entry.token])[0],
                "logprob": entry.logprob,
                "top": [{"token": t, "piece": piece([t])[0], "logprob": value} for t, value in entry.top],
            }
            for entry in completion.logprobs
        ]
    return result


def _speculative_text(ahead: "Speculative | None") -> str:
    """What speculation did, in one line; empty for none."""
    if ahead is None:
        return ""
    shares = ", ".join("-" if share is None else f"{share:.0%}" for share in ahead.by_position)
    text = (
        f"{ahead.draft}: {ahead.accepted} of {ahead.drafted} draft tokens accepted, {ahead.mean_accepted:.2f} a round "
        f"({shares} by position); {ahead.rounds} target forward passes for {ahead.tokens} tokens"
    )
    if ahead.gave_up:
        text += "; given up: at this acceptance the draft costs more than it saves"
    return text


def _logprob_table(tokenizer: "Tokenizer", completion: "Completion") -> Any:
    made = output.table("token", "logprob", "likeliest", numbers=("logprob",))
    for entry in completion.logprobs or ():
        top = ", ".join(f"{tokenizer.pieces([token])[0]!r} {value:.3f}" for token, value in entry.top)
        output.add_row(made, repr(tokenizer.pieces([entry.token])[0]), f"{entry.logprob:.3f}", top)
    return made


def _summary(model: "Model", completion: "Completion", load_seconds: float, adapters: list[dict[str, Any]]) -> str:
    """What ran and how fast, for a person."""
    stats = completion.stats
    reason = {"eos": "end of text", "stop": "stop string", "length": "length reached"}[completion.stop_reason]
    lines = {
        "speed": f"{len(completion.tokens)} tokens in {stats.decode_seconds:.2f} s: "
        f"{stats.tokens_per_second:.1f} tokens/s ({reason})",
        "before": f"{load_seconds:.2f} s to load, {stats.compile_seconds:.2f} s to compile, "
        f"{stats.prefill_seconds:.2f} s for {completion.prompt_tokens} prompt tokens",
        "model": model_text(model),
        "adapter": ", ".join(f"{a['path']} (scale {a['scale']:g})" for a in adapters),
        "draft": _speculative_text(stats.speculative),
        "ran on": f"{stats.device}, matmul: {stats.matmul}",
    }
    return "\n".join(one_line(f"  {name:9}{value}") for name, value in lines.items() if value)
