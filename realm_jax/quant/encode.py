"""`quantize`: floats to a packed tensor. Used for exports, for merging adapters back, and by researchers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.errors import RealmError
from realm_jax.quant.formats import DENSE_FORMATS, FORMATS, get_format
from realm_jax.quant.layout import Format
from realm_jax.quant.tensor import QuantizedTensor

STRIPE_WEIGHTS = 1 << 18  # the searching encoders hold some ten arrays of this many float32 at a time


def quantize(w: Any, format: str) -> jax.Array | QuantizedTensor:
    """Weights (..., N, K) of any float dtype in a ggml format: packed, or a plain array for F32, F16 and BF16.

    Deterministic. A QuantizedTensor is dequantized first. Also works on traced arrays, where the checks of values
    cannot be made. RealmError if the format is not supported or has no encoder, K is not whole blocks, or a value is
    not finite or too large for the format.
    """
    if isinstance(w, QuantizedTensor):
        w = w.dequantize()
    elif not isinstance(w, jax.Array):
        w = np.asarray(w)
    traced = isinstance(w, jax.core.Tracer)
    kind = None if format in DENSE_FORMATS else _with_encoder(format, w.shape)
    if not traced and not _all_finite(w):
        raise RealmError(f"cannot quantize to {format}: the weights {tuple(w.shape)} hold NaN or infinity")
    if kind is None:
        out = jnp.asarray(w).astype(DENSE_FORMATS[format])
        fits = traced or _all_finite(out)
    else:
        out = QuantizedTensor(kind.encode(w) if traced else _encode_in_stripes(kind, w), format)
        fits = traced or all(map(_all_finite, out.block_scales().values()))
    if not fits:
        raise RealmError(f"cannot quantize to {format}: weights up to {np.abs(w).max():.3g} are too large for it")
    return out


def _with_encoder(format: str, shape: tuple[int, ...]) -> Format:
    """The block format of that name; RealmError unless it can encode rows of that shape."""
    kind = get_format(format)
    if kind.encode is None:
        able = [name for name, other in FORMATS.items() if other.encode]
        raise RealmError(f"there is no encoder for {format} yet; these have one: {', '.join(able)}")
    if not shape:
        raise RealmError(f"cannot quantize a scalar to {format}: it wants rows of whole blocks of {kind.block_size}")
    kind.blocks_in_row(shape[-1])
    return kind


def _all_finite(x: Any) -> bool:
    return bool(jnp.isfinite(x).all())


def _encode_in_stripes(kind: Format, w: Any) -> dict[str, jax.Array]:
    """`kind.encode` over stripes of blocks of one size, the last padded with zeros.

    So there is one compilation a format, little memory, and a block becomes the same bytes in a tensor of any shape
    (compiled for another size, sums would be added in another order, and a search could end elsewhere).
    """
    blocks = w.reshape(-1, kind.block_size)
    step = STRIPE_WEIGHTS // kind.block_size
    parts = []
    for start in range(0, max(1, len(blocks)), step):
        part = jnp.asarray(blocks[start : start + step], jnp.float32)
        count = len(part)
        part = jnp.pad(part, ((0, step - count), (0, 0)))
        parts.append({name: plane[:count] for name, plane in _encode(part, kind.name).items()})
    rows, per_row = w.shape[:-1], w.shape[-1] // kind.block_size
    return {f.name: _join_blocks(jnp.concatenate([p[f.name] for p in parts]), rows, per_row) for f in kind.fields}


@functools.partial(jax.jit, static_argnames="format")
def _encode(blocks: jax.Array, format: str) -> dict[str, jax.Array]:
    return get_format(format).encode(blocks)


def _join_blocks(plane: jax.Array, rows: tuple[int, ...], per_row: int) -> jax.Array:
    """A plane of single blocks (blocks, [W,] chunks) as a plane of rows (*rows, [W,] per_row * chunks)."""
    *words, chunks = plane.shape[1:]
    plane = jnp.moveaxis(plane.reshape(*rows, per_row, *words, chunks), len(rows), -2)
    return plane.reshape(*rows, *words, per_row * chunks)
