"""The time of a product by packed weights that come from memory. Called by `kernel_roofline` and `tune_kernels`.

One compiled loop multiplies x by many different matrices, so that nothing is read from the second-level cache, and adds
a trace of every product to the next round's x, so that nothing is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from random_model import random_weight
from realm_jax import speed
from realm_jax.quant import QuantizedTensor

Product = Callable[[jax.Array, QuantizedTensor], jax.Array]


class Loop(NamedTuple):
    """A compiled program that multiplies x (M, K) by each of the weights, `rounds` times."""

    program: Callable[..., Any]
    x: jax.Array
    weights: list[QuantizedTensor]
    rounds: int

    def seconds(self, repeats: int) -> float:
        """Of one product: the median over `repeats` calls of the program."""
        spent = speed.median_seconds(self.program, self.x, self.weights, repeats=repeats)
        return spent / self.rounds / len(self.weights)


def compile_loop(product: Product, x: jax.Array, weights: list[QuantizedTensor], rounds: int) -> Loop:
    """The loop, ready to be timed; threads may compile several side by side."""
    traced_once = jax.jit(lambda x, w: product(x, w))

    def every_product(x: jax.Array, weights: list[QuantizedTensor]) -> jax.Array:
        def body(_: int, x: jax.Array) -> jax.Array:
            # Without the barrier XLA might compute no more of a product than what is used of it.
            products = [lax.optimization_barrier(traced_once(x, w)) for w in weights]
            return x + jnp.asarray(1e-30, x.dtype) * sum(y[:, :1] for y in products)

        return lax.fori_loop(0, rounds, body, x)

    return Loop(jax.jit(every_product).lower(x, weights).compile(), x, weights, rounds)


def random_weights(name: str, shape: tuple[int, int], gigabytes: float) -> list[QuantizedTensor]:
    """So many different matrices of that format and shape as make `gigabytes`, two at least."""
    one = random_weight(jax.random.key(0), name, shape, shape[1] ** -0.5)
    copies = max(2, round(gigabytes * 1e9 / one.nbytes))
    return [one, *(random_weight(jax.random.key(i), name, shape, shape[1] ** -0.5) for i in range(1, copies))]


def random_rows(rows: int, width: int, dtype: str) -> jax.Array:
    """x (rows, width)."""
    return jax.random.normal(jax.random.key(1), (rows, width), dtype)
