"""How near attention over a cache comes to the speed of memory: GB/s of valid keys and values, decoding and verifying.

    python experiments/attention_roofline.py [CONFIG] [--set KEY=VALUE ...]

All layers of a cache are read one after the other in one compiled program, each query being what the layer before gave,
so that nothing is read from the second-level cache of the card. The share is of what the device reads a second,
measured in the same run. results.md has the table, of each case the quickest first.

With cuts (`kernels.attention_plan.Cut`), as configs/attention_cuts.toml has them, each is timed beside the one that the
kernel chooses, and what it gives is compared with the reference. One that the device cannot run is left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import speed
from realm_jax.errors import RealmError
from realm_jax.experiment import Run, experiment_command, read_json
from realm_jax.experiment.report import describe_run, markdown_table
from realm_jax.kernels import triton_attention
from realm_jax.kernels.attention import attention, choose_attention
from realm_jax.kernels.attention_plan import Cut
from realm_jax.model import Config, KVCache, Rope
from realm_jax.model.cache import DTYPES

Line = dict[str, Any]
CASE = ("cache", "rows", "places", "tokens")
HEADER = (
    "cache", "rows", "places", "new tokens", "layers", "cut", "us a layer", "GB/s", "share of the ceiling", "NMSE",
    "kernel",
)  # fmt: skip
WRONG = 1e-4  # NMSE that no rounding of queries and results explains


@dataclass(frozen=True)
class AttentionRooflineConfig:
    """heads, kv_heads, head_width: of the model (Llama 3.1 8B). dtypes: of caches. query_dtype: of activations.

    batches, lengths, tokens: rows, valid places of each, new tokens of each; in all combinations. gigabytes: what
    a program reads (one layer, if that is more). repeats: timed calls, of which the median counts. cuts: (block, part,
    stages, warps) to try beside the chosen one.
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
    cuts: tuple[tuple[int, int, int, int], ...] = ()

    def __post_init__(self) -> None:
        for name in self.dtypes:
            if name not in DTYPES:
                raise RealmError(f"dtypes: a cache of {name!r} is not known; take some of {', '.join(DTYPES)}")
        for block, part, stages, warps in self.cuts:
            if block < 16 or block & (block - 1) or part < block or part % block or min(stages, warps) < 1:
                raise RealmError(
                    f"cuts: {[block, part, stages, warps]}: want a block that is a power of two of at least 16, a part "
                    "of whole blocks, and at least one stage and warp"
                )


def main(config: AttentionRooflineConfig, run: Run) -> None:
    """Time attention over caches of several types, rows and lengths, and compare with the speed of memory."""
    ceiling = speed.read_ceiling() / 1e9
    cases = [(d, B, S, T) for d in config.dtypes for B in config.batches for S in config.lengths for T in config.tokens]
    for dtype, batch, length, tokens in cases:
        for line in measure(config, dtype, batch, length, tokens):
            run.log(**line, ceiling=ceiling)
    environment = read_json(run.folder / "environment.json")
    text = f"Made by {describe_run(environment)}.\n\nRead ceiling: {ceiling:.0f} GB/s.\n\n{table(run.metrics())}"
    run.save_text("results.md", text)
    click.echo(text)


def measure(config: AttentionRooflineConfig, dtype: str, batch: int, length: int, tokens: int) -> list[Line]:
    """Lines of metrics.jsonl: of the chosen cut, and of each to try."""
    one = make_cache(config, dtype, 1, batch, length, shapes_only=True)
    layers = max(1, min(64, int(config.gigabytes * 1e9 / stored_bytes(one))))
    cache = make_cache(config, dtype, layers, batch, length)
    shape = (batch, tokens, config.heads, config.head_width)
    q = jax.random.normal(jax.random.key(0), shape, config.query_dtype)
    about = dict(zip(CASE, (dtype, batch, length, tokens), strict=True))
    lines = []
    for cut in (None, *config.cuts):
        try:
            found = time_cut(config, q, cache, cut)
        except jax.errors.JaxRuntimeError as error:  # more shared memory or registers than there are
            click.echo(f"{about}, cut {cut}, left out: {str(error).splitlines()[0]:.200}", err=True)
        else:
            lines.append(about | {"layers": layers, "cut": cut} | found)
    return lines


