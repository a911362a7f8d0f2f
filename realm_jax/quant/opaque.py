"""Holding XLA back: dependences that its optimizer does not see through. The encoders and `kernels.residency` use this.

`lax.optimization_barrier` is enough on GPUs. XLA's CPU backend drops barriers before it fuses and orders operations.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Arrays = TypeVar("Arrays")


def opaque_zero(x: jax.Array) -> jax.Array:
    """A uint32 zero made of the first number in x by arithmetic that XLA does not see through: n (n + 1) is even."""
    n = lax.bitcast_convert_type(x.reshape(-1)[0].astype(jnp.float32), jnp.uint32)
    return (n * (n + np.uint32(1))) & np.uint32(1)


def settle(arrays: Arrays) -> Arrays:
    """A pytree of arrays, unchanged, but made in memory: not computed anew in every loop that reads them.

    So a float16 is rounded, too, where XLA's GPU backend would go on with the float32 that it came from. On CPU it is
    the result of a loop that runs no times, through which XLA cannot fuse.
    """
    leaves, tree = jax.tree.flatten(arrays)
    leaves = lax.optimization_barrier(leaves)
    if jax.default_backend() == "cpu" and leaves[0].size:
        times = opaque_zero(leaves[0])
        state = (np.uint32(0), leaves)
        _, leaves = lax.while_loop(lambda s: s[0] < times, lambda s: (s[0] + np.uint32(1), [-x for x in s[1]]), state)
    return jax.tree.unflatten(tree, leaves)
