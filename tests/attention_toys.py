"""Caches and queries to attend with, and what attention must give: shared by the tests on the CPU and on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.kernels import pallas
from realm_jax.kernels.attention import attention
from realm_jax.model.cache import to_int8

BOUNDS = {"float32": 1e-12, "bfloat16": 1e-9, "float16": 1e-12, "int8": 1e-12}  # NMSE against the float32 reference


def cache_of(dtype: str, *, B: int, S: int, K: int, C: int, L: int = 2) -> dict[str, jax.Array]:
    """Random keys and values of all layers of a cache of that type, as arguments of `attention`."""
    k, v = (jax.random.normal(jax.random.key(seed), (L, B, S, K, C)) for seed in (1, 2))
    if dtype != "int8":
        return {"k": k.astype(dtype), "v": v.astype(dtype)}
    (k, k_scale), (v, v_scale) = to_int8(k), to_int8(v)
    return {"k": k, "v": v, "k_scale_BSK": k_scale, "v_scale_BSK": v_scale}


def queries(*, B: int, T: int, H: int, C: int) -> jax.Array:
    """Random queries (B, T, H, C), float32."""
    return jax.random.normal(jax.random.key(3), (B, T, H, C))


def float32_reference(q: jax.Array, cache: dict[str, jax.Array], place: jax.Array, **options) -> np.ndarray:
    """The reference on what layer 1 of the cache stands for, all in float32."""
    k, v = (cache[name][1].astype(jnp.float32) for name in "kv")
    if "k_scale_BSK" in cache:
        k, v = k * cache["k_scale_BSK"][1][..., None], v * cache["v_scale_BSK"][1][..., None]
    return np.asarray(attention(q.astype(jnp.float32), k, v, place, impl="reference", **options))


def nmse(got: jax.Array, want: np.ndarray) -> float:
    """The mean squared error over the mean square."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.sum((got - want) ** 2) / np.sum(want**2))


def same_bits_whatever_is_beside(
    dtype: str, *, tokens: tuple[int, ...], K: int = 1, G: int = 4, C: int = 16, sliding_window: int | None = None
) -> None:
    """Assert that queries keep their bits: alone or among T tokens and B rows, in other windows and larger caches."""
    T, ends = max(tokens), np.array([300, 519, 40, 256, 257])
    cache, q = cache_of(dtype, B=5, S=520, K=K, C=C), queries(B=5, T=T, H=K * G, C=C)
    place = jnp.array(ends[:, None] - T + 1 + np.arange(T), jnp.int32)
    # On the CPU unoptimized: else LLVM contracts a * b + c, here in one program and there not in the other.
    options = {"xla_backend_optimization_level": 0} if pallas.interpreting() else None
    attend = functools.partial(attention, scale=C**-0.5, layer=1, sliding_window=sliding_window, impl="triton")
    attend = jax.jit(attend, static_argnames="window", compiler_options=options)
    together = attend(q, place_BT=place, **cache)
    for t in tokens[:-1]:
        part = attend(q[:, -t:], place_BT=place[:, -t:], **cache)
        np.testing.assert_array_equal(part, together[:, -t:], err_msg=f"T={t}")
    for row, window in ((0, 301), (2, 41)):
        one = jnp.array([row])
        alone = attend(q[one], place_BT=place[one], rows_B=one, window=window, **cache)
        np.testing.assert_array_equal(alone, together[one], err_msg=f"row {row} by itself, window {window}")
    wider = {name: jnp.concatenate([x, x[:, :, :200]], axis=2) for name, x in cache.items()}
    np.testing.assert_array_equal(attend(q, place_BT=place, **wider), together, err_msg="a larger cache")
