"""What `lora_overhead` found: quartiles, a table, a plot. Plain numbers in, files out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from realm_jax.experiment import describe_run, markdown_table, new_figure, save_figure

Line = dict[str, Any]


def summarize(lines: list[Line], names: list[str]) -> dict[str, Line]:
    """For each way: quartiles of the seconds a step, of their ratio to no adapter in the same repeat, of gathering."""
    none = {line["repeat"]: line["seconds"] for line in lines if line["way"] == "none"}
    summary = {}
    for name in names:
        own = [line for line in lines if line["way"] == name]
        values = {
            "seconds": [line["seconds"] for line in own],
            "ratio": [line["seconds"] / none[line["repeat"]] for line in own],
            "select_seconds": [line["select_seconds"] for line in own],
        }
        quartiles = {key: np.quantile(value, [0.25, 0.5, 0.75]).tolist() for key, value in values.items()}
        summary[name] = {"adapters": own[0]["adapters"], **quartiles}
    return summary


def results(summary: dict[str, Line], about: str, environment: dict[str, Any]) -> str:
    """The table, and what it was made with."""
    header = ["adapters", "step, ms", "over none", "deltas, MB", "bytes", "least", "to gather, ms", "temporary, MB"]
    rows = []
    for name, found in summary.items():
        temporary_bytes = found["temporary_bytes"]
        rows.append(
            [
                name,
                quartiles([1e3 * value for value in found["seconds"]]),
                quartiles(found["ratio"]),
                f"{found['delta_bytes'] / 1e6:.1f}",
                f"{found['byte_ratio']:.3f}",
                f"{found['least_byte_ratio']:.3f}",
                f"{1e3 * found['select_seconds'][1]:.2f}" if found["adapters"] is not None else "",
                "" if temporary_bytes is None else f"{temporary_bytes / 1e6:.1f}",
            ]
        )
    none = summary["none"]
    return (
        f"Made by {describe_run(environment)}.\n\n{about}. A step reads {none['weight_bytes'] / 1e6:.1f} MB of weights "
        f'and {none["cache_bytes"] / 1e6:.1f} MB of keys and values; "bytes" and "least" are over that. Medians '
        f"with quartiles.\n\n{markdown_table(header, rows)}"
    )


def quartiles(values: list[float]) -> str:
    low, middle, high = values
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def plot_overhead(path: Path, summary: dict[str, Line]) -> Path:
    """Time over that without an adapter, with quartiles, beside the bytes that a step reads and the least it could."""
    figure = new_figure(8, 4.5)
    axes = figure.add_subplot()
    x = range(len(summary))
    low, middle, high = np.array([found["ratio"] for found in summary.values()]).T
    axes.bar(x, middle, yerr=[middle - low, high - middle], capsize=3, color="tab:blue", alpha=0.6, label="time")
    axes.plot(x, [found["byte_ratio"] for found in summary.values()], "s", color="tab:orange", label="bytes")
    axes.plot(x, [found["least_byte_ratio"] for found in summary.values()], "_", color="black", label="least bytes")
    axes.axhline(1, color="grey", linewidth=1)
    axes.set_xticks(x, [name.replace(", ", "\n") for name in summary])
    axes.set(ylabel="one step, over one without an adapter")
    axes.legend(frameon=False)
    return save_figure(figure, path)
