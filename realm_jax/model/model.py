"""A model as users hold it: weights, sizes, tokenizer, and where it came from."""

import dataclasses
from collections.abc import Mapping

import flax.struct
import numpy as np

from realm_jax.errors import RequestError
from realm_jax.gguf.tokenizer import Tokenizer
from realm_jax.gguf.types import Field
from realm_jax.model.config import Config
from realm_jax.model.params import Params, arithmetic_of, with_arithmetic

ARITHMETICS = ("float", "int8")


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

    @property
    def arithmetic(self) -> str:
        """What `with_arithmetic` set: "float" or "int8"."""
        return arithmetic_of(self.params)

    def with_arithmetic(self, arithmetic: str) -> "Model":
        """The model, the same arrays, whose products by packed weights are computed in this arithmetic.

        "float": activations as they are. "int8": where there are few rows (64 at most: decoding), in steps of 1/127 of
        the largest of 32, as llama.cpp has it; evaluation and `forward` then do so for any number of rows. Dense
        weights, lookups in the embedding, adapters and gradients stay in floating point, and files know nothing of it.
        RequestError for another name.
        """
        if arithmetic not in ARITHMETICS:
            raise RequestError(f"arithmetic of {arithmetic!r} is not known; take one of {', '.join(ARITHMETICS)}")
        return self.replace(params=with_arithmetic(self.params, arithmetic))

    def __repr__(self) -> str:
        c = self.config
        return (
            f"Model({self.origin.source}: {c.architecture}, {c.layers} layers, width {c.width}, {c.heads} heads, "
            f"vocabulary {c.vocab_size}, context {c.context_length})"
        )
