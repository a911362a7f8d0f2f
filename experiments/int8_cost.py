"""What int8 arithmetic costs: KL divergence from the same packed weights in float arithmetic, for several formats.

    python experiments/int8_cost.py [CONFIG] [--set KEY=VALUE ...]

Every matrix of the subject gets one format; "own" is the model's file as it is. All products by packed weights, of
every token, round their activations (`kernels.reference.int8_steps`): decoding, with a prompt that is read so too. What
the format costs by itself, in float arithmetic against the float32 model, stands beside it. results.md has the table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from quant_setup import (
    Subject,
    SubjectConfig,
    TextConfig,
    known_formats,
    make_subject,
    metrics_of,
    pure_formats,
    score_model,
    with_error,
)
from realm_jax.errors import RealmError
from realm_jax.evaluate import Divergence, score
from realm_jax.experiment import Run, experiment_command, read_json
from realm_jax.experiment.report import describe_run, markdown_table
from realm_jax.model import Model, load
from realm_jax.quant import DENSE_FORMATS
from realm_jax.quantizer import quantize_model

OWN = "own"
Line = dict[str, Any]
HEADER = (
    "format", "KL of int8", "KL, 99%", "same top token", "perplexity, float", "perplexity, int8", "KL of the format"
)  # fmt: skip


@dataclass(frozen=True)
class Int8CostConfig:
    """formats: for all matrices, or "own". batch: chunks scored at once."""

    formats: tuple[str, ...] = ("Q8_0",)
    batch: int = 8
    subject: SubjectConfig = field(default_factory=SubjectConfig)
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        known = (OWN, *(name for name in known_formats() if name not in DENSE_FORMATS))
        for name in self.formats:
            if name not in known:
                raise RealmError(f"formats: {name!r} is not known; take some of {', '.join(known)}")


def main(config: Int8CostConfig, run: Run) -> None:
    """Measure what int8 arithmetic costs for weights of each format: KL divergence, agreement, perplexity."""
    subject = make_subject(config.subject, config.text)
    done = {line["format"] for line in run.metrics()}
    for format in config.formats:
        if format not in done:
            run.log(**measure(config, subject, format))
    text = results(subject, run.metrics(), read_json(run.folder / "environment.json"))
    run.save_text("results.md", text)
    click.echo(text)


def measure(config: Int8CostConfig, subject: Subject, format: str) -> Line:
    """One line of metrics.jsonl."""
    model = make_model(config, subject, format)
    scores = score(model.with_arithmetic("int8"), subject.held_out_NT, reference=model, batch=config.batch)
    own = None if format == OWN else Divergence.of(score_model(subject, model, config.batch)).kl.mean
    return {"format": format, **metrics_of(scores), "format_kl": own}


def make_model(config: Int8CostConfig, subject: Subject, format: str) -> Model:
    if format == OWN:
        return load(config.subject.model)
    return quantize_model(subject.reference, pure_formats(subject.reference, format))


def results(subject: Subject, lines: list[Line], environment: dict[str, Any]) -> str:
    """The table, and what it was made with."""
    N, T = subject.held_out_NT.shape
    return (
        f"Made by {describe_run(environment)}.\n\n"
        f"Model: {subject.about}; own: its file. {N * (T - T // 2 - 1):,} scored tokens; KL in nats a token, with "
        f"standard errors over chunks.\n\n{markdown_table(HEADER, [row(line) for line in lines])}"
    )


def row(line: Line) -> tuple[str, ...]:
    """One row of the table."""
    return (
        line["format"],
        with_error(line["kl"], line["kl_chunk_error"]),
        f"{line['kl_99']:.2g}",
        f"{100 * line['top1']:.2f} ± {100 * line['top1_error']:.2f}%",
        f"{line['reference_perplexity']:.4f}",
        f"{line['perplexity']:.4f}",
        "" if line["format_kl"] is None else f"{line['format_kl']:.2g}",
    )


command = experiment_command(main, Int8CostConfig, Path(__file__).parents[1] / "configs" / "int8_cost.toml")

if __name__ == "__main__":
    command()
