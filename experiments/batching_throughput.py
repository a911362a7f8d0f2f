"""Continuous batching against its alternatives: tokens/s and latency over slots, and under load.

    python experiments/batching_throughput.py [CONFIG] [--set 'slots=[4,16]' ...] [--name NAME]

One list of requests with mixed prompt and output lengths (log-normal, clipped; greedy, with the end of text banned, so
that lengths are as drawn) is served in several ways (`batching_systems`): by the engine, one after another, in static
batches, and by llama.cpp if llama-cpp-python can be imported. First all requests are there at once; then they arrive at
random (Poisson), at shares of what the engine could take. Everything has run once before it is timed; what is compiled
later (static batches of new sizes) stops the clock. The ways take turns, in an order of their own in each repeat. Every
answer of this package must be that of the request alone. `batching_host` measures the host's time between calls.

results.md has the tables, results.json the numbers, throughput.png the plot.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

import tiny_text
from batching_host import HostConfig, measure_host
from batching_report import plot_throughput, results, summarize
from batching_systems import (
    Continuous,
    Job,
    LlamaContinuous,
    LlamaSequential,
    Record,
    Static,
    System,
    import_peer,
    serve,
)
from realm_jax.errors import RealmError
from realm_jax.experiment import Run, experiment_command, read_json
from realm_jax.model import Model, bundled, load

WARM_JOBS = 8
"""Served before timing starts where all sizes are compiled ahead, or nothing is; else all jobs are."""


@dataclass(frozen=True)
class LengthConfig:
    """Log-normal numbers of tokens: the median, the standard deviation of the logarithm, and where they are clipped."""

    median: float
    spread: float
    least: int
    most: int

    def __post_init__(self):
        if not 1 <= self.least <= self.median <= self.most or self.spread < 0:
            raise RealmError(
                f"lengths: least {self.least}, median {self.median:g}, most {self.most}, spread {self.spread:g}; want "
                "1 <= least <= median <= most, and a spread of 0 or more"
            )

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        lengths = np.exp(rng.normal(np.log(self.median), self.spread, count))
        return np.clip(np.rint(lengths), self.least, self.most).astype(int)


@dataclass(frozen=True)
class BatchingThroughputConfig:
    """model: a GGUF file, the bundled one where not given. slots, static_slots: of the engine (and llama.cpp), and of
    static batches. prompts, outputs: numbers of tokens. loads: arrivals, as shares of what the engine with `load_slots`
    can take. steps: of decoding in a call of the engine. peer: whether to compare with llama.cpp.
    """

    slots: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    static_slots: tuple[int, ...] = (4, 16, 32)
    requests: int = 64
    prompts: LengthConfig = field(default_factory=lambda: LengthConfig(30.0, 0.9, 4, 200))
    outputs: LengthConfig = field(default_factory=lambda: LengthConfig(40.0, 0.9, 8, 200))
    loads: tuple[float, ...] = (0.5, 0.8)
    load_slots: int = 16
    steps: int = 8
    repeats: int = 2
    peer: Literal["auto", "off"] = "auto"
    seed: int = 0
    model: Path | None = None
    host: HostConfig = field(default_factory=HostConfig)

    def __post_init__(self):
        for name in ("requests", "repeats", "steps"):
            if getattr(self, name) < 1:
                raise RealmError(f"{name} is {getattr(self, name)}; want at least 1")
        for slots in (*self.slots, *self.static_slots):
            if slots < 1:
                raise RealmError(f"slots, static_slots: {slots}; want 1 or more")
        if self.load_slots not in self.slots:
            raise RealmError(f"load_slots: {self.load_slots} is not one of slots, whose speed is measured")
        for load_ in self.loads:
            if not 0 < load_ < float("inf"):
                raise RealmError(f"loads: {load_}; want more than 0")


def main(config: BatchingThroughputConfig, run: Run) -> None:
    """Measure tokens/s and latency of continuous batching over slots and loads, beside other ways to serve."""
    console = Console(stderr=True, highlight=False)
    model = load(config.model)
    jobs, unit_arrivals = make_jobs(model, config), poisson_arrivals(config.requests, config.seed)
    run.keep_metrics(lambda line: False)  # times of two runs are not to be mixed
    load_before, peer = os.getloadavg()[0], import_peer() if config.peer == "auto" else None
    console.print(f"{model!r}; {describe_jobs(jobs)}; load {load_before:.2f}; run directory: {run.folder}")
    ways, answers = make_ways(model, config, peer), Answers()
    systems = {}
    for way, make in ways.items():
        systems[way] = make()
        warm = jobs if isinstance(systems[way], Static) else jobs[:WARM_JOBS]
        answers.check(way, serve(systems[way], warm, np.zeros(len(warm)))[0])
        console.print(f"{name_of(way)}: ready")
    for repeat in range(config.repeats):
        for way in random.Random(f"{config.seed} {repeat}").sample(list(ways), len(ways)):
            line = time_once(way, systems[way], jobs, np.zeros(len(jobs)), answers)
            run.log(kind="offline", repeat=repeat, **line)
            console.print(f"repeat {repeat + 1}, {name_of(way)}: {line['tokens'] / line['seconds']:.0f} tokens/s")
    rate = capacity(run.metrics(), config.load_slots)
    for share in config.loads:
        for way, system in under_load(model, systems, config).items():
            line = time_once(way, system, jobs, unit_arrivals / (share * rate), answers)
            run.log(kind="load", load=share, rate=share * rate, **line)
            console.print(f"load {share:.0%}, {name_of(way)}: {line['seconds']:.1f} s")
    if config.host.layers:
        run.log(kind="host", **measure_host(config.host, config.steps, config.seed))
    about = (
        f"{model!r}; {describe_jobs(jobs)}; {config.steps} steps a call of the engine; load average before: "
        f"{load_before:.2f}; {peer_text(peer, answers, len(jobs))}"
    )
    report(run, about, console)


def report(run: Run, about: str, console: Console) -> None:
    summary = summarize(run.metrics())
    run.save_json("results.json", {"about": about, **summary})
    table = results(summary, about, read_json(run.folder / "environment.json"))
    run.save_text("results.md", table)
    plot_throughput(run.folder / "throughput.png", summary)
    console.print(table, soft_wrap=True)


# --- requests --------------------------------------------------------------------------------------------------------


def make_jobs(model: Model, config: BatchingThroughputConfig) -> list[Job]:
    """Pieces of stories that the bundled model was not trained on, and how many tokens to go on with."""
    rng = np.random.default_rng(config.seed)
    prompts, outputs = config.prompts.draw(config.requests, rng), config.outputs.draw(config.requests, rng)
    texts = tiny_text.documents("story", 100, config.seed, held_out=True)
    text = [token for document in texts for token in model.tokenizer.encode(document, special=False)]
    starts = rng.integers(0, len(text) - config.prompts.most, config.requests)
    return [
        Job(text[start : start + prompt], int(tokens))
        for start, prompt, tokens in zip(starts.tolist(), prompts.tolist(), outputs, strict=True)
    ]


def poisson_arrivals(count: int, seed: int) -> np.ndarray:
    """Times, ascending, whose differences are exponential with mean 1. Divide by a rate."""
    return np.random.default_rng([seed, 1]).exponential(size=count).cumsum()


def describe_jobs(jobs: Sequence[Job]) -> str:
    prompts, tokens = [len(job.prompt) for job in jobs], [job.tokens for job in jobs]
    return (
        f"{len(jobs)} requests, prompts of {min(prompts)} to {max(prompts)} tokens (mean {np.mean(prompts):.0f}), "
        f"{min(tokens)} to {max(tokens)} new ones (mean {np.mean(tokens):.0f}, {sum(tokens)} in all)"
    )


# --- ways to serve them ----------------------------------------------------------------------------------------------

Way = tuple[str, int]
"""The name of a way to serve, and its slots."""


def make_ways(model: Model, config: BatchingThroughputConfig, peer: Any) -> dict[Way, Callable[[], System]]:
    """How to make what is timed. The first one, a request after another, says what the answers are."""
    size = min(config.prompts.most + config.outputs.most, model.config.context_length)
    ways: dict[Way, Callable[[], System]] = {("sequential", 1): partial(Static, model, 1)}
    ways |= {("static", slots): partial(Static, model, slots) for slots in config.static_slots}
    ways |= {("engine", slots): partial(Continuous, model, slots, size, steps=config.steps) for slots in config.slots}
    if peer is not None:
        path, eog = config.model or bundled(), model.tokenizer.eog_ids
        ways["llama.cpp sequential", 1] = partial(LlamaSequential, peer, path, size, eog)
        ways |= {("llama.cpp", slots): partial(LlamaContinuous, peer, path, slots, size, eog) for slots in config.slots}
    return ways


def under_load(model: Model, systems: dict[Way, System], config: BatchingThroughputConfig) -> dict[Way, System]:
    """Those that requests arrive at, all with `load_slots`; static batches then hand out text as it comes."""
    slots = config.load_slots
    chosen = {("engine", slots): systems["engine", slots], ("static", slots): Static(model, slots, streams=True)}
    return chosen | ({("llama.cpp", slots): systems["llama.cpp", slots]} if ("llama.cpp", slots) in systems else {})


def name_of(way: Way) -> str:
    return f"{way[0]}, {way[1]} slot{'s' * (way[1] > 1)}"


class Answers:
    """What the first way answered; this package's ways must all answer that, and how far llama.cpp does is counted."""

    def __init__(self):
        self.right: list[list[int]] = []
        self.equal: dict[str, int] = {}

    def check(self, way: Way, record: Record) -> None:
        self.right = self.right or record.answers
        self.equal[way[0]] = sum(a == b for a, b in zip(self.right, record.answers, strict=False))
        wrong = next((i for i, answer in enumerate(record.answers) if answer != self.right[i]), None)
        if wrong is not None and not way[0].startswith("llama.cpp"):
            raise RealmError(f"{name_of(way)}: request {wrong}: its answer is not that of the request alone")


