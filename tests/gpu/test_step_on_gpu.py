"""The kernels between the products of a step, on a GPU. New tokens into the cache: bit for bit what XLA does, in place,
and its time; by attention itself: bit for bit what two launches do, in place, and the time of both. Addition and norm:
what XLA does, the bits of a row whatever is beside it. What they and the gated product prepare for the next product:
bit for bit what a launch of its own prepares, and the time of both.

REALM_TEST_GPU=1 python -m pytest tests/gpu/test_step_on_gpu.py -q -s
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_toys import LONG, OPTIONS, ROWS, WAYS, attending, cache_of, new_tokens, numbers, same, taken

from realm_jax.kernels import triton_attention, triton_cache, triton_gate, triton_norm
from realm_jax.kernels.operand import Form, operand_of, pieces_of
from realm_jax.model import Config, Rope, init_params, layers
from realm_jax.model.cache import DTYPES, UNBROKEN, KVCache
from realm_jax.model.layers import _add_norm, add_norm
from realm_jax.model.transformer import run, unembed
from realm_jax.quant import quantize
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("T", "H", "K", "C", "R", "halves"),
    [
        (1, 32, 8, 128, 64, False),
        (4, 32, 8, 128, 64, True),
        (3, 5, 1, 96, 24, True),
        (16, 2, 2, 64, 32, False),
        (2, 8, 1, 256, 128, False),
    ],
)
def test_attention_that_writes_has_the_bits_of_two_launches(dtype, activations, T, H, K, C, R, halves):
    cache, new = cache_of(dtype, K, C, LONG), numbers(activations, T, H, K, C, R)
    assert triton_attention.refuses_new(new[1], cache.k) is None
    for name, options in OPTIONS.items():
        one_launch, two = (attending(launches, halves, **options) for launches in (1, 2))
        want = two(cache, ROWS, *new)
        for _ in range(20):  # what one thread stores and another loads would not go wrong each time
            same(one_launch(cache, ROWS, *new), want)
        alone = one_launch(cache, ROWS[1:2], *jax.tree.map(lambda x: x[1:2], new))
        np.testing.assert_array_equal(alone[0][0, : max(1, T - 1)], want[0][1, : max(1, T - 1)], err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(("batch", "T"), [(1, 1), (1, 4), (8, 1), (64, 1)])
def test_time_of_attention_that_writes(dtype, batch, T):
    """Eight layers of a loop of steps: microseconds a layer, and no memory beside the cache."""
    L, S, H, K, C = 8, 576, 32, 8, 128
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (batch, T, n, C), jnp.bfloat16) for key, n in zip(keys, (H, K, K), strict=True))
    rotation = jnp.ones((batch, T, C // 2)), jnp.zeros((batch, T, C // 2))
    k_LBSKC, scale = jnp.zeros((L, batch, S, K, C), dtype), jnp.zeros((L, batch, S, K)) if dtype == "int8" else None
    rows = jnp.zeros(batch, jnp.int32), jnp.full(batch, UNBROKEN, jnp.int32)
    cache = KVCache(k_LBSKC, k_LBSKC + 0, *rows, scale, scale)
    steps = 20

    def two_launches(layer, cache, row_B, place_BT, q):
        q, cache = layers.rotate_into(cache, layer, row_B, place_BT, q, k, v, rotation, False)
        return layers.attend(q, cache.read(layer, row_B), place_BT), cache

    def one_launch(layer, cache, row_B, place_BT, q):
        w = jnp.zeros((1, q.shape[2] * q.shape[3]))
        at = row_B, row_B, place_BT, place_BT, None
        out, cache = layers.attend_into(cache, layer, *at, (q, k, v), rotation, False, w)
        return out.reshape(q.shape), cache

    def step(way, i, carry):
        q, cache = carry
        for layer in range(L):
            q, cache = way(layer, cache, jnp.arange(batch), jnp.tile(512 + i + jnp.arange(T), (batch, 1)), q)
        return q, cache

    for way in (two_launches, one_launch):
        loop = jax.jit(lambda q, cache, way=way: jax.lax.fori_loop(0, steps, functools.partial(step, way), (q, cache)))
        held = loop.lower(q, cache).compile().memory_analysis()
        seconds = median_seconds(loop, q, cache, repeats=5)
        print(f"{dtype} batch {batch}, {T} tokens: {way.__name__} {1e6 * seconds / steps / L:.2f} us a layer")
        assert held.temp_size_in_bytes < cache.k.nbytes / 4


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


def prepared_rows(dtype: str, rows: int, width: int) -> tuple:
    keys = jax.random.split(jax.random.key(rows), 3)
    x, more = (jax.random.normal(key, (rows, 1, width)).astype(dtype) for key in keys[:2])
    pieces = pieces_of(dtype)
    form = Form(pieces, -(-rows * pieces // 8), -(-width // 256) * 8)
    return x, more, jax.random.normal(keys[2], (width,)), form


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (8, 14336), (33, 5120), (64, 96), (3, 16384)])
def test_what_is_prepared_in_the_same_launch(dtype, rows, width):
    x, more, weight, form = prepared_rows(dtype, rows, width)

    @jax.jit
    def both(x, more):
        total, normed, own = triton_norm.add_norm(x, more, weight, eps=1e-5, form=form)
        product, also = triton_gate.gated(x, more, form=form)
        apart = triton_norm.add_norm(x, more, weight, eps=1e-5)[:2]
        return (total, normed, own, also), (*apart, operand_of(normed, form), operand_of(product, form)), product

    for _ in range(20):  # what one thread stores and another loads would not go wrong each time
        got, want, product = both(x, more)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(one, other)
    gate, up = (np.asarray(part, np.float64) for part in (x, more))
    exact = gate / (1 + np.exp(-gate)) * up
    rtol = max(1.01 * float(jnp.finfo(dtype).eps), 1e-6)
    np.testing.assert_allclose(product.astype(jnp.float32), exact, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_time_of_preparing_in_the_same_launch(rows):
    """Microseconds of each way, in a loop."""
    steps = 2000

    def one_launch(x, more, weight, form):
        return triton_norm.add_norm(x, more, weight, eps=1e-5, form=form)[1:]

    def two_launches(x, more, weight, form):
        normed = triton_norm.add_norm(x, more, weight, eps=1e-5)[1]
        return normed, operand_of(normed, form)

    def gated(x, more, _, form):
        return triton_gate.gated(x, more, form=form)

    def gated_by_xla(x, more, _, form):
        product = jax.nn.silu(x) * more
        return product, operand_of(product, form)

    for width, ways in ((4096, (one_launch, two_launches)), (14336, (gated, gated_by_xla))):
        for way in ways:
            *arrays, form = prepared_rows("bfloat16", rows, width)

            def step(_, x, way=way, arrays=arrays, form=form):
                product, operand = way(x, *arrays[1:], form)
                back = operand.back[:rows, None, None] + operand.pieces[0, 0, 0, 0] + operand.sums[0, 0, 0, 0]
                return jnp.where(back == 0, x, product)  # so that all of it is wanted

            loop = jax.jit(lambda x, step=step: jax.lax.fori_loop(0, steps, step, x))
            seconds = median_seconds(loop, arrays[0], repeats=5)
            print(f"{rows} rows of {width}: {way.__name__} {1e6 * seconds / steps:.2f} us")


@pytest.mark.parametrize("arithmetic", ["float", "int8"])
def test_a_step_has_the_same_bits_with_and_without(monkeypatch, arithmetic):
    config = Config(
        architecture="llama", vocab_size=512, context_length=64, layers=2, width=512, ffn_width=1536, heads=8,
        kv_heads=4, head_width=64, norm_eps=1e-5, rope=Rope(dimensions=64),
    )  # fmt: skip
    params = init_params(config, jax.random.key(0))

    def packed(name: str, w: jax.Array):
        return quantize(np.asarray(w), name).replace(arithmetic=arithmetic) if w.ndim == 2 else w

    for name in ("Q4_K", "Q2_K"):
        layered = jax.tree.map(functools.partial(packed, name), params.layers)
        own = params.replace(layers=layered, output=quantize(np.asarray(params.embedding), "Q6_K"))
        for rows in (1, 40):
            tokens = jnp.arange(rows, dtype=jnp.int32)[:, None]

            def step(tokens, own=own):
                cache = KVCache.create(config, tokens.shape[0], 64)
                return unembed(own, config, run(own, config, tokens, cache, dtype=jnp.bfloat16)[0])

            fused = jax.jit(step)(tokens)
            with monkeypatch.context() as patch:
                patch.setattr(layers, "with_operand", lambda x, operand, form: x)
                apart = jax.jit(lambda tokens, step=step: step(tokens))(tokens)
            np.testing.assert_array_equal(fused, apart)
