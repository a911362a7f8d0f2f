"""What a key-value cache of a smaller type costs: KL divergence from the same model without a cache.

    python experiments/cache_cost.py [CONFIG] [--set KEY=VALUE ...]

The weights are the same, in float32, and so is the text; keys and values of every token are read from the cache as it
stores them (`realm_jax.evaluate.score`). What float32 differs by is rounding. results.md has the table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import jax

from quant_setup import Subject, SubjectConfig, TextConfig, make_subject, metrics_of, with_error
from realm_jax.errors import RealmError
from realm_jax.evaluate import score
from realm_jax.experiment import Run, experiment_command, read_json
from realm_jax.experiment.report import describe_run, markdown_table
from realm_jax.model import Config, KVCache
from realm_jax.model.cache import DTYPES

Line = dict[str, Any]
HEADER = ("cache", "bytes a token", "KL", "KL, 99%", "same top token", "perplexity", "ln(perplexity / reference)")


@dataclass(frozen=True)
class CacheCostConfig:
    """dtypes: of caches. batch: chunks scored at once."""

    dtypes: tuple[str, ...] = tuple(DTYPES)
    batch: int = 8
    subject: SubjectConfig = field(default_factory=lambda: SubjectConfig(turn=0.0))
    text: TextConfig = field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        for name in self.dtypes:
            if name not in DTYPES:
                raise RealmError(f"dtypes: a cache of {name!r} is not known; take some of {', '.join(DTYPES)}")


def main(config: CacheCostConfig, run: Run) -> None:
    """Measure what each type of cache costs: KL divergence, agreement, perplexity."""
    subject = make_subject(config.subject, config.text)
    done = {line["cache"] for line in run.metrics()}
    for dtype in config.dtypes:
        if dtype not in done:
            run.log(**measure(subject, dtype, config.batch))
    text = results(subject, run.metrics(), read_json(run.folder / "environment.json"))
    run.save_text("results.md", text)
    click.echo(text)


def measure(subject: Subject, dtype: str, batch: int) -> Line:
    """One line of metrics.jsonl."""
    model = subject.reference
    scores = score(model, subject.held_out_NT, reference=model, cache_dtype=dtype, batch=batch)
    return {"cache": dtype, "bytes_per_token": token_bytes(model.config, dtype), **metrics_of(scores)}


def token_bytes(config: Config, dtype: str) -> int:
    """Bytes of keys, values and scales of one token."""
    cache = jax.eval_shape(lambda: KVCache.create(config, 1, 1, dtype))
    stored = (cache.k, cache.v, cache.k_scale, cache.v_scale)
    return sum(x.size * x.dtype.itemsize for x in stored if x is not None)


def results(subject: Subject, lines: list[Line], environment: dict[str, Any]) -> str:
    """The table, and what it was made with."""
    N, T = subject.held_out_NT.shape
    return (
        f"Made by {describe_run(environment)}.\n\n"
        f"Model: {subject.about}. {N * (T - T // 2 - 1):,} scored tokens; KL in nats a token, with standard errors "
        f"over chunks. Perplexity without a cache: {lines[0]['reference_perplexity']:.4f}.\n\n"
        f"{markdown_table(HEADER, [row(line) for line in lines])}"
    )


def row(line: Line) -> tuple[str, ...]:
    """One row of the table."""
    return (
        line["cache"],
        f"{line['bytes_per_token']}",
        with_error(line["kl"], line["kl_chunk_error"]),
        f"{line['kl_99']:.2g}",
        f"{100 * line['top1']:.2f} ± {100 * line['top1_error']:.2f}%",
        f"{line['perplexity']:.4f} ± {line['perplexity_error']:.4f}",
        with_error(line["log_ratio"], line["log_ratio_error"]),
    )


command = experiment_command(main, CacheCostConfig, Path(__file__).parents[1] / "configs" / "cache_cost.toml")

if __name__ == "__main__":
    command()
