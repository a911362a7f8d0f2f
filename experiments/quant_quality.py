"""What a format costs: every format and mix, with and without importance, against the float model.

    python experiments/quant_quality.py [CONFIG] [--set subject.model=model-f16.gguf ...] [--name NAME] [--resume]

A cell is one format or mix, one method of encoding, with or without an importance matrix. Each is one line of
metrics.jsonl; results.md has them as a table, pareto.png as a plot of bits a weight against KL divergence. A format
that takes no notice of importance, or a method that gives the same bytes as another, has no cell of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Console

from quant_setup import (
    Subject,
    SubjectConfig,
    TextConfig,
    known_formats,
    make_subject,
    metrics_of,
    mixed_formats,
    pure_formats,
    score_model,
    size_of,
    with_error,
)
from realm_jax.errors import RealmError
from realm_jax.experiment import (
    Run,
    describe_run,
    experiment_command,
    markdown_table,
    new_figure,
    read_json,
    save_figure,
)
from realm_jax.quant import DENSE_FORMATS, METHODS, quantize, raw_bytes
from realm_jax.quantizer import quantize_model
from realm_jax.quantizer.mixes import FILE_TYPES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADER = ("format", "bits", "MB", "imatrix", "method", "KL", "median", "99%", "perplexity", "same top token")
Line = dict[str, Any]


@dataclass(frozen=True)
class QuantQualityConfig:
    """formats: for all matrices (all known where empty). mixes: llama.cpp's. methods: of `quantize`, the first counts
    as the standard one. batch: chunks scored at once (as memory allows where not given).
    """

    subject: SubjectConfig
    text: TextConfig
    formats: tuple[str, ...] = ()
    mixes: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("refine",)
    batch: int | None = None

    def __post_init__(self):
        for key, known in (("formats", known_formats()), ("mixes", FILE_TYPES), ("methods", METHODS)):
            for name in getattr(self, key):
                if name not in known:
                    raise RealmError(f"{key}: {name!r} is none; known: {', '.join(known)}")
        if not self.methods:
            raise RealmError("methods: is empty; give one, for example refine")


class Cell(NamedTuple):
    """One thing to measure. name: a format, or a mix where is_mix is set. imatrix: with importance."""

    name: str
    is_mix: bool
    method: str
    imatrix: bool

    @classmethod
    def of(cls, line: Line) -> Cell:
        return cls(*(line[field] for field in cls._fields))

    @property
    def label(self) -> str:
        return f"{self.name} mix" if self.is_mix and self.name in known_formats() else self.name


def main(config: QuantQualityConfig, run: Run) -> None:
    """Measure what every format costs on a model: size, KL divergence, perplexity, agreement."""
    console = Console(stderr=True)
    subject = make_subject(config.subject, config.text)
    console.print(f"{subject.about}; run directory: {run.folder}")
    done = {Cell.of(line) for line in run.metrics()}
    for cell in cells(config):
        if cell not in done:
            line = measure(subject, cell, config.batch)
            run.log(**line)
            console.print(f"{' '.join(row(line)[:6])}  ({line['seconds']:.1f} s)", highlight=False)
    lines = run.metrics()
    run.save_text("results.md", results(subject, lines, read_json(run.folder / "environment.json")))
    plot_pareto(run.folder / "pareto.png", [line for line in lines if line["method"] == config.methods[0]])


def cells(config: QuantQualityConfig) -> Iterator[Cell]:
    """All cells, those that would give the same bytes as an earlier one left out."""
    for format in config.formats or known_formats():
        for method, imatrix in distinct_settings((format,), config.methods):
            yield Cell(format, False, method, imatrix)
    for mix in config.mixes:
        for method, imatrix in distinct_settings((FILE_TYPES[mix].format,), config.methods):
            yield Cell(mix, True, method, imatrix)


def distinct_settings(formats: Sequence[str], methods: Sequence[str]) -> list[tuple[str, bool]]:
    """(method, importance or none) that make a difference to these formats, found by trying them on random weights."""
    rng = np.random.default_rng(0)
    w, importance = rng.normal(size=(8, 256)).astype(np.float32), rng.exponential(size=256).astype(np.float32)
    seen: dict[bytes, tuple[str, bool]] = {}
    for imatrix in (False, True):
        for method in methods:
            options = {"method": method, "importance": importance if imatrix else None}
            tried = b"".join(raw_bytes(quantize(w, format, **options))[1].tobytes() for format in formats)
            seen.setdefault(tried, (method, imatrix))
    return list(seen.values())


def measure(subject: Subject, cell: Cell, batch: int | None = None) -> Line:
    """One line of metrics.jsonl."""
    start = time.perf_counter()
    if cell.is_mix:
        formats = mixed_formats(subject.reference, cell.name, has_imatrix=cell.imatrix)
    else:
        formats = pure_formats(subject.reference, cell.name)
    imatrix = subject.imatrix if cell.imatrix else None
    model = quantize_model(subject.reference, formats, imatrix=imatrix, method=cell.method)
    scores = score_model(subject, model, batch)
    return cell._asdict() | size_of(model) | metrics_of(scores) | {"seconds": time.perf_counter() - start}


# --- results ---------------------------------------------------------------------------------------------------------


def results(subject: Subject, lines: list[Line], environment: dict[str, Any]) -> str:
    """The table of all cells, smallest first, and what it was made with."""
    scored = subject.held_out_NT.shape[0] * (subject.held_out_NT.shape[1] - subject.held_out_NT.shape[1] // 2 - 1)
    ordered = sorted(lines, key=lambda line: (line["bits_per_weight"], line["name"], line["kl"]))
    return (
        f"Made by {describe_run(environment)}.\n\n"
        f"Model: {subject.about}. Perplexity of the float model: {lines[0]['reference_perplexity']:.4f}. {scored:,} "
        "scored tokens; KL in nats a token, with standard errors over chunks.\n\n"
        f"{summary_table(ordered)}\n{markdown_table(HEADER, [row(line) for line in ordered])}"
    )


def summary_table(ordered: list[Line]) -> str:
    """KL alone: a row for each format or mix, a column for each way to encode."""
    by_cell = {(Cell.of(line).label, line["method"], line["imatrix"]): line for line in ordered}
    ways = sorted({(line["imatrix"], line["method"]) for line in ordered}, key=lambda way: (way[0], way[1] != "refine"))
    rows = []
    for label, first in {Cell.of(line).label: line for line in reversed(ordered)}.items():
        found = [by_cell.get((label, method, imatrix)) for imatrix, method in ways]
        kl = ["" if line is None else with_error(line["kl"], line["kl_chunk_error"]) for line in found]
        rows.insert(0, [label, f"{first['bits_per_weight']:.3f}", *kl])
    titles = [f"{method}{', importance' if imatrix else ''}" for imatrix, method in ways]
    return markdown_table(["format", "bits", *(f"KL, {title}" for title in titles)], rows)


def row(line: Line) -> tuple[str, ...]:
    """One row of the table."""
    cell = Cell.of(line)
    return (
        cell.label,
        f"{line['bits_per_weight']:.3f}",
        f"{line['bytes'] / 1e6:.3f}",
        "yes" if cell.imatrix else "no",
        "" if cell.name in DENSE_FORMATS else cell.method,
        with_error(line["kl"], line["kl_chunk_error"]),
        f"{line['kl_median']:.2g}",
        f"{line['kl_99']:.2g}",
        with_error(line["perplexity"], line["perplexity_error"]),
        f"{100 * line['top1']:.2f}%",
    )


def pareto_front(lines: list[Line]) -> list[Line]:
    """Those that no other line beats in size and KL at once, smallest first."""
    front: list[Line] = []
    for line in sorted(lines, key=lambda line: (line["bits_per_weight"], line["kl"])):
        if not front or line["kl"] < front[-1]["kl"]:
            front.append(line)
    return front


def plot_pareto(path: Path, lines: list[Line]) -> Path:
    """Bits a weight against KL, with standard errors, importance told from none, formats from mixes.

    All to the left, the crowded middle to the right.
    """
    figure = new_figure(13, 6)
    whole, middle = figure.subplots(1, 2)
    for axes, ticks in ((whole, (2, 3, 4, 6, 8, 16)), (middle, (3, 3.5, 4, 4.5, 5, 5.5, 6))):
        draw_points(axes, lines)
        axes.set(xlabel="bits a weight", yscale="log", xscale="log")
        axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
        axes.minorticks_off()
    inside = [line for line in lines if 3 <= line["bits_per_weight"] <= 6.2]
    label_points(whole, [line for line in lines if line not in inside])
    label_points(middle, inside)
    if inside:
        kl = [line["kl"] for line in inside]
        middle.set(xlim=(2.85, 6.4), ylim=(min(kl) / 2, max(kl) * 2))
    whole.set_ylabel("KL from the float model (nats a token)")
    whole.legend(frameon=False)
    return save_figure(figure, path)


def draw_points(axes: Axes, lines: list[Line]) -> None:
    """All points with their error bars, and the Pareto front."""
    front_x, front_y = ([line[key] for line in pareto_front(lines)] for key in ("bits_per_weight", "kl"))
    axes.plot(front_x, front_y, color="grey", linewidth=1, zorder=1, label="Pareto front")
    for imatrix, color in ((False, "tab:blue"), (True, "tab:orange")):
        for is_mix, marker in ((False, "o"), (True, "s")):
            part = [line for line in lines if (line["imatrix"], line["is_mix"]) == (imatrix, is_mix)]
            x, y, error = ([line[key] for line in part] for key in ("bits_per_weight", "kl", "kl_chunk_error"))
            label = f"{'mix' if is_mix else 'one format'}{', with importance' if imatrix else ''}"
            axes.errorbar(x, y, error, fmt=marker, color=color, markersize=5, capsize=2, label=label, zorder=2)


def label_points(axes: Axes, lines: list[Line]) -> None:
    """Each name once, at its best point: mixes to the lower left, formats to the right, neighbours in one list."""
    best: dict[Cell, Line] = {}
    for line in sorted(lines, key=lambda line: -line["kl"]):
        best[Cell.of(line)._replace(method="", imatrix=False)] = line
    lists: list[list[tuple[str, float, float]]] = []  # of (name, x, y), from top to bottom
    points = [(cell, line["bits_per_weight"], line["kl"]) for cell, line in best.items()]
    for cell, x, y in sorted(points, key=lambda point: (round(point[1], 2), -point[2])):
        if cell.is_mix:
            axes.annotate(cell.label, (x, y), xytext=(-5, -8), textcoords="offset points", fontsize=8, ha="right")
        elif lists and abs(lists[-1][-1][1] - x) < 0.01 and lists[-1][-1][2] < 1.6 * y:
            lists[-1].append((cell.label, x, y))
        else:
            lists.append([(cell.label, x, y)])
    for names in lists:
        x, y = names[0][1], math.sqrt(names[0][2] * names[-1][2])
        text = "\n".join(name for name, _, _ in names)
        axes.annotate(text, (x, y), xytext=(7, 0), textcoords="offset points", fontsize=8, va="center")


command = experiment_command(main, QuantQualityConfig, Path(__file__).parents[1] / "configs" / "quant_quality.toml")

if __name__ == "__main__":
    command()
