"""Division as IEEE 754 has it, from one that is a little off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realm_jax.quant.division import divide, long_division


def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators, float32: of all signs and sizes, small integers, and neighbours of powers of two."""
    rng = np.random.default_rng(0)
    size = 200_000
    a = rng.standard_normal(size) * np.exp2(rng.integers(-40, 40, size))
    b = rng.standard_normal(size) * np.exp2(rng.integers(-40, 40, size))
    a[: size // 8] = 1
    b[size // 8 : size // 4] = rng.choice([6, 15, 31, 127], size // 8)
    a[size // 4 : size // 2], b[size // 4 : size // 2] = rng.integers(-999, 999, (2, size // 4))
    near = np.exp2(rng.integers(-9, 9, (2, size // 8))).astype(np.float32).view(np.uint32) + rng.integers(
        -3, 4, (2, size // 8)
    ).astype(np.uint32)
    a[-size // 8 :], b[-size // 8 :] = near.astype(np.uint32).view(np.float32)
    return a.astype(np.float32), b.astype(np.float32)


@pytest.mark.parametrize("units", [0, 1, -1, 2, -2])
def test_a_division_that_is_off_is_set_right(units):
    def off(x: jax.Array, y: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x / y, jnp.int32) + units
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    a, b = pairs()
    with np.errstate(all="ignore"):
        want = np.where((a == 0) | (b == 0), 0, a / b)
    np.testing.assert_array_equal(jax.jit(lambda a, b: long_division(a, b, off))(a, b), want)


def test_constants_and_products_are_not_rewritten():
    a, b = pairs()
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(jax.jit(lambda a: divide(a, 127))(a), a / np.float32(127))
        inverse = np.where(b == 0, 0, np.float32(1) / b)
    np.testing.assert_array_equal(jax.jit(lambda a, b: a * divide(jnp.float32(1), b))(a, b), a * inverse)
