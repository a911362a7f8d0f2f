"""The statistics, tables and plots of `quant_sensitivity.py`, all from the lines of its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from quant_setup import with_error
from realm_jax.evaluate import Estimate
from realm_jax.experiment import describe_run, markdown_table, new_figure, save_figure

ESTIMATES = {  # key of a line -> what it is
    "squared": "relative squared error",
    "diagonal": "diagonal Fisher",
    "directional": "directional Fisher",
}
MARKERS = "osD^v<>*"
Line = dict[str, Any]


def results(about: str, lines: list[Line], environment: dict[str, Any]) -> str:
    """All tables in Markdown, and what they were made with."""
    swaps = [line for line in lines if line["kind"] == "swap"]
    return (
        f"Made by {describe_run(environment)}.\n\n"
        f"Model: {about}. KL in nats a token, with standard errors over chunks.\n\n"
        f"## One tensor at a time\n\n{kinds_table(lines)}\n{tensors_table(swaps)}\n"
        f"## How well estimates tell\n\n{estimates_table(lines)}\n{slopes_table(lines)}\n"
        f"## Mixes\n\n{mixes_table(lines)}"
    )


# --- tables ----------------------------------------------------------------------------------------------------------


def kinds_table(lines: list[Line]) -> str:
    """KL by kind of tensor, mean over layers and range; then all tensors added up, and all at once."""
    swaps = [line for line in lines if line["kind"] == "swap"]
    formats = sorted({line["format"] for line in swaps})
    whole = {line["name"]: line for line in lines if line["kind"] == "mix" and line["by"] == "uniform"}
    rows = []
    for kind in dict.fromkeys(kind_of(line["tensor"]) for line in swaps):
        row = [kind]
        for format in formats:
            kl = [line["kl"] for line in swaps if kind_of(line["tensor"]) == kind and line["format"] == format]
            span = f" ({min(kl):.2g} to {max(kl):.2g})" if len(kl) > 1 else ""
            row.append(f"{np.mean(kl):.2g}{span}")
        rows.append(row)
    sums = [sum(line["kl"] for line in swaps if line["format"] == format) for format in formats]
    rows.append(["all tensors, added up", *(f"{kl:.3g}" for kl in sums)])
    rows.append(["all tensors at once", *(with_error(whole[f]["kl"], whole[f]["kl_chunk_error"]) for f in formats)])
    return markdown_table(["kind", *(f"{format}: mean over layers (range)" for format in formats)], rows)


def tensors_table(swaps: list[Line]) -> str:
    formats = sorted({line["format"] for line in swaps})
    measured = {(line["tensor"], line["format"]): with_error(line["kl"], line["kl_chunk_error"]) for line in swaps}
    rows = [[name, *(measured[name, f] for f in formats)] for name in dict.fromkeys(line["tensor"] for line in swaps)]
    return markdown_table(["tensor", *formats], rows)


def estimates_table(lines: list[Line]) -> str:
    """How each estimate goes with the measured KL, over all tensors: rank, logarithm, and factor."""
    rows = []
    for key, title in ESTIMATES.items():
        for format in [*dict.fromkeys(point["format"] for point in pairs(lines)), None]:
            x, y = columns([p for p in pairs(lines) if format in (None, p["format"])], key)
            factor = "" if key == "squared" else f"{np.exp(np.mean(np.log(y / x))):.2f}"
            numbers = (f"{spearman(x, y):.3f}", f"{np.corrcoef(np.log(x), np.log(y))[0, 1]:.3f}", factor)
            rows.append([title, format or "all", *numbers])
    return markdown_table(["estimate", "format", "Spearman", "Pearson of logs", "measured / estimate"], rows)


def slopes_table(lines: list[Line]) -> str:
    """The slope of log KL over log estimate, and their ratio, within each kind of tensor that has several."""
    rows = []
    for kind in dict.fromkeys(kind_of(point["tensor"]) for point in pairs(lines)):
        points = [point for point in pairs(lines) if kind_of(point["tensor"]) == kind]
        if len(points) < 3:
            continue
        row = [kind, str(len(points))]
        for key in ("diagonal", "directional"):
            x, y = (np.log(column) for column in columns(points, key))
            row += [f"{np.polyfit(x, y, 1)[0]:.2f}", f"{np.exp(np.mean(y - x)):.2f}"]
        rows.append(row)
    header = ["kind", "points", "slope, diagonal", "ratio, diagonal", "slope, directional", "ratio, directional"]
    return markdown_table(header, rows)


def mixes_table(lines: list[Line]) -> str:
    """For each budget: the model that sets it, then the mixes chosen within its size."""
    rows = []
    for rival, *others in comparisons(lines):
        for line in (rival, *others):
            rows.append(
                [
                    title_of(line),
                    f"{line['bytes'] / 1e6:.3f}",
                    f"{line['bits_per_weight']:.3f}",
                    with_error(line["kl"], line["kl_chunk_error"]),
                    "" if line is rival else against(line, rival),
                    with_error(line["predicted"], line["predicted_error"]) if "predicted" in line else "",
                    f"{100 * line['top1']:.2f}%",
                ]
            )
    header = ["formats", "MB", "bits", "KL", "change of KL", "KL predicted", "same top token"]
    return markdown_table(header, rows)


def title_of(mix: Line) -> str:
    if mix["by"] == "uniform":
        return f"{mix['name']} for all"
    return f"llama.cpp's {mix['name']}" if mix["by"] == "llama.cpp" else f"chosen by {mix['by']} Fisher"


def against(mix: Line, rival: Line) -> str:
    """The change of mean KL in per cent, with the standard error of the paired differences of chunks."""
    gain = Estimate.of(np.array(mix["kl_chunks"]) - np.array(rival["kl_chunks"]))
    return f"{100 * gain.mean / rival['kl']:+.0f}% ± {100 * gain.error / rival['kl']:.0f}%"


def comparisons(lines: list[Line]) -> list[list[Line]]:
    """For each budget: the model that sets it, then the mixes chosen within its size."""
    mixes = [line for line in lines if line["kind"] == "mix"]
    groups: dict[str, list[Line]] = {}
    for mix in mixes:
        if mix["by"] in ESTIMATES:
            rival = next(other for other in mixes if other["name"] == mix["name"])  # as the experiment looks it up
            groups.setdefault(mix["name"], [rival]).append(mix)
    return list(groups.values())


# --- statistics ------------------------------------------------------------------------------------------------------


def kind_of(tensor: str) -> str:
    """`blk.3.attn_q.weight` -> `attn_q`."""
    return tensor.removesuffix(".weight").split(".")[-1]


def layer_of(tensor: str) -> int | None:
    """`blk.3.attn_q.weight` -> 3; None for the embedding and the output matrix."""
    return int(tensor.split(".")[1]) if tensor.startswith("blk.") else None


def pairs(lines: list[Line]) -> list[Line]:
    """What was measured together with what was estimated, for each tensor and format of a swap."""
    estimates = {(line["tensor"], line["format"]): line for line in lines if line["kind"] == "estimate"}
    return [estimates[line["tensor"], line["format"]] | line for line in lines if line["kind"] == "swap"]


def columns(points: list[Line], key: str) -> tuple[np.ndarray, np.ndarray]:
    """An estimate and the measured KL."""
    return np.array([point[key] for point in points]), np.array([point["kl"] for point in points])


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """The correlation of ranks, of values without ties."""
    return float(np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1])


# --- plots -----------------------------------------------------------------------------------------------------------


def plot_heat_map(path: Path, lines: list[Line]) -> Path:
    """Measured KL by layer and kind, one panel a format; below it the tensors outside the layers."""
    swaps = [line for line in lines if line["kind"] == "swap"]
    formats = list(dict.fromkeys(line["format"] for line in swaps))
    inside = [line for line in swaps if layer_of(line["tensor"]) is not None]
    kinds = list(dict.fromkeys(kind_of(line["tensor"]) for line in inside))
    others = list(dict.fromkeys(line["tensor"] for line in swaps if layer_of(line["tensor"]) is None))
    layers = 1 + max(layer_of(line["tensor"]) for line in inside)
    figure = new_figure(5.5 * len(formats), 1.8 + 0.4 * layers)
    for axes, format in zip(figure.subplots(1, len(formats), squeeze=False)[0], formats, strict=True):
        kl = {line["tensor"]: line["kl"] for line in swaps if line["format"] == format}
        grid = np.full((layers + 1, max(len(kinds), len(others))), np.nan)
        for name, value in kl.items():
            layer = layer_of(name)
            row, column = (layers, others.index(name)) if layer is None else (layer, kinds.index(kind_of(name)))
            grid[row, column] = np.log10(value)
        image = axes.imshow(grid, aspect="auto", cmap="viridis")
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                label = f"{10**value:.0e}".replace("e-0", "e-")
                if row == layers:
                    label = f"{kind_of(others[column])}\n{label}"
                color = "black" if value > middle else "white"
                axes.text(column, row, label, ha="center", va="center", fontsize=6, color=color)
        axes.set_xticks(range(len(kinds)), labels=kinds, rotation=30)
        axes.set_yticks(range(layers + 1), labels=[*range(layers), "outside"])
        axes.set(title=f"one tensor in {format}", ylabel="layer")
        figure.colorbar(image, ax=axes, label="log10 of KL (nats a token)")
    return save_figure(figure, path)


def plot_estimates(path: Path, lines: list[Line]) -> Path:
    """Estimate against measured KL, a panel for each Fisher estimate, colours by kind, markers by format."""
    points = pairs(lines)
    kinds = list(dict.fromkeys(kind_of(point["tensor"]) for point in points))
    formats = list(dict.fromkeys(point["format"] for point in points))
    figure = new_figure(11, 5)
    for axes, key in zip(figure.subplots(1, 2, sharey=True), ("diagonal", "directional"), strict=True):
        for i, kind in enumerate(kinds):
            for format, marker in zip(formats, MARKERS, strict=False):
                part = [p for p in points if kind_of(p["tensor"]) == kind and p["format"] == format]
                x, y = columns(part, key)
                x_error = [p["directional_error"] for p in part] if key == "directional" else None
                y_error = [p["kl_chunk_error"] for p in part]
                axes.errorbar(x, y, y_error, x_error, fmt=marker, markersize=4, color=f"C{i}", alpha=0.8)
        ends = [min(min(columns(points, key)[0]), min(columns(points, key)[1])), max(columns(points, key)[1])]
        axes.plot(ends, ends, color="grey", linewidth=1, zorder=0)
        axes.set(xscale="log", yscale="log", title=ESTIMATES[key])
        axes.set_xlabel("KL estimated on the calibration text")
    figure.axes[0].set_ylabel("KL measured on the held-out text")
    for i, kind in enumerate(kinds):
        figure.axes[0].plot([], [], "o", color=f"C{i}", label=kind)
    for format, marker in zip(formats, MARKERS, strict=False):
        figure.axes[1].plot([], [], marker, color="grey", label=format)
    for axes in figure.axes:
        axes.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


def plot_mixes(path: Path, lines: list[Line]) -> Path:
    """Bits a weight against KL: models in one format, llama.cpp's mixes, and those chosen by an estimate."""
    mixes = [line for line in lines if line["kind"] == "mix"]
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    labels = {"uniform": "one format", "llama.cpp": "llama.cpp's mix"}
    for by in dict.fromkeys(line["by"] for line in mixes):
        part = sorted((line for line in mixes if line["by"] == by), key=lambda line: line["bits_per_weight"])
        x, y, error = ([line[key] for line in part] for key in ("bits_per_weight", "kl", "kl_chunk_error"))
        label = labels.get(by) or f"chosen by {ESTIMATES[by]}"
        style = {"uniform": "o-", "llama.cpp": "s", "diagonal": "v:", "directional": "D-"}[by]
        axes.errorbar(x, y, error, fmt=style, markersize=5, capsize=2, linewidth=1, label=label)
        for line in part if by in labels else ():
            at, offset = (line["bits_per_weight"], line["kl"]), (5, 4) if by == "uniform" else (-8, 7)
            axes.annotate(line["name"], at, xytext=offset, textcoords="offset points", fontsize=7)
    axes.set(xlabel="bits a weight", ylabel="KL from the float model (nats a token)", yscale="log")
    axes.legend(frameon=False)
    return save_figure(figure, path)
