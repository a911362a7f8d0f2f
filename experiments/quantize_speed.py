"""How fast weights are quantized, beside llama.cpp's quantizers on the same machine in the same run.

    python experiments/quantize_speed.py [CONFIG] [--set KEY=VALUE ...]

Ours: `realm_jax.quantize` from float32 weights to ggml's bytes in host memory, on JAX's default device; the weights are
a JAX array on a CPU, and come from the host on a GPU, where from weights on the device to planes on it is timed too.
llama.cpp's: `ggml_quantize_chunk` of the library that llama-cpp-python brings, rows shared out to as many threads as
there are CPUs; left out where that is not installed (pip install llama-cpp-python). A second run of each is timed until
`seconds` are over; the best counts, as the speed that the machine can give. The first call, which compiles, is shown
apart. results.md has the table.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.errors import RealmError
from realm_jax.experiment import Run, experiment_command, read_json
from realm_jax.experiment.report import describe_run, markdown_table
from realm_jax.gguf.types import TYPE_BY_NAME
from realm_jax.quant import DENSE_FORMATS, FORMATS, QuantizedTensor, quantize, raw_bytes


@dataclass(frozen=True)
class QuantizeSpeedConfig:
    """rows, width: of the matrix of normal weights. formats: all with an encoder where none is named.

    importance: also with an importance matrix, for formats that heed one. seconds: how long each is measured.
    model: time this many weights, in matrices of rows x width one after another, from the device to the device, in
    `model_format`; 0 leaves that out.
    """

    rows: int = 1024
    width: int = 4096
    formats: tuple[str, ...] = ()
    importance: bool = True
    method: str = "refine"
    seconds: float = 1.0
    seed: int = 0
    model: int = 0
    model_format: str = "Q4_K"

    def __post_init__(self) -> None:
        able = encodable()
        for name in (*self.formats, self.model_format):
            if name not in able:
                raise RealmError(f"format {name!r} has no encoder; these have one: {', '.join(able)}")


NO_IMPORTANCE = ("F16", "BF16", "Q8_0", "Q8_1", "Q8_K", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4")


def encodable() -> list[str]:
    return ["F16", "BF16", *(name for name, kind in FORMATS.items() if kind.encode)]


def main(config: QuantizeSpeedConfig, run: Run) -> None:
    """Time every encoder, and llama.cpp's quantizers beside them."""
    rng = np.random.default_rng(config.seed)
    w = rng.standard_normal((config.rows, config.width), np.float32)
    importance = np.exp(rng.standard_normal(config.width)).astype(np.float32)
    peer = Peer.find()
    for name in config.formats or encodable():
        for matrix in (None, importance)[: 1 if name in NO_IMPORTANCE or not config.importance else 2]:
            run.log(**measure(config, name, w, matrix, peer))
    if config.model:
        run.log(**measure_model(config, jnp.asarray(w)))
    text = results(run.metrics(), read_json(run.folder / "environment.json"))
    run.save_text("results.md", text)
    click.echo(text)


def measure(
    config: QuantizeSpeedConfig, name: str, w: np.ndarray, importance: np.ndarray | None, peer: Peer | None
) -> dict:
    """One line of metrics: values a second of ours and of llama.cpp's."""

    def encode(weights: np.ndarray | jax.Array) -> QuantizedTensor | jax.Array:
        made = quantize(weights, name, importance=None if name in DENSE_FORMATS else importance, method=config.method)
        return jax.block_until_ready(made)

    on_cpu = jax.default_backend() == "cpu"
    source = jnp.asarray(w) if on_cpu else w
    start = time.perf_counter()
    encode(source)
    line = {"format": name, "importance": importance is not None, "first_seconds": time.perf_counter() - start}
    line["bytes_per_second"] = w.size / best_time(lambda: raw_bytes(encode(source)), config.seconds)
    if not on_cpu:
        on_device = jnp.asarray(w)
        line["on_device_per_second"] = w.size / best_time(lambda: encode(on_device), config.seconds)
    if peer and peer.knows(name):
        line["peer_per_second"] = w.size / best_time(lambda: peer.quantize(w, name, importance), config.seconds)
        line["ratio"] = line["bytes_per_second"] / line["peer_per_second"]
    return line


