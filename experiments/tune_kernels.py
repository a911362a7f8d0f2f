"""Tile sizes of the product by few rows, found by measuring on this GPU, as the JSON that the package reads.

    python experiments/tune_kernels.py [CONFIG] [--set 'formats=["Q4_K"]' ...] [--set out=realm_jax/kernels/tiles.json]

For each format and class of shape every candidate (warps x stages) is timed at the first number of rows, and the best
few, with each number of warps across, at all of them; the one whose weighted times are the least is taken. That one is
compared with dequantizing first at growing numbers of rows: `most_rows` is the last up to which it is never slower.
In int8 arithmetic, which has no other way for many rows and none across, warps and stages are all.
After each format the file is merged into and written anew, so a run can be stopped and resumed, or do a few formats at
a time. results.md has all times, as `product_times` measures them.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click
import jax

from product_times import Loop, Product, compile_loop, random_rows, random_weights
from realm_jax.errors import RealmError
from realm_jax.experiment import Run, experiment_command, read_json
from realm_jax.experiment.report import describe_run, markdown_table
from realm_jax.kernels import dense, pallas, tiles, triton_int8, triton_matmul
from realm_jax.kernels.tiles import Tiles
from realm_jax.quant import FORMATS, QuantizedTensor

Line = dict[str, Any]
MOST, LEAST = (pick(tiles.ALLOWED["most_rows"][0]) for pick in (max, min))
NEVER = float("inf")
SEARCHED = ("warps", "stages", "across")


@dataclass(frozen=True)
class TuneKernelsConfig:
    """See configs/tune_kernels.toml for what each key is."""

    formats: tuple[str, ...] = ("Q4_K",)
    arithmetic: Literal["float", "int8"] = "float"
    shapes: tuple[tuple[int, int], ...] = ((4096, 4096),)
    warps: tuple[int, ...] = (4, 8)
    stages: tuple[int, ...] = (3,)
    across: tuple[int, ...] = (8,)
    rows: tuple[int, ...] = (1, 8, 64)
    weights: tuple[float, ...] = (0.6, 0.2, 0.2)
    finalists: int = 3
    many_rows: tuple[int, ...] = (64, 128, 256)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    gigabytes: float = 0.25
    rounds: int = 8
    repeats: int = 5
    out: str = ""

    def __post_init__(self) -> None:
        for name in self.formats:
            if name not in FORMATS:
                raise RealmError(f"formats: {name!r} is not known; take some of {', '.join(FORMATS)}")
        asked = {key: getattr(self, key.replace("most", "many")) for key in tiles.ALLOWED}
        for key, numbers in asked.items():
            allowed, spoken = tiles.ALLOWED[key]
            if not numbers or not set(numbers) <= set(allowed):
                raise RealmError(f"{key.replace('most', 'many')}: {list(numbers)} has to be some of {spoken}")
        classes = [tiles.shape_class(*shape) for shape in self.shapes]
        if len(set(classes)) < len(classes) or not classes:
            raise RealmError(f"shapes: want at least one, each of another class; these are of {'; '.join(classes)}")
        if len(self.rows) != len(self.weights) or not self.rows or min(self.rows) < 1:
            raise RealmError(f"weights: want one for each of rows {list(self.rows)}, not {list(self.weights)}")
        if list(self.many_rows) != sorted(set(self.many_rows)) or min(self.finalists, self.rounds, self.repeats) < 1:
            raise RealmError("many_rows: want them growing; finalists, rounds and repeats: want 1 at least")


class Case(NamedTuple):
    """A product to be timed. rows: of x."""

    product: Product
    rows: int
    weights: list[QuantizedTensor]


def main(config: TuneKernelsConfig, run: Run) -> None:
    """Find the tile sizes of each format and class of shapes on this GPU, and write them as JSON."""
    if not pallas.available():
        raise RealmError("tune_kernels: the kernel needs an NVIDIA GPU from Ampere up, and there is none here")
    out = Path(config.out) if config.out else run.folder / "tiles.json"
    known(out)  # a broken file is reported before anything is measured
    chosen = [line["format"] for line in run.metrics() if line["kind"] == "choice"]
    done = {name for name in chosen if chosen.count(name) == len(config.shapes)}
    run.keep_metrics(lambda line: line["format"] in done)
    for name in config.formats:
        if tiles.entry_name(name, config.arithmetic) not in done:
            began = time.perf_counter()
            for line in tune(config, name):
                run.log(**line, device=jax.devices()[0].device_kind)
            click.echo(f"{name}: {time.perf_counter() - began:.0f} s")
        report(run, out)
    click.echo(f"{run.folder / 'results.md'}\n{out}")


def known(path: Path) -> tiles.Table:
    """The entries of a file that may not be there yet."""
    return tiles.read(path) if path.exists() else {}


# --- measuring -------------------------------------------------------------------------------------------------------


def tune(config: TuneKernelsConfig, name: str) -> list[Line]:
    """Lines of metrics.jsonl for a format: of every candidate, of the comparison with dense, and a choice a shape."""
    with ThreadPoolExecutor() as pool:
        make = functools.partial(random_weights, name, gigabytes=config.gigabytes)
        weights = dict(zip(config.shapes, pool.map(make, config.shapes), strict=True))
        weights = {shape: [w.replace(arithmetic=config.arithmetic) for w in own] for shape, own in weights.items()}
    int8 = config.arithmetic == "int8"
    across, most = ((0,), LEAST) if int8 else (config.across, MOST)
    candidates = [Tiles(*pair, most, across[0]) for pair in itertools.product(config.warps, config.stages)]
    pairs = [(shape, tiles_) for shape in config.shapes for tiles_ in candidates]
    first = time_cases(config, [Case(fused(t), config.rows[0], weights[shape]) for shape, t in pairs])
    times = {(*pair, config.rows[0]): us for pair, us in zip(pairs, first, strict=True)}
    quickest = {shape: finalists(config, times, shape, name) for shape in config.shapes}
    finals = {shape: [t._replace(across=n) for t in quickest[shape] for n in across] for shape in config.shapes}
    more = [(shape, t, rows) for shape in config.shapes for t in finals[shape] for rows in config.rows]
    others = time_cases(config, [Case(fused(t), rows, weights[shape]) for shape, t, rows in more])
    times |= dict(zip(more, others, strict=True))
    best = {shape: cheapest(config, times, shape, finals[shape]) for shape in config.shapes}
    entry = tiles.entry_name(name, config.arithmetic)
    lines = [
        {"kind": "candidate", **about(entry, shape), "rows": rows, **sizes(t), "us": us,
         "bytes_per_second": weights[shape][0].nbytes / us * 1e6}
        for (shape, t, rows), us in times.items() if us < NEVER
    ]  # fmt: skip
    if int8:
        return lines + [{"kind": "choice", **about(entry, shape), **best[shape]._asdict()} for shape in config.shapes]
    return lines + [line for shape in config.shapes for line in compare(config, name, shape, best[shape], weights)]


def compare(
    config: TuneKernelsConfig, name: str, shape: tuple[int, int], best: Tiles, weights: dict[tuple[int, int], list]
) -> list[Line]:
    """Lines of fused against dense at each of many rows, and the choice that follows."""
    ways = (fused(best), dense.matmul)
    spent = time_cases(config, [Case(way, rows, weights[shape]) for rows in config.many_rows for way in ways])
    lines, most, won = [], LEAST, True
    for rows, own, other in zip(config.many_rows, spent[::2], spent[1::2], strict=True):
        own_us, other_us = (us if us < NEVER else None for us in (own, other))
        lines.append({"kind": "many", **about(name, shape), "rows": rows, "fused_us": own_us, "dense_us": other_us})
        won = won and own_us is not None and own <= other
        most = rows if won else most
    return [*lines, {"kind": "choice", **about(name, shape), **sizes(best), "most_rows": most}]


def time_cases(config: TuneKernelsConfig, cases: Sequence[Case]) -> list[float]:
    """Microseconds of each product, NEVER for what the device cannot run; all are compiled first, then timed."""

    def attempt(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except jax.errors.JaxRuntimeError as error:  # more shared memory or registers than there are
            click.echo(f"left out: {str(error).splitlines()[0]:.200}", err=True)
            return None

    def prepare(case: Case) -> Loop:
        x = random_rows(case.rows, case.weights[0].shape[1], config.dtype)
        return compile_loop(case.product, x, case.weights, config.rounds)

    with ThreadPoolExecutor() as pool:
        loops = list(pool.map(lambda case: attempt(lambda: prepare(case)), cases))
    times = [loop and attempt(lambda loop=loop: loop.seconds(config.repeats)) for loop in loops]
    return [NEVER if seconds is None else seconds * 1e6 for seconds in times]


def fused(sizes: Tiles) -> Product:
    """The product by the kernel with these tile sizes."""
    return functools.partial(product, tiles=sizes)


def product(x: jax.Array, w: QuantizedTensor, tiles: Tiles) -> jax.Array:
    return (triton_matmul if w.arithmetic == "float" else triton_int8).matmul(x, w, tiles)


def finalists(config: TuneKernelsConfig, times: dict, shape: tuple[int, int], name: str) -> list[Tiles]:
    """The candidates that are quickest at the first number of rows."""
    found = sorted((us, t) for (own, t, _), us in times.items() if own == shape and us < NEVER)
    if not found:
        raise RealmError(f"{name} {shape[0]} x {shape[1]}: no candidate runs on this device")
    return [t for _, t in found[: config.finalists]]


def cheapest(config: TuneKernelsConfig, times: dict, shape: tuple[int, int], finals: list[Tiles]) -> Tiles:
    """The finalist of the least weighted time, each number of rows in units of the quickest there."""

    best = {rows: min(times[shape, t, rows] for t in finals) for rows in config.rows}

    def cost(t: Tiles) -> float:
        pairs = zip(config.rows, config.weights, strict=True)
        return sum(weight * times[shape, t, rows] / best[rows] for rows, weight in pairs if best[rows] < NEVER)

    return min(finals, key=cost)


def about(name: str, shape: tuple[int, int]) -> Line:
    return {"format": name, "outputs": shape[0], "inputs": shape[1]}


def sizes(chosen: Tiles) -> Line:
    return {key: getattr(chosen, key) for key in SEARCHED}


# --- what it leaves --------------------------------------------------------------------------------------------------


def report(run: Run, out: Path) -> None:
    """Write the tile sizes found so far, merged into what `out` has, and the tables of results.md."""
    lines = run.metrics()
    choices = [line for line in lines if line["kind"] == "choice"]
    found: tiles.Table = {}
    for line in choices:
        entry = {tiles.shape_class(line["outputs"], line["inputs"]): Tiles(*(line[key] for key in Tiles._fields))}
        found = tiles.merged(found, {line["device"]: {line["format"]: entry}})
    try:
        out.write_text(tiles.to_text(tiles.merged(known(out), found)), encoding="utf-8")
    except OSError as error:
        raise RealmError(f"{out}: cannot write the tile sizes: {error.strerror}") from error
    made = f"Made by {describe_run(read_json(run.folder / 'environment.json'))}."
    run.save_text("results.md", "\n\n".join([made, *tables(lines, choices)]))


def tables(lines: list[Line], choices: list[Line]) -> list[str]:
    """Choices; candidates, the best of each shape first; fused against dense."""
    chosen = {key(line): tuple(line[name] for name in SEARCHED) for line in choices}
    groups: dict[tuple, dict[int, Line]] = {}
    for line in lines:
        if line["kind"] == "candidate":
            groups.setdefault((*key(line), *(line[name] for name in SEARCHED)), {})[line["rows"]] = line
    counts = list(dict.fromkeys(rows for group in groups.values() for rows in group))
    rows = []
    for place, group in sorted(groups.items(), key=lambda one: (one[0][:3], one[1][counts[0]]["us"])):
        spent = [f"{group[count]['us']:.1f}" if count in group else "" for count in counts]
        rate = f"{group[counts[0]]['bytes_per_second'] / 1e9:.0f}"
        rows.append([*map(str, place), *spent, rate, "x" if chosen.get(place[:3]) == place[3:] else ""])
    shape = ("format", "outputs", "inputs")
    header = (*shape, *SEARCHED, *(f"us, rows {count}" for count in counts), "GB/s", "chosen")
    many = [
        [*map(str, key(line)), str(line["rows"]), *(shown(line[way]) for way in ("fused_us", "dense_us"))]
        for line in lines
        if line["kind"] == "many"
    ]
    found = [[*map(str, key(line)), *(str(line[field]) for field in Tiles._fields)] for line in choices]
    return [
        markdown_table((*shape, *Tiles._fields), found),
        markdown_table(header, rows),
        markdown_table((*shape, "rows", "fused, us", "dense, us"), many),
    ]


def key(line: Line) -> tuple[str, int, int]:
    return line["format"], line["outputs"], line["inputs"]


def shown(us: float | None) -> str:
    return "-" if us is None else f"{us:.1f}"


DEFAULT = Path(__file__).parents[1] / "configs" / "tune_kernels.toml"
command = experiment_command(main, TuneKernelsConfig, DEFAULT)

if __name__ == "__main__":
    command()
