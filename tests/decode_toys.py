"""Models small enough to know by heart, for the tests of decoding."""

import codecs
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.model import Config, Model, Rope, init_params
from realm_jax.model.model import Origin

CONTEXT = 256


class ToyTokenizer:
    """Token i is `pieces[i]`, a few bytes; an empty piece is an end-of-generation token. Encodes single bytes."""

    def __init__(self, pieces: Sequence[bytes]):
        self.pieces = list(pieces)
        self.vocab_size = len(pieces)
        self.eog_ids = frozenset(i for i, piece in enumerate(pieces) if not piece)

    def encode(self, text: str, *, special: bool = True, parse_special: bool = False) -> list[int]:
        return [self.pieces.index(bytes([byte])) for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")

    def stream(self, *, continues: bool = False) -> "ToyDecoder":
        assert continues, "a completion goes on from its prompt"
        return ToyDecoder(self.pieces)


class ToyDecoder:
    def __init__(self, pieces: Sequence[bytes]):
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._pieces[token])

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def toy_config(vocab_size: int, context_length: int = CONTEXT) -> Config:
    return Config(
        architecture="llama", vocab_size=vocab_size, context_length=context_length, layers=2, width=64, ffn_width=96,
        heads=4, kv_heads=2, head_width=16, norm_eps=1e-5, rope=Rope(dimensions=16),
    )  # fmt: skip


def random_model(seed: int = 0, tokenizer: bool = True) -> Model:
    """A random transformer over the 128 ASCII characters, whose token 0 ends a text. Its greedy text varies."""
    config = toy_config(128)
    params = jax.tree.map(lambda x: x * 6 if x.ndim == 2 else x, init_params(config, jax.random.key(seed)))
    pieces = [b"", *(bytes([i]) for i in range(1, 128))]
    return Model(params, config, ToyTokenizer(pieces) if tokenizer else None, Origin("toy", {}))


def noisy(model: Model, size: float, seed: int = 5) -> Model:
    """A model much like another: noise of this size, relative to their spread, on all matrices."""
    leaves, tree = jax.tree.flatten(model.params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [
        x + size * jnp.std(x) * jax.random.normal(key, x.shape) if x.ndim == 2 else x
        for x, key in zip(leaves, keys, strict=True)
    ]
    return model.replace(params=jax.tree.unflatten(tree, leaves))


def scripted_model(pieces: Sequence[bytes | str]) -> Model:
    """A transformer that says piece i + 1 after piece i and ends after the last: token i is piece i.

    Its layers add nothing, and the output row of each token is the embedding of the one before it.
    """
    pieces = [piece.encode() if isinstance(piece, str) else piece for piece in pieces] + [b""]
    config = toy_config(len(pieces))
    params = init_params(config, jax.random.key(1), tied=False)
    layers = tuple(
        layer.replace(
            attn=layer.attn.replace(o=jnp.zeros_like(layer.attn.o)),
            ffn=layer.ffn.replace(down=jnp.zeros_like(layer.ffn.down)),
        )
        for layer in params.layers
    )
    embedding = jnp.array(np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0][: len(pieces)], jnp.float32)
    assert len(embedding) == len(pieces), "one direction a piece"
    params = params.replace(embedding=embedding, layers=layers, output=10 * jnp.roll(embedding, 1, axis=0))
    return Model(params, config, ToyTokenizer(pieces), Origin("toy", {}))
