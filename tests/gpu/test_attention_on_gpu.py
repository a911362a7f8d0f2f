"""The attention kernels on a GPU: against the reference, and bit for bit against themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_toys import BOUNDS, cache_of, float32_reference, nmse, queries, same_bits_whatever_is_beside

from realm_jax.kernels.attention import attention, choose_attention


@pytest.mark.parametrize("dtype", sorted(BOUNDS))
@pytest.mark.parametrize(
    ("T", "G", "C"), [(1, 4, 128), (8, 7, 96), (16, 4, 128), (3, 1, 64), (100, 4, 128), (40, 2, 256)]
)
def test_kernel_is_the_reference(dtype, T, G, C):
    cache, q = cache_of(dtype, B=4, S=1100, K=2, C=C), queries(B=4, T=T, H=2 * G, C=C)
    ends = np.array([T, 256, 257, 1100])  # the shortest, a part's edge, one more, all of it
    place = jnp.array(ends[:, None] - T + np.arange(T), jnp.int32)
    assert choose_attention(q, cache["k"], 1) == "triton"
    for options in ({}, {"softcap": 1.5, "sliding_window": 300}):
        got = jax.jit(
            lambda q, cache, options=options: attention(q, place_BT=place, **cache, scale=0.1, layer=1, **options)
        )
        assert nmse(got(q, cache), float32_reference(q, cache, place, scale=0.1, **options)) < BOUNDS[dtype], options


@pytest.mark.parametrize("q_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("T", [1, 64])
def test_queries_of_16_bits_are_rounded_once_at_the_end(q_dtype, T):
    cache, q = cache_of(q_dtype, B=2, S=600, K=2, C=128), queries(B=2, T=T, H=8, C=128).astype(q_dtype)
    place = jnp.array([[70], [599]], jnp.int32) - T + 1 + jnp.arange(T)
    got = attention(q, place_BT=place, **cache, scale=0.1, layer=1, impl="triton")
    want = float32_reference(q, cache, place, scale=0.1)
    assert np.all(np.abs(got.astype(np.float32) - want) <= 0.502 * jnp.finfo(q_dtype).eps * 2 * np.abs(want) + 1e-5)


@pytest.mark.parametrize("dtype", sorted(BOUNDS))
@pytest.mark.parametrize(("tokens", "sliding_window"), [(tuple(range(1, 17)), None), ((1, 5, 16), 70)])
def test_a_query_gets_the_same_bits_whatever_is_beside_it(dtype, tokens, sliding_window):
    same_bits_whatever_is_beside(dtype, tokens=tokens, K=2, G=4, C=128, sliding_window=sliding_window)