def peer_text(peer: Any, answers: Answers, jobs: int) -> str:
    if peer is None:
        return "llama.cpp: left out (llama-cpp-python is not installed, or peer is off)"
    return (
        f"llama-cpp-python {peer.__version__}, {os.cpu_count()} threads, keys and values in float16, same text as ours "
        f"in {answers.equal['llama.cpp']} of {jobs} requests (it rounds activations to 8 bits)"
    )


# --- timing ----------------------------------------------------------------------------------------------------------


def time_once(way: Way, system: System, jobs: Sequence[Job], arrivals: np.ndarray, answers: Answers) -> dict[str, Any]:
    """One serving of all jobs: its time from the first arrival to the last token, and latencies of each job."""
    if isinstance(system, Continuous):
        system.events.clear()
    record, start = serve(system, jobs, arrivals)
    answers.check(way, record)
    line = {
        "way": way[0],
        "slots": way[1],
        "seconds": max(times[-1] for times in record.times) - start - float(arrivals[0]),
        "tokens": sum(job.tokens for job in jobs),
        "latency": latencies(record, jobs, arrivals + start),
        "load_average": os.getloadavg()[0],
    }
    if isinstance(system, Continuous):
        calls = [event for event in system.events if event["event"] == "call"]
        line |= {
            "calls": len(calls),
            "occupied": float(np.mean([call["occupied"] for call in calls])),
            "call_seconds": float(np.median([call["seconds"] for call in calls])),
            "host_seconds": float(np.median([call["host_seconds"] for call in calls])),
        }
    return line


