"""What a product asks for ahead of the next: which bytes, that the instruction is there, and that results stay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_quant_formats import random_weights

from random_model import weight_spec
from realm_jax.errors import RealmError
from realm_jax.kernels import matmul, pallas, prefetch
from realm_jax.kernels.matmul import matmul_each

MIB = 2**20


def bytes_of(plane) -> int:
    return plane.size * plane.dtype.itemsize


@pytest.mark.parametrize("budget", [0, 5000, 10**9])
def test_first_rows_fill_the_budget_one_weight_after_the_other(budget):
    weights = [weight_spec("Q4_K", (37, 256)), pallas.Shape((5, 24), jnp.bfloat16), weight_spec("Q6_K", (3, 512))]
    found = prefetch.first_rows(weights, budget)
    counts = {id(plane): count for plane, count in found}
    left = budget
    for w in weights:
        planes = jax.tree.leaves(w)
        row = sum(bytes_of(plane) // w.shape[0] for plane in planes)
        rows = min(w.shape[0], left // row)
        left -= rows * row
        for plane in planes:
            assert counts.get(id(plane), 0) == rows * (bytes_of(plane) // w.shape[0]) // 16 * 16 <= bytes_of(plane)
    assert sum(count for _, count in found) <= budget


@pytest.mark.parametrize(
    ("counts", "warps"),
    [((16,), 1), ((453376, 14508032, 1813504), 1056), ((8208, 16, 8176, 2**20), 7), ((2 * MIB,) * 12, 2112)],
)
def test_parts_are_one_a_warp_and_cover_every_byte_once(counts, warps):
    parts = prefetch.cut(counts, warps)
    which, first, count = map(np.asarray, parts.of(jnp.arange(-3, 3 * warps + 9, dtype=jnp.int32)))
    assert (count[:3] == 0).all() and (count[3 + warps :] == 0).all()
    assert (first[count > 0] % 16 == 0).all() and (count % 16 == 0).all()
    for plane, whole in enumerate(counts):
        own = (which == plane) & (count > 0)
        ends = np.cumsum(count[own])
        np.testing.assert_array_equal(first[own], [0, *ends[:-1]])
        assert ends[-1] == whole


def test_very_few_warps_ask_for_the_first_bytes():
    which, first, count = prefetch.cut((16 * MIB, 16 * MIB), 3).of(jnp.arange(3, dtype=jnp.int32))
    assert which.tolist() == [0, 0, 0] and first.tolist() == [0, MIB // 2, MIB] and count.tolist() == [MIB // 2] * 3


@pytest.mark.parametrize(("text", "nbytes"), [("", 16 * MIB), ("0", 0), ("24", 24 * MIB)])
def test_how_much_is_asked_for(monkeypatch, text, nbytes):
    monkeypatch.setenv(prefetch.VARIABLE, text)
    assert prefetch.most_bytes() == nbytes


def test_a_small_cache_is_left_alone(monkeypatch):
    monkeypatch.setattr(pallas, "capability", lambda: "8.6")
    assert prefetch.most_bytes() == 0


def test_what_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv(prefetch.VARIABLE, "16M")
    with pytest.raises(RealmError, match="REALM_PREFETCH is '16M'; want whole MiB, 0 to 1024"):
        prefetch.most_bytes()


@pytest.mark.usefixtures("for_an_h200")
@pytest.mark.parametrize(
    ("capability", "instruction", "outputs"),  # other outputs, since JAX 0.11 traces for equal types once
    [
        ("9.0", "cp.async.bulk.prefetch.L2.global", 16),
        pytest.param("8.0", "prefetch.global.L2 [at]", 32, marks=pytest.mark.slow),
    ],
)
def test_the_instruction_is_that_of_the_gpu(monkeypatch, capability, instruction, outputs):
    monkeypatch.setattr(pallas, "capability", lambda: capability)
    x, w = pallas.Shape((1, 256), jnp.bfloat16), weight_spec("Q8_0", (outputs, 256))
    then = weight_spec("Q4_0", (64, 512))
    traced = jax.jit(lambda x, w, *then: matmul(x, w, impl="triton", then=then)).trace(x, w, then, x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(instruction) == 1 and ("bulk" in text) == (capability == "9.0")


@pytest.mark.usefixtures("for_an_h200")
def test_switched_off_or_without_weights_nothing_is_asked_for(monkeypatch):
    assert len(prefetch.request((weight_spec("Q4_0", (64, 512)),))[0]) == 2
    assert prefetch.request(()) == ([], prefetch.Request())
    monkeypatch.setenv(prefetch.VARIABLE, "0")
    assert prefetch.request((weight_spec("Q4_0", (64, 512)),)) == ([], prefetch.Request())


def test_results_gradients_and_vmap_are_the_same():
    x, w = jax.random.normal(jax.random.key(0), (3, 64)), random_weights("Q8_0", 5, 64, seed=1)
    then = random_weights("Q8_0", 7, 64, seed=2), jnp.ones((4, 5))

    def both(x, then):
        one = matmul(x, w, then=then)
        return [one, *matmul_each(x, [w, w], then=then)]

    def results(then):
        own = functools.partial(both, then=then)
        return own(x), jax.vmap(own)(x), jax.grad(lambda x: sum((y**2).sum() for y in own(x)))(x)

    with pallas.interpreted():
        for got, want in zip(jax.tree.leaves(results(then)), jax.tree.leaves(results(())), strict=True):
            np.testing.assert_array_equal(got, want)
        for y in jax.vmap(lambda dense: both(x, (dense,)))(jnp.ones((2, 4, 5))):
            np.testing.assert_array_equal(y, [matmul(x, w)] * 2)
        change = jax.grad(lambda dense: matmul(x, w, then=(dense,)).sum())(then[1])
        np.testing.assert_array_equal(change, 0)
