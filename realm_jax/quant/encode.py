"""`quantize`: floats to a packed tensor. Used for exports, for merging adapters back, and by researchers."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from realm_jax.errors import RealmError
from realm_jax.quant.formats import DENSE_FORMATS, FORMATS, get_format
from realm_jax.quant.layout import Format, cut_of_group
from realm_jax.quant.methods import DEFAULT_METHOD, METHODS
from realm_jax.quant.tensor import QuantizedTensor

# So many weights are encoded at a time, in some ten arrays of that size: what stays in cache, or keeps a GPU busy.
CPU_STRIPE, GPU_STRIPE = 1 << 20, 1 << 24


def quantize(
    w: Any, format: str, *, importance: Any = None, method: str = DEFAULT_METHOD
) -> jax.Array | QuantizedTensor:
    """Weights (..., N, K) of any float dtype in a ggml format: packed, or a plain array for F32, F16 and BF16.

    importance: how much the squared error at each input feature counts, finite and >= 0: (K,), or any shape that
    broadcasts to the weights; usually the mean squares of the activations (llama.cpp's imatrix). Formats that only
    round take no notice of it. method: "refine" weighs errors about as ggml does, "mse" by importance alone, "search"
    is "refine" without its last fit; see docs/quantization.md.

    Deterministic. A QuantizedTensor is dequantized first; the new one has its arithmetic. Also works on traced arrays,
    where values cannot be checked.
    RealmError if the format or method is not known or has no encoder, K is not whole blocks, the importance does not
    fit, or a value is not finite or too large for the format.
    """
    arithmetic = "float"
    if isinstance(w, QuantizedTensor):
        w, arithmetic = w.dequantize(), w.arithmetic
    elif not isinstance(w, jax.Array):
        w = np.asarray(w)
    if method not in METHODS:
        raise RealmError(f"there is no method {method!r} to quantize by; these are known: {', '.join(METHODS)}")
    kind = None if format in DENSE_FORMATS else _with_encoder(format, w.shape)
    if importance is not None:
        importance = _checked_importance(importance, w.shape)
    if isinstance(w, jax.core.Tracer) or isinstance(importance, jax.core.Tracer):
        w = lax.stop_gradient(w)  # codes are integers: their gradient is zero
        if kind is None:
            return w.astype(DENSE_FORMATS[format])
        return QuantizedTensor(kind.group(_encode(kind, w, importance, method)), format, arithmetic)
    if kind is None:
        out, fits = _cast(w, format)
        finite = bool(fits) or bool(jnp.isfinite(jnp.asarray(w)).all())
    else:
        planes, finite, fits = _encode_in_stripes(kind, w, importance, method)
        out = QuantizedTensor(planes, format, arithmetic)
    if not finite:
        raise RealmError(f"cannot quantize to {format}: the weights {tuple(w.shape)} hold NaN or infinity")
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


def _checked_importance(importance: Any, shape: tuple[int, ...]) -> jax.Array | np.ndarray:
    if not isinstance(importance, jax.Array):
        importance = np.asarray(importance, np.float32)
    try:
        fits = np.broadcast_shapes(importance.shape, shape) == shape and importance.shape[-1:] == shape[-1:]
    except ValueError:
        fits = False
    if not fits:
        raise RealmError(f"the importance {importance.shape} does not fit weights {shape}: give ({shape[-1]},)")
    if not isinstance(importance, jax.core.Tracer) and not bool(((importance >= 0) & (importance < np.inf)).all()):
        raise RealmError("the importance has a value that is negative, infinite or NaN: give finite numbers >= 0")
    return importance


@functools.partial(jax.jit, static_argnames="format")
def _cast(w: jax.Array, format: str) -> tuple[jax.Array, jax.Array]:
    """The weights in a dense format, and whether all are finite there."""
    out = w.astype(DENSE_FORMATS[format])
    return out, jnp.isfinite(out).all()


def _encode(kind: Format, w: jax.Array, importance: jax.Array | None, method: str) -> dict[str, jax.Array]:
    """Word-major planes of rows (..., K), behind a barrier: XLA may read a float16 scale before it is rounded."""
    return lax.optimization_barrier(kind.write_words(w, importance, method))


class _Part(NamedTuple):
    """What encoding a stripe gives: word-major planes (B, ...) of rows of one block, and two flags about its values."""

    planes: dict[str, jax.Array]
    finite: jax.Array
    fits: jax.Array


@functools.partial(jax.jit, static_argnames=("format", "method"))
def _encode_stripe(blocks: jax.Array, importance: jax.Array | None, format: str, method: str) -> _Part:
    kind = get_format(format)
    planes = _encode(kind, blocks, importance, method)
    scales = kind.block_scales(kind.group(planes)).values()
    fits = functools.reduce(jnp.logical_and, (jnp.isfinite(scale).all() for scale in scales))
    return _Part(planes, jnp.isfinite(blocks).all(), fits)


def _encode_in_stripes(kind: Format, w: Any, importance: Any, method: str) -> tuple[dict[str, jax.Array], bool, bool]:
    """Planes of all rows; whether all weights are finite; whether all scales are.

    Stripes of blocks have one size, the last is padded with zeros. So there is one compilation a format, little memory,
    and a block becomes the same bytes in a tensor of any shape.
    """
    on_cpu = jax.default_backend() == "cpu"
    xp = np if on_cpu else jnp  # on CPU numpy cuts and joins: it need not compile for every shape
    blocks = xp.asarray(w).reshape(-1, kind.block_size)
    count, step = len(blocks), (CPU_STRIPE if on_cpu else GPU_STRIPE) // kind.block_size
    importance_of = _importance_of_blocks(xp, importance, w.shape, kind.block_size)
    parts = []
    for start in range(0, max(1, count), step):
        size = min(step, count - start)
        cut = blocks[start : start + size] if on_cpu else lax.dynamic_slice_in_dim(blocks, start, size)
        part, weights = xp.asarray(cut, np.float32), importance_of(start, start + size)
        if size < step:
            padding = ((0, step - size), (0, 0))
            part, weights = xp.pad(part, padding), None if weights is None else xp.pad(weights, padding)
        parts.append(_encode_stripe(part, weights, kind.name, method))
    planes = {}
    for name in list(parts[0].planes):
        whole = xp.concatenate([xp.asarray(part.planes.pop(name)) for part in parts])[:count]  # no plane stays twice
        planes[name] = _by_rows(whole, w.shape[:-1], w.shape[-1] // kind.block_size)
    finite, fits = (all(bool(flag) for flag in flags) for flags in list(zip(*parts, strict=True))[1:])
    return jax.device_put(planes), finite, fits


def _importance_of_blocks(xp: Any, importance: Any, shape: tuple[int, ...], size: int) -> Callable[[int, int], Any]:
    """A function (start, stop) -> importance of these blocks, counted over the whole tensor: (B, size), or None."""
    if importance is None:
        return lambda start, stop: None
    importance = xp.asarray(importance)
    if importance.size == shape[-1]:  # the same for every row
        table = importance.reshape(-1, size)
        return lambda start, stop: table[(xp.arange(stop - start) + start % len(table)) % len(table)]
    whole = xp.broadcast_to(importance, shape).reshape(-1, size)
    return lambda start, stop: whole[start:stop]


def _by_rows(plane: Any, rows: tuple[int, ...], per_row: int) -> Any:
    """A word-major plane of single blocks (blocks, [W,] chunks) as the plane of rows (*rows, ...), in one copy."""
    *words, chunks = plane.shape[1:]
    if not words:
        return plane.reshape(*rows, per_row * chunks)
    q, p = cut_of_group(per_row, chunks)
    cut, lead = plane.reshape(*rows, per_row // q, q, *words, chunks // p, p), len(rows)
    order = (*range(lead), lead, lead + 3, lead + 2, lead + 1, lead + 4)
    return cut.transpose(order).reshape(*rows, per_row * chunks // (q * p), *words, q * p)