def time_cut(config: AttentionRooflineConfig, q: jax.Array, cache: KVCache, cut: tuple[int, ...] | None) -> Line:
    """What a cut takes, and how far it is from the reference. RealmError where that is far."""
    layers, _, length = cache.k.shape[:3]
    attend = attend_with(config, cut)
    place = jnp.tile(jnp.arange(length - q.shape[1], length, dtype=jnp.int32), (q.shape[0], 1))

    def step(q: jax.Array, cache: KVCache) -> jax.Array:
        for layer in range(layers):
            q = attend(q, cache, place, layer)
        return q

    spent = speed.median_seconds(jax.jit(step), q, cache, repeats=config.repeats)
    nmse = compare(config, attend, q[:2], cache, place[:2])
    if not nmse < WRONG:
        raise RealmError(
            f"cut {cut or 'chosen'} of a {cache.k.dtype} cache gives what is not the reference's: NMSE {nmse:.1e}"
        )
    return {
        "us_a_layer": spent / layers * 1e6, "gb_per_second": stored_bytes(cache) / spent / 1e9, "nmse": nmse,
        "kernel": choose_attention(q, cache.k, 0) if cut is None else "triton",
    }  # fmt: skip


def attend_with(config: AttentionRooflineConfig, cut: tuple[int, ...] | None) -> Callable[..., jax.Array]:
    """Attention of q to a layer of a cache: as the model asks for it, or by the kernel with this cut."""
    scale = config.head_width**-0.5

    def chosen(q: jax.Array, cache: KVCache, place: jax.Array, layer: int, **options) -> jax.Array:
        return attention(
            q, cache.k, cache.v, place, scale=scale, layer=layer, k_scale_BSK=cache.k_scale, v_scale_BSK=cache.v_scale,
            **options,
        )  # fmt: skip

    def kernel(
        q: jax.Array, cache: KVCache, place: jax.Array, layer: int, rows_B: jax.Array | None = None
    ) -> jax.Array:
        rows_B = jnp.arange(q.shape[0], dtype=jnp.int32) if rows_B is None else rows_B
        return triton_attention.attend(
            q, cache.k, cache.v, place, jnp.int32(layer), rows_B, cache.k_scale, cache.v_scale,
            scale=scale, softcap=None, sliding_window=None, cut=Cut(*cut),
        )  # fmt: skip

    return kernel if cut else chosen


def compare(
    config: AttentionRooflineConfig, attend: Callable[..., jax.Array], q: jax.Array, cache: KVCache, place: jax.Array
) -> float:
    """NMSE of what these queries get from the first layer, against the reference in float32."""
    rows = jnp.arange(q.shape[0], dtype=jnp.int32)
    reference = functools.partial(attend_with(config, None), impl="reference")
    got = jax.jit(lambda q, cache: attend(q, cache, place, 0, rows_B=rows))(q, cache)
    want = jax.jit(lambda q, cache: reference(q, cache, place, 0, rows_B=rows))(q.astype(jnp.float32), cache)
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.sum((got - want) ** 2) / np.sum(want**2))


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


def table(lines: list[Line]) -> str:
    """A table of all lines: cases as they came, of each the quickest first."""
    cases = list(dict.fromkeys(tuple(line[name] for name in CASE) for line in lines))
    order = sorted(lines, key=lambda line: (cases.index(tuple(line[name] for name in CASE)), line["us_a_layer"]))
    return markdown_table(HEADER, [row(line) for line in order])


def row(line: Line) -> list[str]:
    """A line of the table."""
    rate = line["gb_per_second"]
    cut = ", ".join(map(str, line["cut"])) if line["cut"] else "chosen"
    numbers = f"{line['us_a_layer']:.1f}", f"{rate:.0f}", f"{rate / line['ceiling']:.0%}"
    return [*(str(line[name]) for name in (*CASE, "layers")), cut, *numbers, f"{line['nmse']:.0e}", line["kernel"]]


DEFAULT = Path(__file__).parents[1] / "configs" / "attention_roofline.toml"
command = experiment_command(main, AttentionRooflineConfig, DEFAULT)

if __name__ == "__main__":
    command()
