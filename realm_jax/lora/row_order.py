"""The two orders of the output rows of q and k: Hugging Face's and GGUF's. Called where adapters are fitted and saved.

GGUF files of models that rotate neighbouring channels (llama) hold the rows of each head as (0, C/2, 1, C/2 + 1, ...);
Hugging Face's rotate halves and hold them as (0, 1, 2, ...). An adapter's b and magnitude follow their weight. Source:
`permute` of llama.cpp's convert_hf_to_gguf.py.
"""

from collections.abc import Callable

import jax

from realm_jax.errors import AdapterError
from realm_jax.kernels.delta import Delta


def to_ggml_rows(delta: Delta, heads: int) -> Delta:
    """A delta (R, K), (N, R) of q or k from Hugging Face's order into that of GGUF files. heads: of that weight.

    AdapterError where the rows are not whole heads of an even width.
    """
    return _reordered(delta, heads, lambda x: x.reshape(heads, 2, -1, *x.shape[1:]))


def to_hf_rows(delta: Delta, heads: int) -> Delta:
    """The inverse of `to_ggml_rows`."""
    return _reordered(delta, heads, lambda x: x.reshape(heads, -1, 2, *x.shape[1:]))


def _reordered(delta: Delta, heads: int, split: Callable[[jax.Array], jax.Array]) -> Delta:
    rows = delta.b.shape[0]
    if rows % (2 * heads):
        raise AdapterError(f"{rows} rows of q or k are not {heads} heads of an even width")

    def order(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else split(x).swapaxes(1, 2).reshape(x.shape)

    return delta.replace(b=order(delta.b), magnitude=order(delta.magnitude), norms=None)
