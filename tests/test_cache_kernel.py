"""The kernel that takes new tokens into the cache, in Pallas' interpreter: bit for bit what XLA does, and lowered for
CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_toys import ROWS, WAYS, cache_of, new_tokens, same, taken
from decode_toys import random_model

from realm_jax.kernels import pallas, triton_cache
from realm_jax.model import KVCache, run
from realm_jax.model.cache import UNBROKEN
from realm_jax.model.layers import rotate_into

SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def interpreter():
    with pallas.interpreted():
        yield


# Cache, activations, T tokens, H and K heads, C head width, R pairs, halves.
CASES = [
    ("bfloat16", "bfloat16", 3, 6, 2, 20, 8, True),
    ("int8", "float32", 2, 4, 2, 16, 8, False),
    SLOW("float32", "float32", 1, 4, 1, 16, 8, True),
    SLOW("float16", "float32", 2, 2, 2, 32, 12, False),
    SLOW("int8", "bfloat16", 16, 8, 2, 64, 32, True),
    SLOW("float32", "float16", 5, 3, 3, 8, 4, False),
    SLOW("bfloat16", "float32", 4, 7, 1, 96, 48, True),
]


@pytest.mark.parametrize(("dtype", "activations", "T", "H", "K", "C", "R", "halves"), CASES)
def test_bits_are_those_of_xla(dtype, activations, T, H, K, C, R, halves):
    cache, new = cache_of(dtype, K, C), new_tokens(activations, T, H, K, C, R)
    assert triton_cache.refuses(new[1], cache.k) is None
    got, want = (taken(way, cache, halves, ROWS, new) for way in ("kernel", "xla"))
    same(got, want)
    q, written = got
    assert q.dtype == activations and written.k.dtype == dtype and not np.array_equal(q, new[1])
    assert written.broken_B.tolist() == [UNBROKEN, 5, UNBROKEN, 1 + T, UNBROKEN]
    alone = taken("kernel", cache, halves, ROWS[1:2], jax.tree.map(lambda x: x[1:2], new))  # beside nobody
    same((alone[0][0], alone[1].k[1, 0]), (q[1], written.k[1, 0]))


def test_a_model_decodes_as_without_it(monkeypatch):
    """Tokens, lengths and what breaks, in a loop of steps and rows that are a part of the cache's."""
    model, seen = random_model(), []
    rows, count = jnp.array([2, 0, 5]), jnp.array([2, 1, 0])
    write = triton_cache.write
    monkeypatch.setattr(triton_cache, "write", lambda *arrays, **options: seen.append(1) or write(*arrays, **options))

    def steps(cache):
        tokens = jnp.array([[3, 4], [5, 6], [7, 8]])
        for _ in range(2):
            hidden, cache = run(model.params, model.config, tokens, cache, count, rows_B=rows)
        return hidden, cache

    cache = KVCache.create(model.config, 4, 16, "float32")
    hidden, got = jax.jit(steps)(cache)
    assert len(seen) == 2 * model.config.layers
    monkeypatch.setattr(triton_cache, "refuses", lambda q, k: "not now")
    other, want = jax.jit(steps)(cache)
    assert got.length_B.tolist() == want.length_B.tolist() == [2, 0, 4, 0]
    np.testing.assert_allclose(hidden[:2], other[:2], atol=1e-5)
    np.testing.assert_allclose(got.k, want.k, atol=1e-5)


@pytest.mark.slow
def test_gradients_and_vmap_are_those_of_xla():
    cache, (place, *new, rotation) = cache_of("float32", 2, 8), new_tokens("float32", 2, 4, 2, 8, 4)
    new, rows = [jnp.where(jnp.isfinite(x), x, 1) for x in new], jnp.asarray(ROWS)

    def total(own, q, k, v):
        q, written = own((1, True), cache, rows, place, q, k, v, rotation)
        return jnp.sum(jnp.sin(q)) + jnp.sum(jnp.sin(written.k)) + jnp.sum(jnp.cos(written.v))

    got, want = (jax.grad(functools.partial(total, WAYS[way]), (0, 1, 2))(*new) for way in WAYS)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    taken_in = functools.partial(WAYS["kernel"], (1, True), cache, rows, place)
    both = jax.vmap(lambda *new: taken_in(*new, rotation))(*(jnp.stack([x, 2 * x]) for x in new))
    same(jax.tree.map(lambda x: x[1], both), taken_in(*(2 * x for x in new), rotation))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.usefixtures("for_an_h200")
def test_it_lowers_for_cuda(dtype):
    place, *new, rotation = new_tokens("bfloat16", 2, 4, 2, 16, 8)
    take = jax.jit(lambda cache: rotate_into(cache, 1, jnp.asarray(ROWS), place, *new, rotation, True))
    assert "write_cache" in take.trace(cache_of(dtype, 2, 16)).lower(lowering_platforms=("cuda",)).as_text()


def test_what_it_cannot_serve_is_refused():
    cache = cache_of("float32", 1, 16)
    assert triton_cache.refuses(jnp.zeros((4, 16, 2, 16)), cache.k) is None
    assert "16 tokens" in triton_cache.refuses(jnp.zeros((4, 17, 2, 16)), cache.k)
    assert "256 wide" in triton_cache.refuses(jnp.zeros((4, 1, 2, 257)), jnp.zeros((2, 5, 4, 1, 257)))
