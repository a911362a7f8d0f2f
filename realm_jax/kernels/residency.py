"""Keeps weights packed until they are multiplied, and activations away until they are wanted again. Called by
`reference` and `model.transformer`.

Left alone, XLA computes everything that depends on weights alone as early as it can. Weights are constants of a decode
loop, so it moves their dequantization out of the loop; and its CPU backend runs what is ready in breadth, so that even
a single forward pass dequantizes every layer before it multiplies by the first. Either way all weights would stand in
memory in float32, once. So the weights are made to depend on the activations that they are about to meet.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from realm_jax.quant.opaque import opaque_zero

Weights = TypeVar("Weights")


@jax.custom_jvp
def packed_until(x: jax.Array, w: Weights) -> tuple[jax.Array, Weights]:
    """x and a pytree of weights w, unchanged, but w not available before x. Transparent to differentiation."""
    leaves, tree = jax.tree.flatten(w)
    x, leaves = _tie(x, leaves)
    return x, jax.tree.unflatten(tree, leaves)


@packed_until.defjvp
def _packed_until_jvp(primals: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    return packed_until(*primals), tangents


def rematerialize(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(x, *rest)`, for which the backward pass keeps the arguments and computes the rest again (Chen et al.
    2016). All arrays that it reads must be arguments; x is one array.

    `jax.checkpoint` leaves it to a barrier that the two computations stay two; XLA's CPU backend drops that, finds them
    equal, and keeps everything. Here the second waits for the gradient of its result.
    """

    def backward(arguments: tuple, gradient: Any) -> tuple:
        x, *rest = arguments
        _, x = packed_until(jax.tree.leaves(gradient)[0], x)
        return jax.vjp(function, x, *rest)[1](gradient)

    twice = jax.custom_vjp(function)
    twice.defvjp(lambda *arguments: (function(*arguments), arguments), backward)
    return twice


@custom_vmap
def _tie(x: jax.Array, leaves: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
    """An optimization barrier; and on CPU, where it is gone before operations are put in order, a real dependence."""
    x, leaves = lax.optimization_barrier((x, leaves))
    if jax.default_backend() == "cpu" and x.size:
        zero = opaque_zero(x)
        leaves = [_flip_bits(leaf, zero) for leaf in leaves]
    return x, leaves


@_tie.def_vmap
def _tie_vmap(size: int, batched: tuple, x: jax.Array, leaves: list[jax.Array]) -> tuple[tuple, tuple]:
    """One row of a batch of activations is enough to wait for; weights that are not batched must stay so."""
    _, tied = _tie(x[0] if batched[0] else x, leaves)
    return (x, tied), tuple(batched)


def _flip_bits(leaf: jax.Array, bits: jax.Array) -> jax.Array:
    """The array with these bits of each item flipped: unchanged where `bits` is zero."""
    unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    flipped = lax.bitcast_convert_type(leaf, unsigned) ^ bits.astype(unsigned)
    return lax.bitcast_convert_type(flipped, leaf.dtype)
