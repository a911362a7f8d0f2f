"""Packed weights as JAX values: `QuantizedTensor`, and the ways in and out of it.

The model's loader and saver use `load_weight` and `raw_bytes`; the kernels read `planes`; researchers use the rest.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from realm_jax.errors import RealmError
from realm_jax.quant.formats import DENSE_FORMATS, get_format, row_bytes
from realm_jax.quant.layout import Affine, aligned_empty


@flax.struct.dataclass(eq=False)
class QuantizedTensor:
    """Weights (..., N, K) that stay in their ggml blocks: a frozen pytree whose leaves are planes.

    planes: the fields of the blocks, each (..., N, *tail); see `quant.layout` and docs/formats.md. Together they hold
    exactly the bits of the blocks. format: the ggml name, static. arithmetic: how `kernels.matmul` multiplies by them,
    static, and no part of a file: "float", "int8" (for few rows of activations) or "int8_any_rows" (for measuring). The
    shape follows from the planes, so that slices, stacks, `vmap` and `scan` over leading axes give QuantizedTensors of
    the right shape.
    """

    planes: dict[str, jax.Array]
    format: str = flax.struct.field(pytree_node=False)
    arithmetic: str = flax.struct.field(pytree_node=False, default="float")

    @classmethod
    def from_bytes(cls, raw: np.ndarray, format: str, shape: tuple[int, ...]) -> QuantizedTensor:
        """Raw ggml blocks (uint8, any shape with the right number of bytes) of a tensor (..., N, K)."""
        raw = _as_rows(raw, format, shape)
        return cls(jax.device_put(get_format(format).split(raw)), format)

    def to_bytes(self) -> np.ndarray:
        """The ggml blocks, uint8 (..., N, row_bytes), bit for bit those that `from_bytes` was given."""
        return get_format(self.format).join(jax.device_get(self.planes))

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """All weights as an array (..., N, K), computed in float32 and then cast."""
        return _dequantize(self.planes, self.format).astype(dtype)

    def decode(self) -> Affine:
        """The blocks in the common form scale * code + offset, for looking into them: see `quant.layout.Affine`."""
        return _decode(self.planes, self.format)

    def block_scales(self) -> dict[str, jax.Array]:
        """The floating-point scales of the blocks by their ggml names (`d`, `dmin`, ...), each float32 (..., N, G).

        NVFP4 has four in a block, (..., N, G, 4). A scale that is no number is NaN, whatever ggml reads it as.
        """
        return get_format(self.format).block_scales(self.planes)

    def take(self, ids: jax.Array) -> jax.Array:
        """Rows by index, float32 (*ids.shape, K): gathers packed rows and dequantizes only these.

        ids: integers of any shape, traced or not; those outside 0..N-1 are clipped.
        """
        if self.ndim != 2:
            raise RealmError(f"take wants a tensor (N, K), not {self.shape}; use jax.vmap over leading axes")
        ids = jnp.asarray(ids)
        rows = {name: _in_order(jnp.take(plane, ids, axis=0, mode="clip")) for name, plane in self.planes.items()}
        return _dequantize(rows, self.format)

    @property
    def shape(self) -> tuple[int, ...]:
        kind = get_format(self.format)
        rows, blocks = kind.rows_and_blocks(self.planes)
        return (*rows, blocks * kind.block_size)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many weights."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of the planes on the device (where 6-bit scales become bytes, 2 or 4 a block more than in the file)."""
        return sum(plane.size * plane.dtype.itemsize for plane in self.planes.values())

    def __repr__(self) -> str:
        if not all(hasattr(plane, "dtype") for plane in self.planes.values()):  # a tree of specs, None, ...
            return f"QuantizedTensor({self.format}, {self.planes})"
        size = f"{self.nbytes / 1e6:.1f} MB" if self.nbytes >= 1e6 else f"{self.nbytes / 1e3:.1f} kB"
        arithmetic = "" if self.arithmetic == "float" else f", {self.arithmetic}"
        return f"QuantizedTensor({self.format}, {self.shape}, {size}{arithmetic})"


def _in_order(x: jax.Array) -> jax.Array:
    """x, kept from being laid out otherwise: XLA would lay out the whole plane like the one row taken from it."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


@functools.partial(jax.jit, static_argnames="format")
def _dequantize(planes: dict[str, jax.Array], format: str) -> jax.Array:
    return get_format(format).dequantize(planes)


@functools.partial(jax.jit, static_argnames="format")
def _decode(planes: dict[str, jax.Array], format: str) -> Affine:
    return get_format(format).decode(planes)


def load_weight(raw: np.ndarray, format: str, shape: tuple[int, ...]) -> jax.Array | QuantizedTensor:
    """A tensor of a file as a weight: a plain array in its own dtype for dense formats, else packed.

    raw: uint8, any shape with the right number of bytes; it is copied once and not kept. RealmError for a format that
    is not supported or bytes that do not fit the shape.
    """
    if format not in DENSE_FORMATS:
        return QuantizedTensor.from_bytes(raw, format, shape)
    raw = _as_rows(raw, format, shape)
    copy = aligned_empty(tuple(shape), DENSE_FORMATS[format])
    copy.view(np.uint8).reshape(raw.shape)[...] = raw
    return jax.device_put(copy)  # unlike jnp.asarray, uses an aligned array in place on the CPU backend


def raw_bytes(weight: jax.Array | QuantizedTensor) -> tuple[str, np.ndarray]:
    """The inverse of `load_weight`: format name and uint8 (..., row_bytes)."""
    if isinstance(weight, QuantizedTensor):
        return weight.format, weight.to_bytes()
    for name, dtype in DENSE_FORMATS.items():
        if weight.dtype == dtype:
            array = np.ascontiguousarray(weight)
            return name, array.view(np.uint8).reshape(*array.shape[:-1], -1)
    raise RealmError(f"an array of {weight.dtype} has no ggml format; {', '.join(DENSE_FORMATS)} have")


def dequantize(raw: np.ndarray, format: str, shape: tuple[int, ...]) -> jax.Array:
    """Raw ggml blocks (uint8) of a tensor (..., N, K) to float32; dense formats are converted."""
    weight = load_weight(raw, format, shape)
    if isinstance(weight, QuantizedTensor):
        return weight.dequantize()
    return weight.astype(jnp.float32)


def _as_rows(raw: np.ndarray, format: str, shape: tuple[int, ...]) -> np.ndarray:
    """`raw` as uint8 (*shape[:-1], row_bytes), checked against the shape."""
    shape = tuple(shape)
    width = row_bytes(format, shape[-1]) if shape else row_bytes(format, 1)
    want = (*shape[:-1], width)
    raw = np.asarray(raw)
    if raw.dtype != np.uint8 or raw.size != np.prod(want):
        raise RealmError(
            f"{format} weights of shape {shape} are {int(np.prod(want))} bytes (uint8), not {raw.size} of {raw.dtype}"
        )
    return raw.reshape(want)
