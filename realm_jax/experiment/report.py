"""What a run shows: plots as image files, and tables in Markdown. Called by the scripts in `experiments/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float = 7, height: float = 4.2) -> Figure:
    """An empty figure, in inches, that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """The figure as an image file; the suffix chooses the format. Plain axes get a light grid and no box."""
    for axes in figure.axes:
        if not axes.images and axes.get_label() != "<colorbar>":
            axes.grid(True, alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return Path(path)


def plot_curves(
    path: str | Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str = "",
    x_label: str = "step",
    y_label: str = "loss",
    log_y: bool = False,
) -> Path:
    """A line plot as an image file (the suffix chooses the format); `curves` is label -> (x, y). Needs no display."""
    figure = new_figure()
    axes = figure.add_subplot()
    for label, (x, y) in curves.items():
        axes.plot(x, y, label=label, linewidth=1.5, marker="o" if len(x) == 1 else None)
    axes.set(title=title, xlabel=x_label, ylabel=y_label, yscale="log" if log_y else "linear")
    if curves:
        axes.legend(frameon=False)
    return save_figure(figure, path)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first column is flush left, the others flush right."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows))


def describe_run(environment: Mapping[str, Any]) -> str:
    """One line about an `environment.json`: the command, the device, the versions that matter."""
    packages = environment["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("realm-jax", "jax", "numpy") if packages.get(name))
    device = ", ".join(sorted(set(environment["devices"])))
    command = " ".join(environment["command"])
    return f"`{command}` on {device} ({environment['cpus']} CPUs), Python {environment['python']}, {versions}"
