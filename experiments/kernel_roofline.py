"""How near products by packed weights come to the speed of memory: GB/s of packed bytes, for each format and rows of x.

    python experiments/kernel_roofline.py [CONFIG] [--set 'formats=["Q4_K"]' ...]

All products of a round of the timed loop (`product_times`) share x and what is prepared of it. The share is of what the
device reads a second, measured in the same run. results.md has the table, kernel_roofline.png the plot.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import matplotlib.pyplot as plt

from product_times import compile_loop, random_rows, random_weights
from realm_jax import speed
from realm_jax.errors import RealmError
from realm_jax.experiment import Run, experiment_command, read_json
from realm_jax.experiment.report import describe_run, markdown_table
from realm_jax.kernels import IMPLEMENTATIONS, matmul
from realm_jax.quant import FORMATS

Line = dict[str, Any]
HEADER = ("format", "outputs", "inputs", "rows", "us", "GB/s", "share of the ceiling")


@dataclass(frozen=True)
class KernelRooflineConfig:
    """See configs/kernel_roofline.toml for what each key is."""

    formats: tuple[str, ...] = ("Q4_K",)
    shapes: tuple[tuple[int, int], ...] = ((28672, 4096),)
    rows: tuple[int, ...] = (1, 8, 64)
    impl: str = "triton"
    dtype: Literal["float32", "bfloat16"] = "float32"
    gigabytes: float = 1.0
    rounds: int = 4
    repeats: int = 10

    def __post_init__(self) -> None:
        for name in self.formats:
            if name not in FORMATS:
                raise RealmError(f"formats: {name!r} is not known; take some of {', '.join(FORMATS)}")
        if self.impl not in ("auto", *IMPLEMENTATIONS):
            raise RealmError(f"impl: {self.impl!r} is none; one of auto, {', '.join(IMPLEMENTATIONS)}")


def main(config: KernelRooflineConfig, run: Run) -> None:
    """Time products by packed weights over formats, shapes and rows, and compare with the speed of memory."""
    ceiling = speed.read_ceiling()
    for shape in config.shapes:
        for name in config.formats:
            for line in measure(config, name, tuple(shape)):
                run.log(**line, ceiling=ceiling)
    environment = read_json(run.folder / "environment.json")
    lines = run.metrics()
    table = markdown_table(HEADER, [row(line) for line in lines])
    text = f"Made by {describe_run(environment)}.\n\nRead ceiling: {ceiling / 1e9:.0f} GB/s.\n\n{table}"
    run.save_text("results.md", text)
    plot(lines, run.folder / "kernel_roofline.png")
    click.echo(text)


def measure(config: KernelRooflineConfig, name: str, shape: tuple[int, int]) -> list[Line]:
    """A line of metrics.jsonl for each number of rows; the programs are compiled side by side."""
    weights = random_weights(name, shape, config.gigabytes)
    if config.impl.endswith("_int8"):
        weights = [w.replace(arithmetic="int8") for w in weights]
    product = functools.partial(matmul, impl=config.impl)
    inputs = [random_rows(rows, shape[1], config.dtype) for rows in config.rows]
    with ThreadPoolExecutor() as pool:
        loops = list(pool.map(lambda x: compile_loop(product, x, weights, config.rounds), inputs))
    lines = []
    for loop in loops:
        spent = loop.seconds(config.repeats)
        lines.append(
            {
                "format": name, "outputs": shape[0], "inputs": shape[1], "rows": len(loop.x), "us": spent * 1e6,
                "bytes_per_second": weights[0].nbytes / spent,
            }
        )  # fmt: skip
    return lines


def row(line: Line) -> list[str]:
    """A line of the table."""
    rate = line["bytes_per_second"]
    names = ("format", "outputs", "inputs", "rows")
    return [*(str(line[n]) for n in names), f"{line['us']:.1f}", f"{rate / 1e9:.0f}", f"{rate / line['ceiling']:.0%}"]


def plot(lines: list[Line], path: Path) -> None:
    """The share of the ceiling over formats, a bar for each number of rows (of the first shape)."""
    lines = [line for line in lines if (line["outputs"], line["inputs"]) == (lines[0]["outputs"], lines[0]["inputs"])]
    formats, rows = (list(dict.fromkeys(line[key] for line in lines)) for key in ("format", "rows"))
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for i, count in enumerate(rows):
        shares = [line["bytes_per_second"] / line["ceiling"] for line in lines if line["rows"] == count]
        axes.bar([j + i * 0.8 / len(rows) for j in range(len(formats))], shares, 0.8 / len(rows), label=f"{count} rows")
    axes.set_xticks([j + 0.4 - 0.4 / len(rows) for j in range(len(formats))], formats, rotation=45)
    axes.set_ylabel("share of the read ceiling")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


DEFAULT = Path(__file__).parents[1] / "configs" / "kernel_roofline.toml"
command = experiment_command(main, KernelRooflineConfig, DEFAULT)

if __name__ == "__main__":
    command()
