"""What speculation gives: kind of draft x draft length x temperature, beside the theory.

    python experiments/speculative_sweep.py [CONFIG] [--set 'lengths=[1,2,3]' ...] [--name NAME] [--resume]

A cell is one draft, one length, one temperature, and one line of metrics.jsonl. Every prompt is decoded alone: first
round by round, for the trace (`speculative_trace`) that acceptance is counted from, which also compiles most programs;
then plainly, speculatively, and by the draft model alone, in an order of its own for each prompt, for the times. The
cost ratio c is a step of the draft alone over a step of the target alone. Rows never give speculation up here, whatever
it costs. How long one target forward takes over 1, 2, ... tokens is measured apart.

Texts differ from cell to cell, as each has random numbers of its own. results.md has the tables, results.json the
numbers, acceptance.png and speed.png the plots.
"""

from __future__ import annotations

import collections
import dataclasses
import random
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import tiny_text
from realm_jax.decode import buckets
from realm_jax.decode.batch import run_batch
from realm_jax.decode.completion import Completion
from realm_jax.decode.draft_models import MOST_TOKENS, PreparedDraft, prepare_draft
from realm_jax.decode.generate import TextStream
from realm_jax.decode.prompts import Request, make_requests
from realm_jax.decode.settings import Settings
from realm_jax.errors import RealmError
from realm_jax.experiment import Run, experiment_command, read_json
from realm_jax.kernels.matmul import choose_impl
from realm_jax.model import KVCache, Model, bundled, load, run, unembed
from speculative_report import plot_acceptance, plot_speed, results, summarize
from speculative_trace import Round, overlaps, trace


@dataclass(frozen=True)
class SpeculativeSweepConfig:
    """model: a GGUF file, the bundled one where not given. drafts: "bundled" (the bundled draft model), the path of a
    model, "ngram", "self:FORMAT" or "self:FORMAT:LAYERS". kinds: of documents (`tiny_text`), of which `documents` each
    are cut to prompts of `prompt_tokens` tokens. new_tokens: at most, for each. repeats: of the timed runs. context:
    tokens in the cache where a forward is timed.
    """

    drafts: tuple[str, ...] = ("bundled", "ngram", "self:Q2_K")
    lengths: tuple[int, ...] = (1, 2, 4, 8)
    temperatures: tuple[float, ...] = (0.0, 1.0)
    kinds: tuple[str, ...] = ("fact", "story", "list", "arithmetic")
    documents: int = 3
    prompt_tokens: int = 12
    new_tokens: int = 48
    repeats: int = 1
    context: int = 64
    seed: int = 0
    model: Path | None = None

    def __post_init__(self):
        for name in ("drafts", "lengths", "temperatures", "kinds"):
            if not getattr(self, name):
                raise RealmError(f"{name}: is empty; give one at least")
        for name in ("documents", "prompt_tokens", "new_tokens", "repeats", "context"):
            if getattr(self, name) < 1:
                raise RealmError(f"{name} is {getattr(self, name)}; want at least 1")
        for length in self.lengths:
            if not 1 <= length <= MOST_TOKENS:
                raise RealmError(f"lengths: {length} draft tokens; want 1 to {MOST_TOKENS}")
        for temperature in self.temperatures:
            if not 0 <= temperature < float("inf"):
                raise RealmError(f"temperatures: {temperature}; want 0 or more")
        for kind in self.kinds:
            if kind not in tiny_text.KINDS:
                raise RealmError(f"kinds: {kind!r} is none; known: {', '.join(tiny_text.KINDS)}")


class Cell(NamedTuple):
    """One thing to measure."""

    draft: str
    length: int
    temperature: float

    @classmethod
    def of(cls, line: dict[str, Any]) -> Cell:
        return cls(*(line.get(field) for field in cls._fields))

    def seed(self, seed: int) -> int:
        """Of its own, so that no two cells share random numbers, and their statistics are independent."""
        return zlib.crc32(f"{seed} {Path(self.draft).name} {self.length} {self.temperature}".encode())


