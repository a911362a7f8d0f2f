"""The kernel that takes new tokens into the cache, on a GPU: bit for bit what XLA does, in place, and its time.

REALM_TEST_GPU=1 python -m pytest tests/gpu/test_cache_on_gpu.py -q -s
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from cache_toys import ROWS, WAYS, cache_of, new_tokens, same, taken

from realm_jax.kernels import triton_cache
from realm_jax.model.cache import DTYPES, UNBROKEN, KVCache
from realm_jax.speed import median_seconds


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("T", "H", "K", "C", "R", "halves"),
    [(2, 32, 8, 128, 64, True), (16, 7, 1, 96, 32, False), (5, 6, 6, 256, 128, False)],
)
def test_bits_are_those_of_xla(dtype, activations, T, H, K, C, R, halves):
    cache, new = cache_of(dtype, K, C), new_tokens(activations, T, H, K, C, R)
    assert triton_cache.refuses(new[1], cache.k) is None
    got, want = (taken(way, cache, halves, ROWS, new) for way in ("kernel", "xla"))
    same(got, want)
    assert got[1].broken_B.tolist() == [UNBROKEN, 5, UNBROKEN, 1 + T, UNBROKEN]
    alone = taken("kernel", cache, halves, ROWS[1:2], jax.tree.map(lambda x: x[1:2], new))
    same((alone[0][0], alone[1].k[1, 0]), (got[0][1], got[1].k[1, 0]))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("batch", [1, 64])
def test_it_is_done_in_place_and_quickly(dtype, batch):
    """Thirty-two layers of a loop of steps: microseconds a layer, and no memory beside the cache."""
    L, S, H, K, C = 32, 64, 32, 8, 128  # a short cache: the call copies it once
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (batch, 1, n, C), jnp.bfloat16) for key, n in zip(keys, (H, K, K), strict=True))
    rotation = (jnp.ones((batch, 1, C // 2)), jnp.zeros((batch, 1, C // 2)))
    k_LBSKC, scale = jnp.zeros((L, batch, S, K, C), dtype), jnp.zeros((L, batch, S, K)) if dtype == "int8" else None
    rows = jnp.zeros(batch, jnp.int32), jnp.full(batch, UNBROKEN, jnp.int32)
    cache = KVCache(k_LBSKC, k_LBSKC, *rows, scale, scale)
    steps = 50

    def one(way, place, carry):
        q, cache = carry
        for layer in range(L):
            q, cache = WAYS[way](layer, True, cache, jnp.arange(batch), jnp.full((batch, 1), place), q, k, v, rotation)
        return q, cache

    for way in WAYS:
        loop = jax.jit(lambda q, cache, way=way: jax.lax.fori_loop(0, steps, functools.partial(one, way), (q, cache)))
        held = loop.lower(q, cache).compile().memory_analysis()
        seconds = median_seconds(loop, q, cache, repeats=5)
        print(f"{dtype} batch {batch}: {way} {1e6 * seconds / steps / L:.2f} us a layer")
        assert held.temp_size_in_bytes < cache.k.nbytes / 4 or way == "xla"
