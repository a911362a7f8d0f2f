"""New tokens for caches of every kind, taken in by the kernels and as XLA has it: for tests on the CPU and on a GPU."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.kernels import pallas, triton_attention, triton_cache
from realm_jax.model import KVCache
from realm_jax.model.cache import UNBROKEN, to_int8
from realm_jax.model.layers import _arrays, _in_one_launch, _rotate_and_write

LAYER, PLACES = 1, 24
ROWS = np.array([3, 0, 7, 1], np.int32)  # of the five of the cache; the third is past the last
WAYS = {"kernel": _in_one_launch, "xla": _rotate_and_write}


def cache_of(dtype: str, K: int, C: int, places: int = PLACES) -> KVCache:
    """A cache of two layers and five rows, full of leftovers; row 1 is broken at place 9."""
    k, v = (jax.random.normal(jax.random.key(seed), (2, 5, places, K, C)) for seed in (1, 2))
    broken_B = jnp.full(5, UNBROKEN, jnp.int32).at[1].set(9)
    if dtype != "int8":
        return KVCache(k.astype(dtype), v.astype(dtype), jnp.full(5, 8, jnp.int32), broken_B)
    (k, k_scale), (v, v_scale) = to_int8(k), to_int8(v)
    return KVCache(k, v, jnp.full(5, 8, jnp.int32), broken_B, k_scale, v_scale)


def new_tokens(dtype: str, T: int, H: int, K: int, C: int, R: int) -> tuple:
    """Places, queries, keys, values and rotation of T tokens of ROWS.

    The second half of the last row falls off its end. A value of the first row's last token is infinite, and a key of
    the last row's first (at place 5, where the row is broken at 9) not a number. All numbers have 8 bits: so products
    are exact, and it does not matter whether a compiler contracts a * b + c, as LLVM does here and there.
    """
    keys = jax.random.split(jax.random.key(T), 4)
    q, k, v = (
        jax.random.normal(key, (4, T, heads, C)).astype(jnp.bfloat16).astype(dtype)
        for key, heads in zip(keys, (H, K, K), strict=False)
    )
    place = np.array([[2], [PLACES - T], [1], [5]]) + np.arange(T)
    place[3, T - T // 2 :] = PLACES + 3
    angle = jax.random.uniform(keys[3], (4, T, R), maxval=500.0)
    v = v.at[0, -1, -1, 0].set(jnp.inf)
    k = k.at[3, -1].set(0).at[3, 0, 0, C - 1].set(jnp.nan)
    rotation = tuple(x.astype(jnp.bfloat16).astype(jnp.float32) for x in (jnp.cos(angle), jnp.sin(angle)))
    return jnp.array(place, jnp.int32), q, k, v, rotation


def taken(way: str, cache: KVCache, halves: bool, rows: np.ndarray, new: tuple) -> tuple[jax.Array, KVCache]:
    """The rotated queries and the cache with the new tokens in it, by the kernel or as XLA has it."""
    # XLA would leave out the rounding to the type of the activations where it can.
    options = {"xla_allow_excess_precision": False}
    take = jax.jit(lambda *arrays: WAYS[way]((LAYER, halves), *arrays), compiler_options=options)
    return take(cache, jnp.asarray(rows), *new)


def same(got: tuple, want: tuple) -> None:
    """Assert that all arrays are equal, bit for bit (NaN equals NaN)."""
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


LONG = 300  # places of a cache whose rows are three parts for attention, which begin at 0, 128 and 256
OPTIONS = {  # of attention
    "plain": {},
    "capped": {"softcap": 1.5, "sliding_window": 6},
    "window": {"window": 130},
    "short": {"window": 40},
}


def numbers(dtype: str, T: int, H: int, K: int, C: int, R: int) -> tuple:
    """Places in a LONG cache, and the rest of `new_tokens`; on a GPU numbers have more than 8 bits.

    A first row is at the end of a part and goes on into the next one, a second one falls off the end of the cache, a
    last one begins a part.
    """
    _, q, k, v, (cos, sin) = new_tokens(dtype, T, H, K, C, R)
    if not pallas.interpreting():
        q, k, v, cos, sin = (x * jnp.asarray(1.01, x.dtype) for x in (q, k, v, cos, sin))
    place = np.array([[127], [LONG - T // 2 - 1], [1], [128]]) + np.arange(T)
    return jnp.array(place, jnp.int32), q, k, v, (cos, sin)


def attending(launches: int, halves: bool, **options) -> Callable[..., tuple[jax.Array, tuple]]:
    """A function of a cache, rows, and new tokens: their attention, and the arrays of the cache with them in it, by so
    many launches (but for the join of parts). The last token of the last row is padding, if there are several."""
    options = {"scale": 0.3, "softcap": None, "sliding_window": None, "window": None} | options

    def attend(cache, rows, place, q, k, v, rotation):
        write = place.at[-1, -1].set(cache.size) if place.shape[1] > 1 else place
        arrays, at = _arrays(cache), jnp.int32(LAYER)
        if launches == 1:
            new = place, q, k, v, *rotation
            return triton_attention.write_and_attend(arrays, at, rows, write, *new, halves=halves, **options)[:2]
        q, arrays = triton_cache.write(arrays, at, rows, write, q, k, v, *rotation, halves=halves)
        scales = arrays.k_scale, arrays.v_scale
        return triton_attention.attend(q, arrays.k, arrays.v, place, at, rows, *scales, **options), arrays

    # On the CPU unoptimized: else LLVM contracts a * b + c, here in one program and there not in the other.
    quick = {"xla_backend_optimization_level": 0} if pallas.interpreting() else {}
    return jax.jit(attend, compiler_options={"xla_allow_excess_precision": False} | quick)
