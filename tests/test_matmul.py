"""`kernels.matmul`: against float64, its gradients, its transformations, and that weights stay packed in loops."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from test_quant_formats import random_weights

from realm_jax.errors import RealmError
from realm_jax.kernels import IMPLEMENTATIONS, choose_impl, matmul, reference
from realm_jax.quant import FORMATS

every_format = pytest.mark.parametrize("name", FORMATS)
QUICK = ("Q4_0", "Q8_0", "Q3_K", "Q4_K", "IQ2_XXS", "IQ1_S", "IQ4_NL", "TQ1_0", "NVFP4")
one_of_each_kind = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FORMATS]
)


def nmse(got: jax.Array, want: np.ndarray) -> float:
    return float(((np.asarray(got, np.float64) - want) ** 2).sum() / (want**2).sum())


def make(name: str | None, n: int, k: int, *lead: int, seed: int = 0):
    """x (*lead, k) and weights (n, k), packed unless name is None."""
    rng = np.random.default_rng(seed)
    w_NK = rng.standard_normal((n, k), np.float32)
    w = w_NK if name is None else random_weights(name, n, k, seed=seed)
    return jnp.asarray(rng.standard_normal((*lead, k), np.float32)), w


@every_format
@pytest.mark.parametrize("impl", ["reference"])  # the others: tests/test_matmul_kernels.py and tests/gpu
@pytest.mark.parametrize(("lead", "n", "k"), [((1,), 5, 256), ((), 1, 512), ((2, 3), 7, 768)])
def test_equals_float64(name, impl, lead, n, k):
    x, w = make(name, n, k, *lead)
    want = np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64).T
    y = jax.jit(matmul, static_argnames="impl")(x, w, impl=impl)
    chex.assert_shape(y, (*lead, n))
    assert y.dtype == jnp.float32
    assert nmse(y, want) < 1e-12


@pytest.mark.parametrize("stripe", [1, 3 * 512, 4 * 512])
def test_stripes_of_any_size_give_the_same(stripe, monkeypatch):
    """However few rows are dequantized at a time, with and without a rest; in both directions, and differentiated."""
    x, w = make("Q4_K", 7, 512, 3)
    x, dense = x / 16, w.dequantize()
    monkeypatch.setattr(reference, "STRIPE_WEIGHTS", stripe)

    def loss(x, w):
        return jnp.sin(matmul(x, w)).sum()

    for f in (matmul, jax.grad(loss), jax.grad(lambda x, w: jnp.sin(jax.grad(loss)(x, w)).sum())):
        assert nmse(jax.jit(f)(x, w), np.asarray(f(x, dense), np.float64)) < 1e-11


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("w_dtype", ["Q4_K", "Q8_0", jnp.float32, jnp.bfloat16, jnp.float16])
def test_result_has_the_dtype_of_x_and_is_summed_in_float32(dtype, w_dtype):
    x, w = make(w_dtype if isinstance(w_dtype, str) else None, 9, 512, 4)
    x = x.astype(dtype)
    w = w if isinstance(w_dtype, str) else jnp.asarray(w, w_dtype)
    dense = w.dequantize() if isinstance(w_dtype, str) else w
    want = np.asarray(x, np.float64) @ np.asarray(dense, np.float64).T
    y = matmul(x, w)
    assert y.dtype == dtype
    # The only rounding that shows is that of the result: half a unit in its last place.
    assert nmse(y, want) < {jnp.float32: 1e-12, jnp.float16: 2.0**-22, jnp.bfloat16: 2.0**-16}[dtype]


@one_of_each_kind
def test_gradient_in_x_is_that_of_the_dense_product(name):
    x, w = make(name, 6, 512, 2, 3)
    dense = w.dequantize()

    def loss(x, w):
        return jnp.sin(matmul(x, w)).sum()

    np.testing.assert_allclose(jax.grad(loss)(x, w), jax.grad(loss)(x, dense), rtol=1e-5, atol=1e-5)


def test_gradients_equal_finite_differences():
    x, w = make("Q4_K", 6, 512, 2)
    check_grads(lambda x: matmul(x, w), (x,), order=2, modes=["rev"], rtol=1e-2)
    check_grads(lambda x: jax.grad(lambda x: jnp.sin(matmul(x, w)).sum())(x), (x,), order=1, modes=["rev"], rtol=1e-2)


def test_packed_weights_are_constants_and_dense_ones_are_not():
    x, w = make("Q8_0", 3, 64, 2)
    grads = jax.grad(lambda w, x: matmul(x, w).sum(), allow_int=True)(w, x)
    assert {plane.dtype for plane in grads.planes.values()} == {jnp.dtype(jnp.float16), jax.dtypes.float0}
    assert not grads.planes["d"].any()
    x, w = make(None, 3, 64, 2)
    check_grads(matmul, (x, jnp.asarray(w)), order=2, rtol=1e-2)
    mixed = jax.grad(lambda w: matmul(x, w).sum())(jnp.asarray(w, jnp.bfloat16))
    assert mixed.dtype == jnp.bfloat16


@one_of_each_kind
def test_vmap(name):
    x, w = make(name, 5, 256, 3, 2)
    want = matmul(x, w)
    # XLA may sum in another order in another program: either is wrong by K roundings of what it adds up, at most
    # (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
    apart = 2 * 256 * 2.0**-24 * (np.abs(x) @ np.abs(w.dequantize()).T)
    stacked = jax.tree.map(lambda plane: jnp.stack([plane] * 3), w)
    assert (np.abs(jax.vmap(matmul, (0, None))(x, w) - want) <= apart).all()
    assert (np.abs(jax.vmap(matmul)(x, stacked) - want) <= apart).all()
    assert (np.abs(jax.vmap(matmul, (None, 0))(x[0], stacked)[2] - want[0]) <= apart[0]).all()
    grads = jax.vmap(jax.grad(lambda x, w: matmul(x, w).sum()))(x, stacked)
    np.testing.assert_allclose(grads[0, 0], w.dequantize().sum(0), rtol=1e-5, atol=1e-5)


def test_scan_over_stacked_layers_equals_a_loop():
    layers = [make("Q4_K", 256, 256, seed=i)[1] for i in range(3)]
    x = jnp.ones((2, 256)) / 16
    want = x
    for w in layers:
        want = matmul(want, w) / 16
    stacked = jax.tree.map(lambda *planes: jnp.stack(planes), *layers)
    got, _ = jax.lax.scan(lambda x, w: (matmul(x, w) / 16, None), x, stacked)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile()


def temporary_bytes(function, *args) -> int:
    return compiled(function, *args).memory_analysis().temp_size_in_bytes


def layers_of(kind, count: int, width: int) -> list:
    weights = [make(kind if isinstance(kind, str) else None, width, width, seed=i)[1] for i in range(count)]
    return weights if isinstance(kind, str) else [jnp.asarray(w, kind) for w in weights]


def naive(x, w):
    return jnp.dot(x, (w.dequantize() if hasattr(w, "planes") else w.astype(jnp.float32)).T)


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q8_0", jnp.bfloat16])
def test_weights_stay_packed(kind, rows, loop):
    """XLA must not dequantize (or widen) the weights of all layers at once, before a loop or before the first layer."""
    layers, width = 4, 256
    weights = layers_of(kind, layers, width)

    def decode(product, x, weights):
        def step(state):
            i, x = state
            for w in weights:
                x = product(x, w) / 16
            return i + 1, x

        state = (0, x)
        return jax.lax.while_loop(lambda state: state[0] < 10, step, state)[1] if loop else step(state)[1]

    one, x = 4 * width * width, jnp.ones((rows, width))
    dense, packed = (compiled(functools.partial(decode, product), x, weights) for product in (naive, matmul))
    if jax.default_backend() == "cpu" and (loop or rows > 1):  # that the test can fail
        assert dense.memory_analysis().temp_size_in_bytes > (layers - 1) * one
    assert packed.memory_analysis().temp_size_in_bytes < 2 * one
    np.testing.assert_allclose(packed(x, weights), dense(x, weights), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4])
def test_gradient_keeps_no_dequantized_weights(rows):
    """The backward pass of a deep stack holds packed weights, not the float32 ones of the forward pass."""
    weights = layers_of("Q4_K", 6, 256)

    def loss(product, x, weights):
        for w in weights:
            x = jnp.tanh(product(x, w))
        return x.sum()

    one, x = 4 * 256 * 256, jnp.ones((rows, 256))
    if jax.default_backend() == "cpu" and rows > 1:  # that the test can fail
        assert temporary_bytes(lambda x, w: jax.grad(lambda x: loss(naive, x, w))(x), x, weights) > 5 * one
    assert temporary_bytes(lambda x, w: jax.grad(lambda x: loss(matmul, x, w))(x), x, weights) < 3 * one


def test_shared_weights_are_not_copied_by_vmap():
    """A batch of activations against one weight dequantizes it once, not once a row of the batch."""
    x, w = make("Q4_K", 256, 256, 16, 2)
    assert temporary_bytes(jax.vmap(matmul, (0, None)), x, w) < 2 * 4 * 256 * 256


def test_not_a_number_stays_in_its_row():
    """The dependence of weights on activations must not carry their values over."""
    x, w = make("Q4_K", 8, 256, 3)
    for value in (jnp.nan, jnp.inf, -0.0):
        y = matmul(x.at[0, 0].set(value), w)
        np.testing.assert_allclose(y[1:], matmul(x, w)[1:], rtol=1e-6)
    assert matmul(jnp.zeros((0, 256)), w).shape == (0, 8)


def test_choice_is_made_before_tracing():
    x, w = make("Q4_K", 4, 256, 2)
    assert choose_impl(x.shape, w) == "reference"
    assert choose_impl(x.shape, w.dequantize()) == "reference"
    calls = jax.jit(chex.assert_max_traces(lambda x, w: matmul(x, w), n=1))
    for _ in range(3):
        calls(x, w)


def test_an_impl_that_cannot_serve_says_why(monkeypatch):
    x, w = make("Q4_K", 4, 256, 2)
    call = r"impl='{}' cannot multiply x \(2, 256\) by {} weights \(4, 256\): {}"
    with pytest.raises(RealmError, match=call.format("cuda", "Q4_K", "there is no such implementation")):
        matmul(x, w, impl="cuda")
    refusing = IMPLEMENTATIONS["reference"]._replace(refuses=lambda x_shape, w: "it wants 16 rows")
    monkeypatch.setitem(IMPLEMENTATIONS, "picky", refusing)
    with pytest.raises(RealmError, match=call.format("picky", "Q4_K", "it wants 16 rows")):
        matmul(x, w, impl="picky")
    with pytest.raises(RealmError, match=call.format("picky", "float32", "it is for packed weights")):
        matmul(x, w.dequantize(), impl="picky")
    assert choose_impl(x.shape, w) == "reference"


@pytest.mark.parametrize("shape", [(2, 128), (256, 4), ()])
def test_shapes_that_do_not_fit_are_refused(shape):
    _, w = make("Q4_K", 4, 256)
    with pytest.raises(RealmError, match=r"x \(\.\.\., K\) and w \(N, K\)"):
        matmul(jnp.ones(shape), w)
    with pytest.raises(RealmError, match=r"w \(3, 4, 256\)"):
        matmul(jnp.ones((1, 256)), jax.tree.map(lambda plane: jnp.stack([plane] * 3), w))
