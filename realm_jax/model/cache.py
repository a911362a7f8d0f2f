"""The key-value cache: padded ragged rows, one array for all layers.

Made by callers of `transformer.run` (decoding, the engine); written only by `transformer.run`.

Shapes: L layers, B rows, S places of a row, K kv heads, C head width, T new tokens.
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.errors import RequestError
from realm_jax.model.config import Config

UNBROKEN = jnp.iinfo(jnp.int32).max
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16, "int8": jnp.int8}


class KeyValues(NamedTuple):
    """Keys and values (B, S, K, C) as attention reads them; for int8 with the scales (B, S, K) that they lack.

    With `layer` they are those of a whole cache, with a leading axis L, of which attention reads that layer, and of it
    the rows `rows_B` (all in order, where None) as far as `window` goes.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    layer: int | None = None
    rows_B: jax.Array | None = None
    window: int | None = None


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far.

    k, v: (L, B, S, K, C), floating point, or int8. k_scale, v_scale: (L, B, S, K) float32 for int8, else None: a head's
    key or value is 127 steps of its scale at most. length_B: int32, tokens that count in each row. Positions at or
    after `length_B` hold leftovers that no query sees, so taking tokens back (a rejected draft) is
    `cache.replace(length_B=smaller)`: nothing is copied. broken_B: int32, the first place of a row whose key or value
    is not finite, or beyond what the cache's type can hold (0 is stored in its stead, and every query that sees the
    place gives NaN), or UNBROKEN: so whatever a row leaves behind, those after it never meet. window: static; attention
    reads the first so many places only (all, where None); the caller sees to it that no row is longer.
    """

    k: jax.Array
    v: jax.Array
    length_B: jax.Array
    broken_B: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    window: int | None = flax.struct.field(pytree_node=False, default=None)

    @classmethod
    def create(cls, config: Config, batch: int, size: int, dtype: jnp.dtype | str = jnp.float32) -> "KVCache":
        """An empty cache for `batch` rows of at most `size` tokens; dtype: one of DTYPES, or its name.

        Raises RequestError for another one.
        """
        name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
        if name not in DTYPES:
            raise RequestError(f"a cache of {name!r} is not known; take one of {', '.join(DTYPES)}")
        shape = (config.layers, batch, size, config.kv_heads, config.head_width)
        scales = [jnp.zeros(shape[:-1], jnp.float32) for _ in "kv"] if name == "int8" else [None, None]
        return cls(
            jnp.zeros(shape, DTYPES[name]),
            jnp.zeros(shape, DTYPES[name]),
            jnp.zeros(batch, jnp.int32),
            jnp.full(batch, UNBROKEN, jnp.int32),
            *scales,
        )

    @property
    def size(self) -> int:
        """S, the most tokens a row can hold."""
        return self.k.shape[2]

    def write(self, layer: int, row_B: jax.Array, place_BT: jax.Array, k: jax.Array, v: jax.Array) -> "KVCache":
        """With the keys and values (B, T, K, C) of new tokens of a layer in rows `row_B`; places >= S are dropped."""
        at = (layer, row_B[:, None], place_BT)
        # Not only what is infinite now, but also what would be in a float16 cache.
        largest = jnp.finfo(jnp.float32 if self.k_scale is not None else self.k.dtype).max
        bad_BT = ~jnp.all((jnp.abs(k) <= largest) & (jnp.abs(v) <= largest), axis=(2, 3)) & (place_BT < self.size)
        first_B = jnp.min(jnp.where(bad_BT, place_BT, UNBROKEN), axis=1)
        stored = {"broken_B": self.broken_B.at[row_B].min(first_B, mode="drop")}
        for name, x_BTKC in (("k", k), ("v", v)):
            x_BTKC = jnp.where(jnp.abs(x_BTKC) <= largest, x_BTKC, 0)
            scale = getattr(self, f"{name}_scale")
            if scale is not None:
                x_BTKC, scale_BTK = to_int8(x_BTKC)
                stored[f"{name}_scale"] = scale.at[at].set(scale_BTK, mode="drop")
            own = getattr(self, name)
            stored[name] = _put(own, at, x_BTKC.astype(own.dtype))
        return self.replace(**stored)

    def read(self, layer: int, row_B: jax.Array | None) -> KeyValues:
        """Keys and values of a layer, of rows `row_B` (all in order, where None), as far as the window goes."""
        return KeyValues(self.k, self.v, self.k_scale, self.v_scale, layer, row_B, self.window)


def _put(own: jax.Array, at: tuple[int | jax.Array, ...], values: jax.Array) -> jax.Array:
    """`own` with the values at those places. As bits: to write a part of an array of 16-bit floats, XLA's CPU backend
    turns all of it to float32 and back; bits it copies."""
    if own.dtype.itemsize != 2:
        return own.at[at].set(values, mode="drop")
    bits, new = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (own, values))
    return jax.lax.bitcast_convert_type(bits.at[at].set(new, mode="drop"), own.dtype)


def to_int8(x_BTKC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each head's key or value as whole numbers from -127 to 127, int8, and their scale (B, T, K), float32."""
    x_BTKC = x_BTKC.astype(jnp.float32)
    scale_BTK = jnp.max(jnp.abs(x_BTKC), axis=-1) * np.float32(1 / 127)  # as XLA would divide by a constant
    steps = x_BTKC / jnp.where(scale_BTK > 0, scale_BTK, 1)[..., None]
    return jnp.clip(jnp.round(steps), -127, 127).astype(jnp.int8), scale_BTK
