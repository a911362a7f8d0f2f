"""One tensor from floats to a format, and what that cost. Called by `files`, stripe by stripe, and by `models`."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import quant
from realm_jax.quant import QuantizedTensor


@dataclass(frozen=True)
class Errors:
    """Squared differences between weights and their quantized form, summed up in float64; `+` joins stripes.

    weighted_error, weighted_square: a column counts as often as its importance says. weighted: there was importance.
    """

    error: float = 0.0
    square: float = 0.0
    weighted_error: float = 0.0
    weighted_square: float = 0.0
    weighted: bool = False

    @classmethod
    def between(cls, w: jax.Array, quantized: jax.Array | QuantizedTensor, importance: np.ndarray | None) -> "Errors":
        """Of one stripe; w (..., N, K), float32, is what `quantized` was made from; importance broadcasts to it."""
        if isinstance(quantized, QuantizedTensor):
            quantized = quantized.dequantize()
        weights = np.ones(w.shape[-1], np.float32) if importance is None else importance
        sums = [float(np.asarray(rows, np.float64).sum()) for rows in _sums(w, quantized, weights)]
        return cls(*sums, weighted=importance is not None)

    def __add__(self, other: "Errors") -> "Errors":
        return Errors(
            self.error + other.error,
            self.square + other.square,
            self.weighted_error + other.weighted_error,
            self.weighted_square + other.weighted_square,
            self.weighted or other.weighted,
        )

    @property
    def relative(self) -> float:
        """Mean squared error over mean square; 0 for weights that are all zero."""
        return self.error / self.square if self.square else 0.0

    @property
    def relative_weighted(self) -> float | None:
        """The same with importance; None where there was none."""
        if not self.weighted:
            return None
        return self.weighted_error / self.weighted_square if self.weighted_square else 0.0


@jax.jit
def _sums(w: jax.Array, quantized: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
    """Row by row: squared errors, squares, and both weighted; each (..., N)."""
    error, square = jnp.square(quantized.astype(jnp.float32) - w), jnp.square(w)
    return tuple(jnp.sum(x, -1) for x in (error, square, error * weights, square * weights))


def encode(w: Any, format: str, importance: Any | None, method: str) -> jax.Array | QuantizedTensor:
    """`quant.quantize`, but for dense formats, where there is nothing to weigh."""
    if format in quant.DENSE_FORMATS:
        importance = None
    return quant.quantize(w, format, importance=importance, method=method)