def latencies(record: Record, jobs: Sequence[Job], arrivals: np.ndarray) -> dict[str, list[float]]:
    """Seconds of each job. first: from arrival to its first tokens. between: from those to the last, a token. pause:
    the longest in which none came, None of a job that got all at once. total: from arrival to the last.
    """
    times = record.times
    return {
        "first": [came[0] - at for came, at in zip(times, arrivals.tolist(), strict=True)],
        "between": [(came[-1] - came[0]) / max(job.tokens - 1, 1) for came, job in zip(times, jobs, strict=True)],
        "pause": [float(np.diff(came).max()) if len(came) > 1 else None for came in times],
        "total": [came[-1] - at for came, at in zip(times, arrivals.tolist(), strict=True)],
    }


def capacity(lines: Sequence[dict[str, Any]], slots: int) -> float:
    """Requests a second that the engine with so many slots has served: the median of its runs."""
    runs = [line for line in lines if (line["kind"], line["way"], line["slots"]) == ("offline", "engine", slots)]
    return float(np.median([len(line["latency"]["total"]) / line["seconds"] for line in runs]))


command = experiment_command(
    main, BatchingThroughputConfig, Path(__file__).parents[1] / "configs" / "batching_throughput.toml"
)

if __name__ == "__main__":
    command()
