"""How much error each method of encoding leaves, beside llama.cpp's quantizers on the same weights.

    python experiments/encode_error.py [CONFIG] [--set KEY=VALUE ...]

One line of metrics for each format, draw of weights, and with or without importance: the squared error that each method
leaves over the sum of squares, weighted by the importance where there is one, and the same of llama.cpp where
llama-cpp-python is installed. results.md has ratios to llama.cpp (to the method "search" without it): geometric means
over the draws, which are independent normal, Laplace and Student t (3 degrees of freedom) numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from quantize_speed import NO_IMPORTANCE, Peer, encodable
from realm_jax.errors import RealmError
from realm_jax.experiment import Run, experiment_command, read_json
from realm_jax.experiment.report import describe_run, markdown_table
from realm_jax.quant import METHODS, dequantize, quantize

SEARCHED = [name for name in encodable() if name not in NO_IMPORTANCE]


@dataclass(frozen=True)
class EncodeErrorConfig:
    """rows, width: of each matrix. formats: all that methods encode differently where none is named.

    spread: standard deviation of the logarithm of the importance.
    """

    rows: int = 256
    width: int = 4096
    formats: tuple[str, ...] = ()
    spread: float = 1.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.formats:
            if name not in SEARCHED:
                raise RealmError(f"format {name!r}: methods do not differ; they do in {', '.join(SEARCHED)}")


def main(config: EncodeErrorConfig, run: Run) -> None:
    """Measure the error of every method of encoding, beside llama.cpp's."""
    rng = np.random.default_rng(config.seed)
    shape = config.rows, config.width
    draws = {
        "normal": rng.standard_normal(shape),
        "laplace": rng.laplace(size=shape),
        "student_t3": rng.standard_t(3, shape),
    }
    importance = np.exp(config.spread * rng.standard_normal(config.width)).astype(np.float32)
    peer = Peer.find()
    for name in config.formats or SEARCHED:
        for draw, w in draws.items():
            for matrix in (None, importance):
                run.log(**measure(name, draw, w.astype(np.float32), matrix, peer))
    text = results(run.metrics(), read_json(run.folder / "environment.json"))
    run.save_text("results.md", text)
    click.echo(text)


def measure(name: str, draw: str, w: np.ndarray, importance: np.ndarray | None, peer: Peer | None) -> dict[str, Any]:
    """One line of metrics."""
    weights = np.ones(w.shape[1]) if importance is None else importance

    def relative(back: Any) -> float:
        off = np.square(np.asarray(back, np.float64) - w)
        return float((off * weights).sum() / (np.square(w, dtype=np.float64) * weights).sum())

    line = {"format": name, "draw": draw, "importance": importance is not None}
    for method in METHODS:
        line[method] = relative(quantize(w, name, importance=importance, method=method).dequantize())
    if peer:
        line["llama.cpp"] = relative(dequantize(peer.quantize(w, name, importance), name, w.shape))
    return line


def results(lines: list[dict[str, Any]], environment: dict[str, Any]) -> str:
    """The ratios as a Markdown table."""
    base = "llama.cpp" if "llama.cpp" in lines[0] else "search"
    kinds = [(method, important) for important in (False, True) for method in METHODS]
    header = ["format", *(f"{method}{', importance' if important else ''}" for method, important in kinds)]
    rows = []
    for name in dict.fromkeys(line["format"] for line in lines):
        cells = []
        for method, important in kinds:
            ratios = [
                line[method] / line[base]
                for line in lines
                if line["format"] == name and line["importance"] is important
            ]
            cells.append(f"{np.exp(np.mean(np.log(ratios))):.3f}")
        rows.append([name, *cells])
    return f"Squared error over that of {base}.\n\n{markdown_table(header, rows)}\n{describe_run(environment)}\n"


command = experiment_command(main, EncodeErrorConfig, Path(__file__).parents[1] / "configs" / "encode_error.toml")

if __name__ == "__main__":
    command()
