"""A twin of a model that computes the same function with weights on no quantization grid.

A quantized model is no good subject for quantization experiments: its weights lie on the grid of their format, and to
quantize them to it again costs nothing. The twin is the same function in another basis. Gains of RMSNorms are folded
into the matrices that follow them; norms without gains see only lengths, so the residual stream can be turned by any
orthogonal matrix (as in SliceGPT, Ashkboos et al. 2024, and QuaRot, Ashkboos et al. 2024). A large random turn would
also spread outliers evenly, which makes quantization easier than it is in real models; hence a turn near the identity.

Used by `quant_setup.py`. Shapes: D width, N outputs, K inputs.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from realm_jax.errors import RealmError
from realm_jax.model import Model
from realm_jax.model.params import Weight, build_params, get_weight, tensor_specs
from realm_jax.quant import QuantizedTensor

_READ_ATTENTION, _READ_FFN = ("q", "k", "v"), ("gate", "up")  # matrices behind a norm, which read the residual stream
_WRITE = ("o", "down")  # matrices whose outputs are added to it


def off_grid(model: Model, *, turn: float, seed: int) -> Model:
    """The twin: equal logits up to rounding, dense float32 weights, an output matrix of its own, norms of ones.

    turn: how far the residual stream is turned, in radians (root mean square over directions); see `turning_matrix`.
    """
    params, config = model.params, model.config
    turn_DD = turning_matrix(config.width, turn, seed)
    specs = {spec.path: spec for spec in tensor_specs(config)}
    old = {path: get_weight(params, path) for path in specs}
    weights = {path: _float64(weight) for path, weight in old.items() if weight is not None}
    if ("output",) not in weights:
        weights[("output",)] = weights[("embedding",)]
    new = {path: _turned(path, weight, weights, turn_DD) for path, weight in weights.items()}
    origin = dataclasses.replace(model.origin, source=f"{model.origin.source}, off its grid", unused={})
    arrays = {path: jnp.asarray(weight, jnp.float32) for path, weight in new.items()}
    return model.replace(params=build_params(config, arrays), origin=origin)


def turning_matrix(width: int, turn: float, seed: int) -> np.ndarray:
    """A random orthogonal matrix, float64 (D, D), that turns directions by about `turn` radians; 0 gives the identity.

    The Cayley transform of a skew-symmetric matrix A whose A x has root mean square length 2 tan(turn / 2) |x|.
    Raises RealmError unless 0 <= turn < pi.
    """
    if not 0 <= turn < np.pi:
        raise RealmError(f"the turn is {turn} radians; want at least 0 and less than pi")
    normal = np.random.default_rng(seed).normal(size=(width, width))
    half = np.tan(turn / 2) * (normal - normal.T) / np.sqrt(2 * max(1, width - 1))
    identity = np.eye(width)
    return np.linalg.solve(identity - half, identity + half)


def _turned(path: tuple, weight: np.ndarray, weights: dict[tuple, np.ndarray], turn_DD: np.ndarray) -> np.ndarray:
    """The weight at a path in the new basis, where the residual stream x is x @ turn_DD."""
    *above, name = path
    if name == "norm":
        return np.ones_like(weight)
    if name == "embedding":
        return weight @ turn_DD
    if name == "output" or name in _READ_ATTENTION or name in _READ_FFN:
        return (weight * weights[(*above, "norm")]) @ turn_DD
    if name in _WRITE:
        return turn_DD.T @ weight
    if name in ("o_bias", "down_bias"):
        return weight @ turn_DD
    return weight  # biases of q, k, v, gate, up and rope factors do not see the residual stream


def _float64(weight: Weight) -> np.ndarray:
    return np.asarray(weight.dequantize() if isinstance(weight, QuantizedTensor) else weight).astype(np.float64)
