"""Where an adapter is trained and where it ends: beside a float base or a packed one, kept apart or merged.

    python experiments/lora_on_quantized.py [CONFIG] [--set 'formats=["Q4_K"]' ...] [--name NAME] [--resume]

For each format, loss on held-out text in nats a learned token, of four ways (`WAYS`) to a model in that format
that has learned the text; and of the bases alone, and of the float base with its adapter. All ways have the same
training budget; a seed is one start of the adapter and one order of the rows, shared by all formats, so that ways can
be compared seed by seed.

The float base is the bundled model in float32. Its own file is Q4_K and Q6_K, and weights on the grid of a format lose
nothing when they are put back into it; so it is taken in another basis, off its grid (see `off_grid`), unless
`subject.turn` is 0. Losses are computed with all weights dequantized, by one compiled program; training runs on the
packed weights.

Each base, and each seed of each format, is one line of metrics.jsonl, where --resume goes on. results.md has the
tables, results.json the numbers behind them, losses.png the plot.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from lora_report import FLOAT, WAYS, plot_losses, results, summarize
from pirate_text import documents
from quant_setup import SubjectConfig, dense, known_formats, make_reference, pure_formats, size_of
from realm_jax.errors import RealmError
from realm_jax.experiment import Run, experiment_command, read_json
from realm_jax.finetune import Data, TrainingConfig, make_data, mean_loss, train
from realm_jax.lora import Adapter, init_adapter
from realm_jax.model import Model
from realm_jax.quant import DENSE_FORMATS, METHODS
from realm_jax.quantizer import merge, quantize_model


@dataclass(frozen=True)
class TextConfig:
    """documents, evaluation: how many of each, of `pirate_text`. row_tokens: tokens a row, in which they are packed."""

    documents: int = 6000
    evaluation: int = 400
    row_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True)
class LoraConfig:
    """Of the adapters, as `lora.init_adapter` has it."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class LoraOnQuantizedConfig:
    """formats: each for all matrices of a base. seeds: of the adapter's start and the order of the rows. method: of
    encoding.
    """

    training: TrainingConfig
    formats: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    method: str = "refine"
    subject: SubjectConfig = field(default_factory=SubjectConfig)
    text: TextConfig = field(default_factory=TextConfig)
    adapter: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self):
        able = [name for name in known_formats() if name not in DENSE_FORMATS]
        for name in self.formats:
            if name not in able:
                raise RealmError(f"formats: {name!r} is none to train on; these are: {', '.join(able)}")
        if len(set(self.seeds)) < 2 or len(set(self.seeds)) < len(self.seeds):
            raise RealmError(
                f"seeds: {list(self.seeds)}; want at least two different ones, to know how far they differ"
            )
        if self.method not in METHODS:
            raise RealmError(f"method: {self.method!r} is none; known: {', '.join(METHODS)}")


class Bench:
    """The bases, the text, and how adapters are trained and measured here."""

    def __init__(self, config: LoraOnQuantizedConfig):
        self.config = config
        self.reference, self.about = make_reference(config.subject)
        text = config.text
        train_records = documents(text.documents, text.seed)
        held_out = documents(text.evaluation, text.seed, held_out=True)
        self.data: Data = make_data(self.reference, train_records, held_out, row_tokens=text.row_tokens)
        self.base = functools.cache(self._base)

    def _base(self, format: str) -> Model:
        return self.reference if format == FLOAT else self.quantized(self.reference, format)

    def quantized(self, model: Model, format: str) -> Model:
        """A float model with all its matrices in a format."""
        return quantize_model(model, pure_formats(model, format), method=self.config.method)

    def train(self, model: Model, seed: int) -> Adapter:
        """An adapter trained beside a model; of one seed, it starts from the same numbers on every base."""
        options = {"rank": self.config.adapter.rank, "alpha": self.config.adapter.alpha}
        start = init_adapter(model, jax.random.key(seed), targets=self.config.adapter.targets, **options)
        return train(model, self.data, self.config.training, adapter=start, seed=seed)

    def loss(self, model: Model, adapter: Adapter | None = None) -> float:
        """On the held-out text."""
        return mean_loss(dense(model), self.data.evaluation, self.config.training, adapter)


def main(config: LoraOnQuantizedConfig, run: Run) -> None:
    """Compare ways to a quantized model with an adapter: trained on float or packed weights, apart or merged."""
    console = Console(stderr=True, highlight=False)
    bench = Bench(config)
    for note in (f"{bench.about}; run directory: {run.folder}", *bench.data.notes):
        console.print(note)
    done = {(line["format"], line["seed"]) for line in run.metrics()}

    def log(line: dict[str, Any]) -> None:
        run.log(**line)
        losses = ", ".join(f"{way} {line[way]:.4f}" for way in ("alone", *WAYS) if way in line)
        seed = "" if line["seed"] is None else f", seed {line['seed']}"
        console.print(f"{line['format']}{seed}: {losses} ({line['seconds']:.1f} s)")

    for format in (FLOAT, *config.formats):
        if (format, None) not in done:
            log(measure_base(bench, format))
    for seed in config.seeds:
        missing = [format for format in (FLOAT, *config.formats) if (format, seed) not in done]
        if missing:  # every format needs the float adapter of its seed, which is trained again where a run goes on
            measure_seed(bench, seed, missing, log)
    summary = summarize(run.metrics())
    run.save_json("results.json", summary)
    environment = read_json(run.folder / "environment.json")
    run.save_text("results.md", results(summary, [bench.about, *bench.data.notes], environment))
    plot_losses(run.folder / "losses.png", summary)


def measure_base(bench: Bench, format: str) -> dict[str, Any]:
    """The line of a base without any adapter."""
    started = time.perf_counter()
    base = bench.base(format)
    line = {"format": format, "seed": None, "alone": bench.loss(base), **size_of(base)}
    return line | {"seconds": time.perf_counter() - started}


def measure_seed(bench: Bench, seed: int, formats: list[str], log: Any) -> None:
    """The lines of one seed."""
    started = time.perf_counter()
    float_adapter = bench.train(bench.reference, seed)
    float_merged = merge(bench.reference, float_adapter)
    for format in formats:
        if format == FLOAT:
            losses = {"apart": bench.loss(bench.reference, float_adapter)}
        else:
            base = bench.base(format)
            adapter = bench.train(base, seed)
            losses = {
                "float_merged": bench.loss(bench.quantized(float_merged, format)),
                "float_apart": bench.loss(base, float_adapter),
                "apart": bench.loss(base, adapter),
                "requantized": bench.loss(merge(base, adapter, method=bench.config.method)),
            }
        log({"format": format, "seed": seed, **losses, "seconds": time.perf_counter() - started})
        started = time.perf_counter()


command = experiment_command(
    main, LoraOnQuantizedConfig, Path(__file__).parents[1] / "configs" / "lora_on_quantized.toml"
)

if __name__ == "__main__":
    command()
