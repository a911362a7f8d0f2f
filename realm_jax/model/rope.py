"""Rotary position embeddings and their context extensions, as llama.cpp computes them.

The frequencies are constants of a `Config` (computed once with NumPy in float64) except for the
factor tensor that some files carry; called by `model.transformer`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.model.config import Rope

YARN_BETA_FAST, YARN_BETA_SLOW = 32.0, 1.0  # rotations within the original context: the ramp's two ends


def frequencies(rope: Rope) -> tuple[np.ndarray, float]:
    """Angular frequency of each rotated pair, (dimensions / 2,) float64 radians a token, and the magnitude.

    The magnitude multiplies sine and cosine. Sources: Su et al. 2021; linear interpolation, Chen et
    al. 2023; YaRN, Peng et al. 2023, with the correction range rounded as in its reference code.
    """
    half = rope.dimensions // 2
    plain = rope.base ** (-np.arange(half) / half)
    if rope.scaling not in ("linear", "yarn", "longrope"):
        return plain, rope.attn_factor
    interpolated = plain / rope.factor
    if rope.scaling != "yarn":
        return interpolated, rope.attn_factor

    def dimension(rotations: float) -> float:
        wavelengths = rope.original_context / (rotations * 2 * math.pi)
        return rope.dimensions * math.log(wavelengths) / (2 * math.log(rope.base))

    low = max(0.0, math.floor(dimension(YARN_BETA_FAST)))
    high = min(rope.dimensions - 1.0, math.ceil(dimension(YARN_BETA_SLOW)))
    ramp = np.clip((np.arange(half) - low) / max(0.001, high - low), 0.0, 1.0)
    magnitude = 1.0 + 0.1 * math.log(rope.factor) if rope.factor > 1.0 else 1.0
    return interpolated * ramp + plain * (1.0 - ramp), magnitude * rope.attn_factor


def rope_tables(rope: Rope, factors: jax.Array | None, position_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every angle, float32 (B, T, dimensions / 2). factors: divide the frequencies."""
    frequency, magnitude = frequencies(rope)
    frequency = jnp.asarray(frequency, jnp.float32)
    if factors is not None:
        frequency = frequency / factors.astype(jnp.float32)
    angle = position_BT[:, :, None].astype(jnp.float32) * frequency[None, None, :]
    return jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude


def rotate(x_BTHC: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array, halves: bool) -> jax.Array:
    """Turns the first `2 R` channels of every head: neighbouring pairs, or with `halves` (i, i + R) pairs."""
    R = cos_BTR.shape[-1]
    dtype = x_BTHC.dtype
    turned, rest = x_BTHC[..., : 2 * R].astype(jnp.float32), x_BTHC[..., 2 * R :]
    pairs = turned.reshape(*turned.shape[:-1], 2, R) if halves else turned.reshape(*turned.shape[:-1], R, 2)
    axis = -2 if halves else -1
    a, b = jnp.take(pairs, 0, axis), jnp.take(pairs, 1, axis)
    cos, sin = cos_BTR[:, :, None, :], sin_BTR[:, :, None, :]
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis).reshape(turned.shape)
    return jnp.concatenate([turned.astype(dtype), rest], -1)
