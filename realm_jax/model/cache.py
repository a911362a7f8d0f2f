"""The key-value cache: padded ragged rows, one array for all layers.

Made by callers of `transformer.run` (decoding, the engine); written only by `transformer.run`.
"""

import flax.struct
import jax
import jax.numpy as jnp

from realm_jax.model.config import Config


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far.

    k, v: (L, B, S, K, C). length_B: int32, tokens that count in each row. Positions at or after
    `length_B` hold leftovers that no query sees, so taking tokens back (a rejected draft) is
    `cache.replace(length_B=smaller)`: nothing is copied.
    """

    k: jax.Array
    v: jax.Array
    length_B: jax.Array

    @classmethod
    def create(cls, config: Config, batch: int, size: int, dtype: jnp.dtype = jnp.float32) -> "KVCache":
        """An empty cache for `batch` rows of at most `size` tokens."""
        shape = (config.layers, batch, size, config.kv_heads, config.head_width)
        return cls(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), length_B=jnp.zeros(batch, jnp.int32))

    @property
    def size(self) -> int:
        """S, the most tokens a row can hold."""
        return self.k.shape[2]
