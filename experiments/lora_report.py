"""What `lora_on_quantized` found: means and errors over seeds, tables, a plot. Plain numbers in, files out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quant_setup import with_error
from realm_jax.evaluate import Estimate
from realm_jax.experiment import describe_run, markdown_table, new_figure, save_figure

FLOAT = "F32"  # the name of the float base in lines and tables
WAYS = {
    "float_merged": "trained on float, merged into it, quantized",
    "float_apart": "trained on float, beside the packed base",
    "apart": "trained on the packed base, apart",
    "requantized": "trained on the packed base, merged in format",
}
"""Name in metrics.jsonl -> what it says in tables and plots."""

Line = dict[str, Any]


def summarize(lines: Sequence[Line]) -> dict[str, Any]:
    """Per format, in the order of the lines: bits a weight, loss of the base alone, and for every way its losses by
    seed, their mean and standard error, and the same of its differences to `apart`, seed by seed.
    """
    summary = {}
    for base in (line for line in lines if line["seed"] is None):
        seeds = [line for line in lines if line["format"] == base["format"] and line["seed"] is not None]
        ways = {}
        for way in WAYS if base["format"] != FLOAT else ["apart"]:
            losses = {str(line["seed"]): line[way] for line in seeds}
            differences = Estimate.of([line[way] - line["apart"] for line in seeds])
            ways[way] = {"seeds": losses, **_numbers(Estimate.of(list(losses.values())))}
            ways[way]["minus_apart"] = _numbers(differences)
        bits = {"bits_per_weight": base["bits_per_weight"], "bytes": base["bytes"]}
        summary[base["format"]] = bits | {"alone": base["alone"], "ways": ways}
    return summary


def _numbers(estimate: Estimate) -> dict[str, float]:
    return {"mean": estimate.mean, "error": estimate.error}


def results(summary: dict[str, Any], about: Sequence[str], environment: dict[str, Any]) -> str:
    """Two tables, losses and differences, and what they were made with."""
    float_base = summary[FLOAT]
    with_adapter = float_base["ways"]["apart"]
    count, learned = len(with_adapter["seeds"]), (with_adapter["mean"], with_adapter["error"])
    losses, differences = [], []
    for format, found in summary.items():
        if format == FLOAT:
            continue
        head = [format, f"{found['bits_per_weight']:.3f}"]
        ways = [found["ways"][way] for way in WAYS]
        losses.append([*head, f"{found['alone']:.4f}", *(with_error(way["mean"], way["error"]) for way in ways)])
        others = [found["ways"][way]["minus_apart"] for way in WAYS if way != "apart"]
        differences.append([*head, *(with_error(other["mean"], other["error"]) for other in others)])
    titles = [title for way, title in WAYS.items() if way != "apart"]
    notes = "\n".join(f"* {note}" for note in about)
    return (
        f"Made by {describe_run(environment)}.\n\n{notes}\n\n"
        f"Loss on held-out text, nats a learned token, mean and standard error over {count} seeds. "
        f"The float base alone: {float_base['alone']:.4f}; with its adapter apart: {with_error(*learned)}."
        f"\n\n{markdown_table(['format', 'bits', 'base alone', *WAYS.values()], losses)}\n"
        f'Difference to "{WAYS["apart"]}", seed by seed (less is better):\n\n'
        f"{markdown_table(['format', 'bits', *titles], differences)}"
    )


def plot_losses(path: Path, summary: dict[str, Any]) -> Path:
    """Left: the loss of every way by format. Right: its difference to `apart`. Standard errors over seeds."""
    formats = [format for format in summary if format != FLOAT]
    figure = new_figure(13, 5)
    left, right = figure.subplots(1, 2)
    for number, (way, title) in enumerate(WAYS.items()):
        x = [place + 0.14 * (number - 1.5) for place in range(len(formats))]
        for axes, pick in ((left, lambda found: found), (right, lambda found: found["minus_apart"])):
            found = [pick(summary[format]["ways"][way]) for format in formats]
            mean, error = ([numbers[key] for numbers in found] for key in ("mean", "error"))
            axes.errorbar(x, mean, error, fmt="osD^"[number], markersize=5, capsize=3, label=title)
    best = summary[FLOAT]["ways"]["apart"]["mean"]
    left.axhline(best, color="grey", linestyle="--", linewidth=1, label="float base, adapter apart")
    right.axhline(0, color="grey", linewidth=1)
    left.set_ylabel("loss on held-out text (nats a token)")
    right.set_ylabel("difference to trained on the packed base, apart")
    for axes in (left, right):
        axes.set_xticks(
            range(len(formats)), [f"{name}\n{summary[name]['bits_per_weight']:.2f} bits" for name in formats]
        )
    left.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)
