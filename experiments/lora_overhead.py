"""What adapters cost a decoding step: none, one for all rows, and a stack of which every row takes its own.

    python experiments/lora_overhead.py [CONFIG] [--set random.layers=4 --set context=512 ...] [--name NAME]

`lora.select` gathers the deltas of the rows before the loop: each row has a copy of its adapter's, however
few different ones there are, and every step reads all copies. That is what a batch with adapters takes in memory beside
weights and cache, (rows) * (bytes of an adapter), and what the column "bytes" counts. A kernel that reads each
different adapter once would read what "least" counts. Both are sums over what a step must read from memory: packed
weights, keys and values, deltas; over the same without deltas.

One compiled program each for no adapter, one adapter, and a stack; all are run in turn, in an order of its own in each
repeat, from copies of one state. Times are medians with quartiles over the repeats; ratios are taken within a repeat.
results.md has the table, results.json the numbers, overhead.png the plot.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from lora_overhead_report import plot_overhead, results, summarize
from quant_setup import known_formats
from realm_jax import lora
from realm_jax.decode import buckets
from realm_jax.decode.loop import DecodeState, decode, init_state
from realm_jax.decode.settings import Settings
from realm_jax.errors import RealmError
from realm_jax.experiment import Run, experiment_command, read_json
from realm_jax.kernels.matmul import choose_impl
from realm_jax.model import Config, Model, Params, Rope, load
from realm_jax.model.model import Origin
from realm_jax.model.params import build_params, tensor_specs
from realm_jax.quant import quantize


@dataclass(frozen=True)
class RandomConfig:
    """Sizes of a llama of random weights; layers = 0 for none. format: of all matrices."""

    layers: int = 0
    width: int = 4096
    ffn_width: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocab_size: int = 4096
    format: str = "Q4_K"

    def __post_init__(self):
        if self.format not in known_formats():
            raise RealmError(f"random.format: {self.format!r} is none; known: {', '.join(known_formats())}")


@dataclass(frozen=True)
class LoraOverheadConfig:
    """model: a GGUF file, the bundled one where not given. adapters: how many different ones a batch has, each at most
    `batch` rows; 0 for a stack that no row takes anything from. dtype: of the adapters. context: tokens in the cache
    before the first step. steps: timed together. repeats: of each.
    """

    adapters: tuple[int, ...] = (0, 1, 8, 64)
    batch: int = 64
    rank: int = 16
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    dtype: Literal["float32", "bfloat16"] = "float32"
    context: int = 64
    steps: int = 8
    repeats: int = 7
    seed: int = 0
    model: Path | None = None
    random: RandomConfig = field(default_factory=RandomConfig)

    def __post_init__(self):
        for name in ("batch", "context", "steps", "repeats"):
            if getattr(self, name) < 1:
                raise RealmError(f"{name} is {getattr(self, name)}; want at least 1")
        for count in self.adapters:
            if not 0 <= count <= self.batch:
                raise RealmError(f"adapters: {count} different ones in a batch of {self.batch} rows; want 0 to that")


class Way(NamedTuple):
    """One thing to time. adapters: how many different ones, None for no stack. deltas: makes what the loop gets."""

    name: str
    adapters: int | None
    deltas: Callable[[], Params | None]


def main(config: LoraOverheadConfig, run: Run) -> None:
    """Time a decoding step with no adapter, with one for all rows, and with several in a batch."""
    console = Console(stderr=True, highlight=False)
    model = random_model(config.random, config) if config.random.layers else load(config.model)
    start = start_state(model, config)
    ways = make_ways(model, config)
    console.print(f"{model!r}; run directory: {run.folder}")
    run.keep_metrics(lambda line: False)  # times of two runs are not to be mixed
    programs = {way.name: compiled(model, start, way, config) for way in ways}
    for repeat in range(-1, config.repeats):  # the first is to warm up
        for way in random.Random(f"{config.seed} {repeat}").sample(ways, len(ways)):
            line = time_once(model, start, way, programs[way.name], config)
            if repeat >= 0:
                run.log(repeat=repeat, **line)
        console.print(f"repeat {repeat + 1} of {config.repeats}")
    summary = summarize(run.metrics(), [way.name for way in ways])
    for way in ways:
        summary[way.name] |= byte_counts(model, start, way) | {"temporary_bytes": temporary(programs[way.name])}
    about = describe(model, config)
    run.save_json("results.json", {"about": about, "ways": summary})
    table = results(summary, about, read_json(run.folder / "environment.json"))
    run.save_text("results.md", table)
    plot_overhead(run.folder / "overhead.png", summary)
    console.print(table, soft_wrap=True)


# --- what is timed ---------------------------------------------------------------------------------------------------


def random_model(sizes: RandomConfig, config: LoraOverheadConfig) -> Model:
    """A llama whose matrices repeat 64 random rows: made in no time, and as slow as any other."""
    head_width = sizes.width // sizes.heads
    made = Config(
        architecture="llama", vocab_size=sizes.vocab_size, context_length=config.context + config.steps + 1,
        layers=sizes.layers, width=sizes.width, ffn_width=sizes.ffn_width, heads=sizes.heads, kv_heads=sizes.kv_heads,
        head_width=head_width, norm_eps=1e-5, rope=Rope(dimensions=head_width, base=500000.0),
    )  # fmt: skip
    rng, weights = np.random.default_rng(config.seed), {}
    for spec in tensor_specs(made):
        if spec.optional:
            continue
        if len(spec.shape) == 1:
            weights[spec.path] = jnp.ones(spec.shape, jnp.float32)
            continue
        N, K = spec.shape
        tile = quantize(rng.normal(size=(64, K)).astype(np.float32) * K**-0.5, sizes.format)
        weights[spec.path] = jax.tree.map(lambda plane, N=N: jnp.take(plane, jnp.arange(N) % 64, axis=0), tile)
    source = f"random weights, {sizes.layers} layers of width {sizes.width}, {sizes.format}"
    return Model(build_params(made, weights), made, None, Origin(source, {}))


def start_state(model: Model, config: LoraOverheadConfig) -> DecodeState:
    """Rows that have `context` tokens in the cache, as if they had been through the model, and one pending."""
    rng = np.random.default_rng(config.seed)
    size = config.context + config.steps + 1
    if size > model.config.context_length:
        raise RealmError(f"context and steps make {size} tokens; {model!r}")
    prompts = rng.integers(0, model.config.vocab_size, (config.batch, config.context + 1)).tolist()
    settings = [Settings(max_new_tokens=config.steps)] * config.batch
    state = init_state(model.config, prompts, settings, size=buckets.cache_bucket(size))
    return state.replace(cache=state.cache.replace(length_B=state.length_B - 1))


def make_ways(model: Model, config: LoraOverheadConfig) -> list[Way]:
    """No adapter, one for all rows, and each number of different ones."""
    many = [random_adapter(model, config, i) for i in range(max(1, *config.adapters))]
    stack = lora.stack(many, model)

    def chosen(count: int) -> Callable[[], Params]:
        index_B = np.arange(config.batch) % count + 1 if count else np.zeros(config.batch, int)
        return lambda: lora.select(stack, index_B)

    ways = [Way("none", None, lambda: None), Way("one for all rows", None, lambda: many[0].deltas)]
    return ways + [Way(f"stack, {count} in use", count, chosen(count)) for count in config.adapters]


def random_adapter(model: Model, config: LoraOverheadConfig, seed: int) -> lora.Adapter:
    """An adapter that changes what the model says, a little."""
    key = jax.random.key(seed)
    adapter = lora.init_adapter(model, key, rank=config.rank, alpha=config.rank, targets=config.targets)
    dtype = jnp.dtype(config.dtype)

    def changed(delta: lora.Delta) -> lora.Delta:
        b = 1e-3 * jax.random.normal(key, delta.b.shape)
        return delta.replace(a=delta.a.astype(dtype), b=b.astype(dtype))

    return adapter.map(changed)


def compiled(model: Model, start: DecodeState, way: Way, config: LoraOverheadConfig) -> Any:
    """The loop for the shapes of a way, compiled ahead; ways of the same shapes share what JAX keeps."""
    steps = jnp.int32(config.steps)
    return decode.lower(model.params, model.config, start, steps, way.deltas()).compile()


def time_once(model: Model, start: DecodeState, way: Way, program: Any, config: LoraOverheadConfig) -> dict[str, Any]:
    """Seconds to gather the deltas of the rows, once a batch, and seconds a step."""
    steps = jnp.int32(config.steps)
    state = jax.block_until_ready(jax.tree.map(jnp.copy, start))  # the loop takes its buffers
    started = time.perf_counter()
    deltas = jax.block_until_ready(way.deltas())
    gathered = time.perf_counter()
    done = jax.block_until_ready(program(model.params, state, steps, deltas))
    ended = time.perf_counter()
    if not bool((done.length_B == start.length_B + config.steps).all()):
        raise RealmError(f"{way.name}: rows ended before the last step; their logits are not finite")
    seconds = (ended - gathered) / config.steps
    return {"way": way.name, "adapters": way.adapters, "seconds": seconds, "select_seconds": gathered - started}


def temporary(program: Any) -> int | None:
    """Bytes that the compiled loop takes beside its arguments and results, where the backend says."""
    analysis = program.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def byte_counts(model: Model, start: DecodeState, way: Way) -> dict[str, Any]:
    """Bytes a step reads: weights, keys and values, the deltas as they are, and each different adapter once."""
    params, rows = model.params, start.length_B.shape[0]
    weights = nbytes(params)
    if params.output is not None:  # then only a row of the embedding for each token is read
        weights -= nbytes(params.embedding) * (1 - rows / params.embedding.shape[0])
    cache = start.cache.k.nbytes + start.cache.v.nbytes
    deltas = nbytes(way.deltas())
    least = deltas if way.adapters is None else deltas // rows * way.adapters
    base = weights + cache
    counts = {"weight_bytes": int(weights), "cache_bytes": cache, "delta_bytes": deltas, "least_delta_bytes": least}
    return counts | {"byte_ratio": (base + deltas) / base, "least_byte_ratio": (base + least) / base}


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def describe(model: Model, config: LoraOverheadConfig) -> str:
    """What was timed, in one line."""
    layer = model.params.layers[0]
    weights = (layer.attn.q, layer.ffn.gate, layer.ffn.down)
    impls = sorted({choose_impl((config.batch, 1, w.shape[1]), w) for w in weights})
    return (
        f"{model!r}; {config.batch} rows with {config.context} tokens in the cache, {config.steps} steps at a time, "
        f"{config.repeats} repeats; adapters of rank {config.rank} in {config.dtype} on {', '.join(config.targets)}; "
        f"matmul by packed weights: {'+'.join(impls)}"
    )


command = experiment_command(main, LoraOverheadConfig, Path(__file__).parents[1] / "configs" / "lora_overhead.toml")

if __name__ == "__main__":
    command()