def main(config: SpeculativeSweepConfig, run: Run) -> None:
    """Measure what speculation gives on a pair of models: acceptance, forwards saved, speed, beside the theory."""
    console = Console(stderr=True, highlight=False)
    model = load(config.model)
    prompts = make_prompts(model, config)
    console.print(f"{model!r}; {len(prompts)} prompts; run directory: {run.folder}", soft_wrap=True)
    drafts = {name: make_draft(model, name) for name in config.drafts}
    done = {Cell.of(line) for line in run.metrics()}
    for cell in cells(config):
        if cell not in done:
            line = measure(model, drafts[cell.draft], prompts, cell, config)
            run.log(**cell._asdict(), **line)
            console.print(
                f"{cell.draft}, {cell.length} tokens, temperature {cell.temperature}: {line['seconds']:.0f} s"
            )
    if not any("forward" in line for line in run.metrics()):
        run.log(forward=forward_seconds(model, config))
    lines = run.metrics()
    summary = summarize([line for line in lines if "forward" not in line])
    forward = next(line["forward"] for line in lines if "forward" in line)
    about = describe(model, drafts, len(prompts), config)
    run.save_json("results.json", {"about": about, "cells": summary, "forward": forward})
    table = results(summary, forward, about, read_json(run.folder / "environment.json"))
    run.save_text("results.md", table)
    plot_acceptance(run.folder / "acceptance.png", summary)
    plot_speed(run.folder / "speed.png", summary)
    console.print(table, soft_wrap=True)


def cells(config: SpeculativeSweepConfig) -> Iterator[Cell]:
    for draft in config.drafts:
        for temperature in config.temperatures:
            for length in config.lengths:
                yield Cell(draft, length, temperature)


def make_prompts(model: Model, config: SpeculativeSweepConfig) -> list[list[int]]:
    """The beginnings of documents that the bundled models were not trained on, of `prompt_tokens` tokens each."""
    texts = [
        text
        for kind in config.kinds
        for text in tiny_text.documents(kind, config.documents, config.seed, held_out=True)
    ]
    return [model.tokenizer.encode(text)[: config.prompt_tokens] for text in texts]


def make_draft(model: Model, name: str) -> PreparedDraft:
    """The draft of this name. To it all speculation is free, so that no row gives it up."""
    draft = bundled("tiny-draft.gguf") if name == "bundled" else name
    return prepare_draft(model, draft, 1, cost=0.0)


# --- one cell --------------------------------------------------------------------------------------------------------


def measure(
    model: Model, prepared: PreparedDraft, prompts: list[list[int]], cell: Cell, config: SpeculativeSweepConfig
) -> dict[str, Any]:
    """What the line of a cell holds beside its name."""
    started = time.perf_counter()
    draft = prepared.draft.replace(tokens=cell.length)
    prepared = dataclasses.replace(prepared, draft=draft)
    settings = Settings(max_new_tokens=config.new_tokens, temperature=cell.temperature, seed=cell.seed(config.seed))
    requests = make_requests(model, prompts, settings)
    drafter = None if draft.params is None else model.replace(params=draft.params, config=draft.config)
    traces = [trace(model, draft, request) for request in requests]
    expected = np.concatenate(
        [overlaps(model, drafter, *traced, cell.temperature, config.new_tokens) for traced in traces]
    )
    runs, texts = timed_runs(model, prepared, drafter, requests, cell, config)
    for i, (tokens, _) in enumerate(traces):
        if tokens[len(prompts[i]) :] != texts["speculative", i]:
            raise RealmError(f"{cell}: prompt {i}: the tokens of a traced and of a timed run differ")
    same = sum(texts["speculative", i] == texts["plain", i] for i in range(len(prompts)))
    return {
        **count([one for _, rounds in traces for one in rounds], cell.length),
        "expected_accepted": float(expected.sum()),
        "variance": float((expected * (1 - expected)).sum()),
        "prompts": len(prompts),
        "same_as_plain": same,
        "runs": runs,
        "seconds": time.perf_counter() - started,
    }


def count(rounds: list[Round], length: int) -> dict[str, Any]:
    """Sums over the rounds of all prompts: places judged and accepted by position, and rounds.

    histogram, proposed: rounds by how many draft tokens were accepted, and by how many there were.
    """
    judged = [sum(one.judged > place for one in rounds) for place in range(length)]
    accepted = [sum(one.accepted > place for one in rounds) for place in range(length)]
    histogram = [sum(one.accepted == taken for one in rounds) for taken in range(length + 1)]
    proposed = [sum(one.drafted == drafted for one in rounds) for drafted in range(length + 1)]
    tokens, drafted = (sum(getattr(one, name) for one in rounds) for name in ("tokens", "drafted"))
    return {
        "rounds": len(rounds), "tokens": tokens, "drafted": drafted, "judged": judged, "accepted": accepted,
        "histogram": histogram, "proposed": proposed,
    }  # fmt: skip


