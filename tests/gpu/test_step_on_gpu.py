"""The kernels between the products of a step, on a GPU. New tokens into the cache: bit for bit what XLA does, in place,
and its time. Addition and norm: what XLA does, the bits of a row whatever is beside it.

REALM_TEST_GPU=1 python -m pytest tests/gpu/test_step_on_gpu.py -q -s
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_toys import ROWS, WAYS, cache_of, new_tokens, same, taken

from realm_jax.kernels import triton_cache
from realm_jax.model.cache import DTYPES, UNBROKEN, KVCache
from realm_jax.model.layers import _add_norm, add_norm
from realm_jax.speed import median_seconds


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
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
            at = jnp.arange(batch), jnp.full((batch, 1), place)
            q, cache = WAYS[way]((layer, True), cache, *at, q, k, v, rotation)
        return q, cache

    for way in WAYS:
        loop = jax.jit(lambda q, cache, way=way: jax.lax.fori_loop(0, steps, functools.partial(one, way), (q, cache)))
        held = loop.lower(q, cache).compile().memory_analysis()
        seconds = median_seconds(loop, q, cache, repeats=5)
        print(f"{dtype} batch {batch}: {way} {1e6 * seconds / steps / L:.2f} us a layer")
        assert held.temp_size_in_bytes < cache.k.nbytes / 4 or way == "xla"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("width", [96, 4096, 5120, 16384])
def test_addition_and_norm(dtype, width):
    x, more = (jax.random.normal(jax.random.key(seed), (64, 1, width)).astype(dtype) for seed in (1, 2))
    weight = jax.random.normal(jax.random.key(3), (width,))
    total, normed = add_norm(x, more, weight, 1e-5)
    np.testing.assert_array_equal(total, x + more)
    _, want = _add_norm((1e-5, None), total.astype(jnp.float32), None, weight)
    np.testing.assert_allclose(normed.astype(jnp.float32), want, rtol=jnp.finfo(dtype).eps * 2, atol=1e-6)
    np.testing.assert_array_equal(add_norm(x[5:6], more[5:6], weight, 1e-5)[1], normed[5:6])
    np.testing.assert_array_equal(add_norm(total, None, weight, 1e-5)[1], normed)
