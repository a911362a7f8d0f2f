"""A model as users hold it: weights, sizes, tokenizer, and where it came from."""

import dataclasses
from collections.abc import Mapping

import flax.struct
import numpy as np

from realm_jax.gguf.tokenizer import Tokenizer
from realm_jax.gguf.types import Field
from realm_jax.model.config import Config
from realm_jax.model.params import Params


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """What a file holds beside weights: kept so that saving gives the same file again.

    source: its name. fields: metadata in file order. names: tensors in file order. unused: bytes of
    tensors that the forward pass does not need, name -> (format, shape, uint8 bytes).
    """

    source: str
    fields: Mapping[str, Field]
    names: tuple[str, ...] = ()
    unused: Mapping[str, tuple[str, tuple[int, ...], np.ndarray]] = dataclasses.field(default_factory=dict)
    alignment: int = 32


@flax.struct.dataclass
class Model:
    """A transformer ready to run: `params` is the pytree of weights, the rest is static.

    Change weights with `model.replace(params=...)`. tokenizer is None where the file has none.
    """

    params: Params
    config: Config = flax.struct.field(pytree_node=False)
    tokenizer: Tokenizer | None = flax.struct.field(pytree_node=False)
    origin: Origin = flax.struct.field(pytree_node=False)

    def __repr__(self) -> str:
        c = self.config
        return (
            f"Model({self.origin.source}: {c.architecture}, {c.layers} layers, width {c.width}, {c.heads} heads, "
            f"vocabulary {c.vocab_size}, context {c.context_length})"
        )
