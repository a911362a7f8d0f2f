"""Products by packed weights on a GPU: every format against float64, and a row's bits whatever is beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_matmul import nmse
from test_quant_formats import random_weights

from realm_jax.kernels import codes, matmul
from realm_jax.kernels.matmul import matmul_each


def product(rows: int, name: str, n: int, k: int, dtype=jnp.float32):
    x = jnp.asarray(np.random.default_rng(rows).standard_normal((rows, k)), dtype)
    w = random_weights(name, n, k, seed=1)
    return x, w, np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64).T


@pytest.mark.parametrize("name", codes.READERS)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 37, 256), (5, 64, 1280), (33, 21, 4096)])
def test_equals_float64(name, rows, n, k):
    x, w, want = product(rows, name, n, k)
    # Small codes are subnormal float16, of which the tensor cores keep fewer bits of a product: 2e-11 at the most.
    assert nmse(matmul(x, w, impl="triton"), want) < 1e-10


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "IQ2_XXS"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bits_are_rounded_at_the_end_alone(name, dtype):
    x, w, want = product(64, name, 96, 1024, dtype)
    assert nmse(matmul(x, w, impl="triton"), np.asarray(want.astype(dtype), np.float64)) < 1e-7


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q4_0", "Q2_K", "NVFP4"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("outputs", [4096, 8713])  # each turn is a program, or one program takes all of them
def test_a_row_has_the_same_bits_whatever_is_beside_it(name, dtype, outputs):
    x, w, _ = product(64, name, outputs, 2048, dtype)
    whole = np.asarray(matmul(x, w, impl="triton"))
    for rows in (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 63):
        np.testing.assert_array_equal(np.asarray(matmul(x[-rows:], w, impl="triton")), whole[-rows:])


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "MXFP4"])
@pytest.mark.parametrize(("rows", "dtype", "bound"), [(65, jnp.float32, 1e-6), (257, jnp.bfloat16, 1e-5)])
def test_many_rows(name, rows, dtype, bound):
    x, w, want = product(rows, name, 160, 1024, dtype)
    assert nmse(matmul(x, w), want) < bound


@pytest.mark.parametrize("names", ["Q4_K Q4_K Q4_K", "Q4_K Q4_K Q6_K", "Q8_0 Q8_0 Q8_0", "IQ1_S IQ1_S IQ1_S"])
@pytest.mark.parametrize("rows", [1, 9])
def test_several_weights_of_one_x_are_multiplied_as_each_is(names, rows):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((rows, 1024)), jnp.bfloat16)
    weights = [random_weights(name, n, 1024, seed=n) for name, n in zip(names.split(), (96, 21, 32), strict=True)]
    for y, w in zip(jax.jit(matmul_each)(x, weights), weights, strict=True):
        np.testing.assert_array_equal(np.asarray(y), np.asarray(matmul(x, w, impl="triton")))