def timed_runs(
    model: Model,
    prepared: PreparedDraft,
    drafter: Model | None,
    requests: list[Request],
    cell: Cell,
    config: SpeculativeSweepConfig,
) -> tuple[list[dict[str, Any]], dict[tuple[str, int], list[int]]]:
    """Times of plain, speculative and draft-only decoding, each prompt alone, and the tokens of each.

    A step is a forward pass of the model that decodes, for "speculative" a round.
    """
    ways = {"plain": (model, None), "speculative": (model, prepared)}
    if drafter is not None:
        ways["draft"] = (drafter, None)
    for decoder, draft in ways.values():
        complete(decoder, requests[0], draft)  # compiles what the trace has not
    runs, texts = [], {}
    for repeat in range(config.repeats):
        for request in requests:
            order = random.Random(f"{cell} {repeat} {request.index}").sample(sorted(ways), len(ways))
            for way in order:
                done = complete(ways[way][0], request, ways[way][1])
                ahead, ended = done.stats.speculative, done.stop_reason == "eos"
                texts[way, request.index] = done.tokens
                steps = len(done.tokens) + ended if ahead is None else ahead.rounds
                line = {"way": way, "prompt": request.index, "repeat": repeat, "tokens": len(done.tokens)}
                runs.append(line | {"steps": steps, "seconds": done.stats.decode_seconds})
    return runs, texts


def complete(model: Model, request: Request, draft: PreparedDraft | None) -> Completion:
    """One prompt, as `generate` does it."""
    stream = TextStream(run_batch(model, [request], draft=draft))
    collections.deque(stream, maxlen=0)
    return stream.completion


# --- one forward pass ------------------------------------------------------------------------------------------------


def forward_seconds(model: Model, config: SpeculativeSweepConfig) -> list[dict[str, Any]]:
    """Quartiles of the time of one target forward over 1 and over length + 1 tokens of one row, in turn."""
    size = buckets.cache_bucket(config.context + max(config.lengths) + 1)
    cache = KVCache.create(model.config, 1, size, jnp.float32)
    cache = cache.replace(length_B=jnp.array([config.context], jnp.int32))

    @jax.jit
    def forward(tokens_BJ: jax.Array) -> jax.Array:
        hidden_BJD, _ = run(model.params, model.config, tokens_BJ, cache)
        return unembed(model.params, model.config, hidden_BJD)

    counts = sorted({1, *(length + 1 for length in config.lengths)})
    times: dict[int, list[float]] = {tokens: [] for tokens in counts}
    for repeat in range(-1, 24 * config.repeats):  # the first compiles
        for tokens in random.Random(repeat).sample(counts, len(counts)):
            tokens_BJ = jnp.full((1, tokens), repeat + 1, jnp.int32)
            started = time.perf_counter()
            forward(tokens_BJ).block_until_ready()
            if repeat >= 0:
                times[tokens].append(time.perf_counter() - started)
    quartiles = {tokens: np.quantile(times[tokens], [0.25, 0.5, 0.75]).tolist() for tokens in counts}
    return [{"tokens": tokens, "seconds": quartiles[tokens]} for tokens in counts]


def describe(model: Model, drafts: dict[str, PreparedDraft], prompts: int, config: SpeculativeSweepConfig) -> str:
    """What was measured, in one line."""
    layer = model.params.layers[0]
    impls = sorted({choose_impl((1, 1, w.shape[1]), w) for w in (layer.attn.q, layer.ffn.gate, layer.ffn.down)})
    names = ", ".join(f"{name} ({prepared.name})" if name == "bundled" else name for name, prepared in drafts.items())
    return (
        f"{model!r}; drafts: {names}; {prompts} prompts of {config.prompt_tokens} tokens ({', '.join(config.kinds)}), "
        f"up to {config.new_tokens} new tokens each, one prompt at a time; matmul: {'+'.join(impls)}"
    )


command = experiment_command(
    main, SpeculativeSweepConfig, Path(__file__).parents[1] / "configs" / "speculative_sweep.toml"
)

if __name__ == "__main__":
    command()
