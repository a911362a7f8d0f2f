"""Scales of one byte, E8M0 (MXFP4) and UE4M3 (NVFP4), to float32 and back, as ggml reads and rounds them.

ggml doubles the 4-bit numbers that these scales multiply, so as to have integers, and halves the scales. Sources: OCP
Microscaling Formats (MX) 1.0; ggml_e8m0_to_fp32_half, ggml_ue4m3_to_fp32 and ggml_fp32_to_ue4m3 in ggml-impl.h.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LARGEST_UE4M3 = 464  # above it, 448 would no longer be the nearest
LOG2_STEP = 2.0**-24 / np.log(2)  # by how much log2 falls below an integer n one step of float32 below 2^n


def e8m0(exponent: jax.Array) -> jax.Array:
    """Half of what an E8M0 byte stands for, 2^(e - 128): float32, subnormal for 0 and 1."""
    bits = exponent.astype(jnp.uint32)
    tiny = np.uint32(0x00200000) << bits
    return lax.bitcast_convert_type(jnp.where(bits < 2, tiny, bits - np.uint32(1) << np.uint32(23)), jnp.float32)


def ue4m3(byte: jax.Array) -> jax.Array:
    """Half of what a UE4M3 byte (uint32) stands for: float32. The top bit is ignored; 0x7F, not a number, is read as 0.

    Source: ggml_ue4m3_to_fp32 in ggml-impl.h.
    """
    exponent, mantissa = byte >> np.uint32(3) & np.uint32(0xF), byte & np.uint32(7)
    normal = lax.bitcast_convert_type(
        (exponent + np.uint32(119)) << np.uint32(23) | mantissa << np.uint32(20), jnp.float32
    )
    value = jnp.where(exponent == 0, mantissa.astype(jnp.float32) * jnp.float32(2**-10), normal)
    return jnp.where(byte == np.uint32(0x7F), 0, value)


def e8m0_of(largest: jax.Array) -> jax.Array:
    """The E8M0 byte floor(log2(largest)) - 2 of ggml, uint8.

    log2 is a float32 there, which the last few numbers below 2^n round up to n: so it is here, by its tangent in 2^n,
    whose floor is right for the other numbers as well.
    """
    bits = lax.bitcast_convert_type(largest, jnp.uint32)
    below = (np.uint32(0x800000) - (bits & np.uint32(0x7FFFFF))).astype(jnp.float32)
    log2 = (bits >> np.uint32(23)).astype(jnp.float32) - 126 - below * np.float32(LOG2_STEP)
    return jnp.clip(jnp.floor(log2) + 125, 0, 254).astype(jnp.uint8)


def ue4m3_of(scale: jax.Array) -> jax.Array:
    """The UE4M3 byte that ggml_fp32_to_ue4m3 gives, uint32: halves upwards, 448 from 256 on; 0x7F if too large."""
    bits = lax.bitcast_convert_type(scale, jnp.uint32)
    rounded = (bits + np.uint32(1 << 19) >> np.uint32(20)) - np.uint32(120 << 3)  # may carry into the exponent
    normal = jnp.where(rounded >= np.uint32(15 << 3), np.uint32(0x7E), rounded)
    tiny = jnp.minimum((scale * 512 + 0.5).astype(jnp.uint32), np.uint32(7))
    return jnp.where(scale < 2.0**-6, tiny, jnp.where(scale <= LARGEST_UE4M3, normal, np.uint32(0x7F)))
