"""How near attention over a cache comes to the speed of memory: GB/s of valid keys and values, decoding and verifying.

    python experiments/attention_roofline.py [CONFIG] [--set KEY=VALUE ...]

All layers of a cache are read one after the other in one compiled program, each query being what the layer before gave,
so that nothing is read from the second-level cache of the card. The share is of what the device reads a second,
measured in the same run. results.md has the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp

from realm_jax import speed
from realm_jax.errors import RealmError
from realm_jax.experiment import Run, experiment_command, read_json
from realm_jax.experiment.report import describe_run, markdown_table
from realm_jax.kernels.attention import attention, choose_attention
from realm_jax.model import Config, KVCache, Rope
from realm_jax.model.cache import DTYPES

Line = dict[str, Any]
HEADER = ("cache", "rows", "places", "new tokens", "layers", "us a layer", "GB/s", "share of the ceiling", "kernel")


@dataclass(frozen=True)
class AttentionRooflineConfig:
    """heads, kv_heads, head_width: of the model (Llama 3.1 8B). dtypes: of caches. query_dtype: of activations.

    batches, lengths, tokens: rows, valid places of each, new tokens of each; in all combinations. gigabytes: what
    a program reads (one layer, if that is more). repeats: timed calls, of which the median counts.
    """

    heads: int = 32
    kv_heads: int = 8
    head_width: int = 128
    dtypes: tuple[str, ...] = ("bfloat16", "int8")
    query_dtype: str = "float32"
    batches: tuple[int, ...] = (1, 8, 64)
    lengths: tuple[int, ...] = (512, 4096, 32768)
    tokens: tuple[int, ...] = (1, 8)
    gigabytes: float = 1.0
    repeats: int = 20

    def __post_init__(self) -> None:
        for name in self.dtypes:
            if name not in DTYPES:
                raise RealmError(f"dtypes: a cache of {name!r} is not known; take some of {', '.join(DTYPES)}")


def main(config: AttentionRooflineConfig, run: Run) -> None:
    """Time attention over caches of several types, rows and lengths, and compare with the speed of memory."""
    ceiling = speed.read_ceiling() / 1e9
    cases = [(d, B, S, T) for d in config.dtypes for B in config.batches for S in config.lengths for T in config.tokens]
    for dtype, batch, length, tokens in cases:
        run.log(**measure(config, dtype, batch, length, tokens), ceiling=ceiling)
    environment = read_json(run.folder / "environment.json")
    rows = [row(line) for line in run.metrics()]
    text = (
        f"Made by {describe_run(environment)}.\n\nRead ceiling: {ceiling:.0f} GB/s.\n\n{markdown_table(HEADER, rows)}"
    )
    run.save_text("results.md", text)
    click.echo(text)


def measure(config: AttentionRooflineConfig, dtype: str, batch: int, length: int, tokens: int) -> Line:
    """One line of metrics.jsonl."""
    one = make_cache(config, dtype, 1, batch, length, shapes_only=True)
    layers = max(1, min(64, int(config.gigabytes * 1e9 / stored_bytes(one))))
    cache = make_cache(config, dtype, layers, batch, length)
    shape = (batch, tokens, config.heads, config.head_width)
    q = jax.random.normal(jax.random.key(0), shape, config.query_dtype)
    place = jnp.tile(jnp.arange(length - tokens, length, dtype=jnp.int32), (batch, 1))

    def step(q: jax.Array, cache: KVCache) -> jax.Array:
        for layer in range(layers):
            q = attention(
                q, cache.k, cache.v, place, scale=config.head_width**-0.5, layer=layer,
                k_scale_BSK=cache.k_scale, v_scale_BSK=cache.v_scale,
            )  # fmt: skip
        return q

    spent = speed.median_seconds(jax.jit(step), q, cache, repeats=config.repeats)
    return {
        "cache": dtype, "rows": batch, "places": length, "tokens": tokens, "layers": layers,
        "us_a_layer": spent / layers * 1e6, "gb_per_second": stored_bytes(cache) / spent / 1e9,
        "kernel": choose_attention(q, cache.k, 0),
    }  # fmt: skip


def make_cache(
    config: AttentionRooflineConfig, dtype: str, layers: int, batch: int, size: int, *, shapes_only: bool = False
) -> KVCache:
    """A full cache whose layers and rows all hold the same random keys and values."""
    C = config.head_width
    model = Config("llama", 1, size, layers, C, C, config.heads, config.kv_heads, C, 1e-5, Rope(C))
    shapes = jax.eval_shape(lambda: KVCache.create(model, batch, size, dtype))

    def fill(spec: jax.ShapeDtypeStruct) -> jax.Array:
        noise = jax.random.normal(jax.random.key(1), spec.shape[2:])
        return jnp.broadcast_to((noise * 40 if dtype == "int8" else noise).astype(spec.dtype), spec.shape)

    if shapes_only:
        return shapes
    return jax.tree.map(jax.jit(fill, static_argnums=0), shapes)


def stored_bytes(cache: KVCache) -> int:
    """Bytes of keys, values and scales."""
    stored = (cache.k, cache.v, cache.k_scale, cache.v_scale)
    return sum(x.size * x.dtype.itemsize for x in stored if x is not None)


def row(line: Line) -> list[str]:
    """A line of the table."""
    names = ("cache", "rows", "places", "tokens", "layers")
    rate = line["gb_per_second"]
    numbers = f"{line['us_a_layer']:.1f}", f"{rate:.0f}", f"{rate / line['ceiling']:.0%}"
    return [*(str(line[name]) for name in names), *numbers, line["kernel"]]


DEFAULT = Path(__file__).parents[1] / "configs" / "attention_roofline.toml"
command = experiment_command(main, AttentionRooflineConfig, DEFAULT)

if __name__ == "__main__":
    command()
