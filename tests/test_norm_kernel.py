"""The kernel that adds and norms, in Pallas' interpreter, against what XLA does, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realm_jax.kernels import pallas, triton_norm
from realm_jax.model.layers import _add_norm, _add_norm_in_one_launch, add_norm

EPS = 1e-5


@pytest.fixture(autouse=True)
def interpreter():
    with pallas.interpreted():
        yield


def rows_of(dtype: str, B: int, T: int, D: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, more = (jax.random.normal(jax.random.key(seed), (B, T, D)).astype(dtype) for seed in (1, 2))
    return x, more, jax.random.normal(jax.random.key(3), (D,))


def error(found: jax.Array, exact: np.ndarray) -> float:
    """The largest relative one."""
    return np.max(np.abs(np.asarray(found, np.float64) - exact) / np.abs(exact))


@pytest.mark.parametrize(
    ("dtype", "B", "T", "D"),
    [("float32", 2, 3, 96), ("bfloat16", 1, 1, 64), pytest.param("float16", 64, 1, 20, marks=pytest.mark.slow)],
)
def test_it_is_what_xla_does(dtype, B, T, D):
    x, more, weight = rows_of(dtype, B, T, D)
    for other in (more, None):
        total, normed = add_norm(x, other, weight, EPS)
        want, _ = _add_norm((EPS, None), x, other, weight)
        assert total.dtype == normed.dtype == dtype
        np.testing.assert_array_equal(np.asarray(total, np.float32), np.asarray(want, np.float32))
        rows = np.asarray(total, np.float64)
        exact = rows / np.sqrt(np.mean(rows**2, -1, keepdims=True) + EPS) * np.asarray(weight, np.float64)
        _, want = _add_norm((EPS, None), rows.astype(np.float32), None, weight)
        # How far XLA is from it depends on how it compiles, too.
        assert error(normed, exact) <= error(want, exact) + 1.01 * jnp.finfo(dtype).eps


def test_a_row_has_the_same_bits_whatever_is_beside_it():
    x, more, weight = rows_of("float32", 5, 3, 96)
    together = np.asarray(add_norm(x, more, weight, EPS)[1])
    np.testing.assert_array_equal(add_norm(x[3:4, :1], more[3:4, :1], weight, EPS)[1], together[3:4, :1])


@pytest.mark.slow
def test_gradients_are_those_of_xla():
    rows = rows_of("float32", 2, 1, 24)

    def total(own, *rows):
        return sum(jnp.sum(jnp.sin(out)) for out in own((EPS, None), *rows)[:2])

    got, want = (
        jax.grad(functools.partial(total, own), (0, 1, 2))(*rows) for own in (_add_norm_in_one_launch, _add_norm)
    )
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.usefixtures("for_an_h200")
def test_it_lowers_for_cuda():
    norm = jax.jit(lambda *rows: add_norm(*rows, EPS))
    assert "add_norm" in norm.trace(*rows_of("bfloat16", 2, 1, 96)).lower(lowering_platforms=("cuda",)).as_text()
    assert triton_norm.refuses(jnp.zeros((1, 64, 8))) is None
    assert "64 rows" in triton_norm.refuses(jnp.zeros((1, 65, 8)))
