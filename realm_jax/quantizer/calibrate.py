"""The calibration pass: runs a text through a model and measures what each linear weight gets as input.

Made for `quantize_file` and `quantize_model`, which use the result as importance. Windows are llama-imatrix's: the
chunks of `evaluate.chunk_tokens`, and all tokens of a chunk count. Shapes: N chunks, B chunks a step, T tokens, K.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.errors import RequestError
from realm_jax.evaluate import batches, default_batch, text_chunks
from realm_jax.model.config import Config
from realm_jax.model.model import Model
from realm_jax.model.params import Params, tensor_specs
from realm_jax.model.transformer import run, unembed
from realm_jax.quantizer.imatrix import Imatrix, from_sums


def calibrate(
    model: Model,
    text: str,
    *,
    context: int = 512,
    batch: int | None = None,
    on_chunks: Callable[[int], None] | None = None,
    output: bool = False,
) -> Imatrix:
    """The importance of every linear weight of the layers, measured on a text. See `measure_inputs`.

    context: tokens a chunk. Raises RequestError for a text of fewer than two chunks.
    """
    return measure_inputs(model, text_chunks(model, text, context), batch=batch, on_chunks=on_chunks, output=output)


def measure_inputs(
    model: Model,
    chunks_NT: np.ndarray,
    *,
    batch: int | None = None,
    on_chunks: Callable[[int], None] | None = None,
    output: bool = False,
) -> Imatrix:
    """Mean squares of the inputs of every linear weight, over all tokens of all chunks, int32 (N, T).

    batch: chunks a step (None: as memory allows). on_chunks: called with the number of chunks of each step when it is
    done. output: measures the output matrix too, be it the embedding or its own; llama-imatrix does so only when asked
    (`--process-output`), and for the embedding never. Raises RequestError where activations are not finite.
    """
    batch = min(len(chunks_NT), batch or default_batch(chunks_NT.shape[1], model.config))
    sums: dict[str, np.ndarray] = {}
    for rows, chunks_BT in batches(chunks_NT, batch):
        real_B = np.arange(batch) < rows  # the last step is filled up with rows that do not count
        step = _sum_squares(model.params, model.config, chunks_BT, real_B, output)
        for name, sums_K in step.items():
            sums[name] = sums.get(name, 0.0) + np.asarray(sums_K, np.float64)
        if on_chunks:
            on_chunks(rows)
    for name, sums_K in sums.items():
        if not np.isfinite(sums_K).all():
            raise RequestError(
                f"{model.origin.source}: the input of {name} is not finite on this text, so it says nothing about "
                "importance: is the model broken?"
            )
    counts = {name: np.array([chunks_NT.size]) for name in sums}
    return from_sums({name: sums_K[None] for name, sums_K in sums.items()}, counts, *chunks_NT.shape)


@functools.partial(jax.jit, static_argnames=("config", "output"))
def _sum_squares(
    params: Params, config: Config, tokens_BT: jax.Array, real_B: jax.Array, output: bool
) -> dict[str, jax.Array]:
    """Tensor name -> float32 (K,), the squares of its inputs summed over the tokens of the rows that are real."""
    name_of = {spec.path: spec.name for spec in tensor_specs(config)}
    sums: dict[str, jax.Array] = {}

    def observe(path: tuple[str | int, ...], x_BTK: jax.Array) -> None:
        squares_BTK = jnp.square(x_BTK.astype(jnp.float32))
        sums[name_of[path]] = jnp.sum(squares_BTK, axis=(0, 1), where=real_B[:, None, None])

    hidden_BTD, _ = run(params, config, tokens_BT, observe=observe)
    if output:
        unembed(params, config, hidden_BTD, observe=observe)  # its logits are not used, hence not computed
    return sums
