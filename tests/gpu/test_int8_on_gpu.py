"""Products in int8 arithmetic on a GPU, by whatever serves them: against their definition, and row by row."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_int8_arithmetic import in_integers, product
from test_matmul import nmse

from realm_jax.kernels import choose_impl, matmul
from realm_jax.kernels.matmul import matmul_each
from realm_jax.quant import FORMATS


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 37, 256), (5, 64, 1280), (64, 21, 4096)])
def test_equals_its_definition(name, rows, n, k):
    x, w = product(name, rows, n, k)
    y = matmul(x, w)
    # A quotient that is off by a bit turns a rounding here and there.
    assert nmse(y, in_integers(x, w)) < 1e-7, choose_impl(x.shape, w)
    assert nmse(y, np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64).T) < 5e-4


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_row_depends_on_no_other(name, dtype):
    x, w = product(name, 8, 256, 2048)
    x = x.astype(dtype)
    y = np.asarray(matmul(x, w).astype(jnp.float32))
    beside = matmul(x.at[1].multiply(1e9).at[2, 40].set(jnp.nan).at[3, 0].set(jnp.inf), w)
    assert beside.dtype == dtype and np.isnan(beside[2:4]).all()
    others = [0, 4, 5, 6, 7]
    np.testing.assert_array_equal(np.asarray(beside.astype(jnp.float32))[others], y[others])


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q4_1", "NVFP4", "TQ1_0"])
def test_a_row_has_the_same_bits_among_few_and_many(name):
    x, w = product(name, 64, 256, 2048)
    assert choose_impl(x.shape, w) == "triton_int8"
    whole = np.asarray(matmul(x, w))
    for rows in (1, 2, 9):
        np.testing.assert_array_equal(np.asarray(matmul(x[-rows:], w)), whole[-rows:])


@pytest.mark.parametrize("names", ["Q4_K Q4_K Q4_K", "Q4_K Q4_K Q6_K", "Q8_0 Q8_0 Q8_0", "IQ1_S IQ1_S IQ1_S"])
def test_several_weights_of_one_x_are_multiplied_as_each_is(names):
    weights = [product(name, 1, n, 2048)[1] for name, n in zip(names.split(), (256, 48, 37), strict=True)]
    x, _ = product("Q8_0", 1, 5, 2048)
    for own, w in zip(matmul_each(x, weights), weights, strict=True):
        np.testing.assert_array_equal(own, matmul(x, w))
