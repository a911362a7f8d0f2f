"""Small models and rows of random numbers, for the tests of `realm_jax.finetune`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import quant
from realm_jax.finetune import Example, TrainingConfig, make_rows
from realm_jax.finetune.step import gradients, init_state
from realm_jax.model import Config, Model, Rope, init_params
from realm_jax.model.model import Origin

SIZES = Config(
    architecture="llama", vocab_size=64, context_length=64, layers=2, width=256, ffn_width=256, heads=4, kv_heads=2,
    head_width=64, norm_eps=1e-5, rope=Rope(dimensions=64),
)  # fmt: skip


def toy_model(format: str, layers: int = 2, seed: int = 0) -> Model:
    """A random model whose matrices are all in one format; rows of 256, so that every format will do."""
    config = dataclasses.replace(SIZES, layers=layers)
    params = init_params(config, jax.random.key(seed), tied=False)
    params = jax.tree.map(lambda w: quant.quantize(w, format) if w.ndim == 2 else w, params)
    return Model(params, config, None, Origin("toy.gguf", {}))


def dense_twin(model: Model) -> Model:
    """The same model with every weight dequantized."""
    packed = lambda node: isinstance(node, quant.QuantizedTensor)  # noqa: E731
    return model.replace(
        params=jax.tree.map(lambda w: w.dequantize() if packed(w) else w, model.params, is_leaf=packed)
    )


def toy_examples(sizes, vocab=64, seed=0) -> list[Example]:
    """Documents of random tokens, of which about two thirds are to be learned."""
    rng = np.random.default_rng(seed)
    made = []
    for size in sizes:
        learned = rng.random(size) < 0.7
        learned[0], learned[-1] = False, True
        made.append(Example(tuple(rng.integers(0, vocab, size).tolist()), tuple(learned.tolist())))
    return made


def loss_and_gradient(model, adapter, rows, *, parts=1, **training):
    """Mean loss over rows, and its gradient in a, b and magnitude."""
    config = TrainingConfig(**({"steps": 1, "warmup": 0} | training))
    state, fixed = init_state(adapter.deltas, config)
    batch = tuple(jnp.asarray(x.reshape(parts, -1, x.shape[1])) for x in rows.take(np.arange(len(rows))))
    function = jax.jit(gradients, static_argnames=("config", "training"))
    return function(model.params, model.config, state.trained, fixed, batch, config)


def toy_rows(sizes=(9, 5, 12, 3), row_tokens=16, pack=True):
    return make_rows(toy_examples(sizes), row_tokens, pack=pack)