def measure_model(config: QuantizeSpeedConfig, w: jax.Array) -> dict[str, object]:
    """Seconds for as many weights as a whole model has, each matrix another one, all planes made and dropped."""
    count = -(-config.model // w.size)
    jax.block_until_ready(quantize(w, config.model_format, method=config.method))
    seconds = 0.0
    for i in range(count):
        matrix = jax.block_until_ready(w * (1 + i / count))
        start = time.perf_counter()
        jax.block_until_ready(quantize(matrix, config.model_format, method=config.method))
        seconds += time.perf_counter() - start
    return {"model_format": config.model_format, "weights": count * w.size, "model_seconds": seconds}


def best_time(work: Callable[[], object], seconds: float) -> float:
    """The least time that `work` took, in at least three runs."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


class Peer:
    """llama.cpp's quantizers, by ctypes."""

    def __init__(self, library: Path):
        self.threads = os.cpu_count() or 1
        self._ggml = ctypes.CDLL(str(library))
        pointers, sizes = [ctypes.c_void_p] * 2, [ctypes.c_int64] * 3
        self._ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, *pointers, *sizes, ctypes.c_void_p]
        self._ggml.ggml_quantize_chunk.restype = ctypes.c_size_t

    @classmethod
    def find(cls) -> Peer | None:
        """The library of an installed llama-cpp-python, or None."""
        package = importlib.util.find_spec("llama_cpp")
        libraries = sorted(Path(package.origin).parent.rglob("libggml-base.*")) if package and package.origin else []
        return cls(libraries[0]) if libraries else None

    def knows(self, name: str) -> bool:
        """llama.cpp makes Q8_1 and Q8_K of activations only."""
        return name not in ("Q8_1", "Q8_K")

    def quantize(self, w: np.ndarray, name: str, importance: np.ndarray | None) -> np.ndarray:
        """Rows (N, K), float32, as uint8 (N, bytes)."""
        kind = TYPE_BY_NAME[name]
        blocks = np.empty((len(w), kind.row_bytes(w.shape[1])), np.uint8)
        matrix = None if importance is None else importance.ctypes.data

        def work(start: int, count: int) -> None:
            self._ggml.ggml_quantize_chunk(
                kind.id, w.ctypes.data, blocks.ctypes.data, start * w.shape[1], count, w.shape[1], matrix
            )

        edges = np.linspace(0, len(w), self.threads + 1).astype(int)
        workers = [threading.Thread(target=work, args=(int(a), int(b - a))) for a, b in pairwise(edges)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return blocks


def results(lines: list[dict[str, Any]], environment: dict[str, Any]) -> str:
    """The metrics as Markdown."""
    header = ["format", "importance", "million weights/s", "llama.cpp", "ratio", "first call, s"]
    on_device = any("on_device_per_second" in line for line in lines)
    if on_device:
        header.insert(3, "on the device")
    rows, notes = [], []
    for line in lines:
        if "model_seconds" in line:
            billions = line["weights"] / 1e9
            notes.append(f"{billions:.2f} billion weights to {line['model_format']}: {line['model_seconds']:.2f} s")
            continue
        speeds = [line.get(key) for key in ("bytes_per_second", "on_device_per_second", "peer_per_second")]
        speeds = ["" if speed is None else f"{speed / 1e6:.0f}" for speed in speeds]
        ratio = f"{line['ratio']:.2f}" if "ratio" in line else ""
        cells = [*(speeds if on_device else (speeds[0], speeds[2])), ratio, f"{line['first_seconds']:.1f}"]
        rows.append([line["format"], "yes" if line["importance"] else "", *cells])
    return "\n".join([markdown_table(header, rows), *notes, describe_run(environment)]) + "\n"


command = experiment_command(main, QuantizeSpeedConfig, Path(__file__).parents[1] / "configs" / "quantize_speed.toml")

if __name__ == "__main__":
    command()
