"""Ways to encode: which error counts, and how long to look for less of it. `quantize` and the encoders use this.

A squared error can be weighted by input feature with an *importance*, the mean square of the activations that a weight
is multiplied by: then the sum of the weighted errors estimates the error of the product (llama.cpp's imatrix). ggml
gives larger weights more weight than that, also where there is no importance.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.quant.lanes import highest, over_block, power_of_two, to_lanes
from realm_jax.quant.opaque import settle

NEGLECTED = 1e-7  # of the largest importance in a block: the least that any weight has, lest a block have none


class Method(NamedTuple):
    """plain: errors are weighed by importance alone, not as ggml does. rounds: how often all is fitted to all again."""

    plain: bool
    rounds: int


METHODS = {
    "refine": Method(plain=False, rounds=2),
    "mse": Method(plain=True, rounds=2),
    "search": Method(plain=False, rounds=0),
}
DEFAULT_METHOD = "refine"


def importance_lanes(importance: jax.Array | None, w: jax.Array, size: int) -> jax.Array | None:
    """Importance that broadcasts to rows w (..., K), as lanes (size, L) with values up to about 1."""
    if importance is None:
        return None
    lanes = to_lanes(jnp.broadcast_to(importance, w.shape), size)
    unit = settle(power_of_two(over_block(highest, lanes)))
    return settle(lanes / unit + NEGLECTED)


def steps(first: float, last: float, step: float) -> np.ndarray:
    """Numbers from first to last, float32 (C,): candidates for `fit`, as codes beyond the last."""
    return np.linspace(first, last, round((last - first) / step) + 1, dtype=np.float32)
