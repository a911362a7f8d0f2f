"""How fast a model runs: prefill and decoding, beside the least time that reading its bytes takes.

`realm bench` and experiments/decode_speed.py measure with these; the loops are the package's own (`decode.loop`).
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.decode import buckets
from realm_jax.decode.loop import DecodeState, Stop, decode, fill_cache, init_state
from realm_jax.decode.settings import Settings
from realm_jax.errors import RealmError, RequestError
from realm_jax.model.cache import DTYPES as CACHE_DTYPES
from realm_jax.model.cache import KVCache
from realm_jax.model.model import Model
from realm_jax.model.params import Params
from realm_jax.quant.tensor import QuantizedTensor

READ_BYTES = {"cpu": 2**28, "gpu": 2**31}  # more than any cache on the way to memory holds
READ_TIMES = {"cpu": 1, "gpu": 16}
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Timing:
    """Seconds of each repetition of something that handles `tokens` tokens, and what compiling it took first."""

    tokens: int
    seconds: tuple[float, ...]
    compile_seconds: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.median


def ready_state(
    model: Model, batch: int, context: int, new_tokens: int, *, cache_dtype: str = "float32", dtype: str = "float32"
) -> DecodeState:
    """Greedy rows that have `context` random tokens in the cache, as if they had been through the model, one pending.

    No token ends a row. dtype: of the activations. RequestError as `check_request`.
    """
    check_request(model, context, new_tokens, cache_dtype=cache_dtype, dtype=dtype)
    most, limit = context + 1 + new_tokens, model.config.context_length
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (batch, context + 1)).tolist()
    requests = [Settings(max_new_tokens=new_tokens)] * batch
    size = min(buckets.cache_bucket(most), limit)
    state = init_state(model.config, tokens, requests, size=size, dtype=cache_dtype)
    return state.replace(cache=state.cache.replace(length_B=state.length_B - 1), dtype=dtype)


def check_request(model: Model, context: int, new_tokens: int, *, cache_dtype: str, dtype: str) -> None:
    """RequestError for types that are not known, and for more tokens than the model's context."""
    for what, name, known in (("activations", dtype, DTYPES), ("a cache", cache_dtype, CACHE_DTYPES)):
        if name not in known:
            raise RequestError(f"{what} of {name!r}: not known; take one of {', '.join(known)}")
    most, limit = context + 1 + new_tokens, model.config.context_length
    if most > limit:
        raise RequestError(
            f"{context} tokens of context, one pending and {new_tokens} new ones make {most}; the model takes {limit}"
        )


def time_decode(
    model: Model,
    batch: int,
    context: int,
    new_tokens: int,
    repeats: int,
    *,
    cache_dtype: str = "float32",
    dtype: str = "float32",
    around: Callable[[Callable[[], None]], None] | None = None,
) -> Timing:
    """Time `new_tokens` steps of `batch` rows, in one call of the decoding loop, after one call to warm up.

    around: is handed one more call of the loop at the end, to be called once: for a profiler. RealmError where logits
    are not finite.
    """
    state = ready_state(model, batch, context, new_tokens, cache_dtype=cache_dtype, dtype=dtype)
    start_B, steps = np.asarray(state.length_B), jnp.int32(new_tokens)
    started = time.perf_counter()
    program = decode.lower(model.params, model.config, state, steps).compile()
    compiled = time.perf_counter() - started

    def once() -> float:
        nonlocal state
        state = jax.block_until_ready(_rewound(state, start_B))
        began = time.perf_counter()
        state = jax.block_until_ready(program(model.params, state, steps))
        seconds = time.perf_counter() - began
        if not bool((state.length_B == start_B + new_tokens).all()):
            raise RealmError(f"{model!r}: rows ended before the last step: their logits are not finite")
        return seconds

    once()
    seconds = tuple(once() for _ in range(repeats))
    if around is not None:
        around(once)
    return Timing(batch * new_tokens, seconds, compiled)


def _rewound(state: DecodeState, start_B: np.ndarray) -> DecodeState:
    """The state as it was before the steps; what they wrote to the cache stays there as leftovers."""
    running_B = jnp.full(len(start_B), Stop.RUNNING, state.stop_B.dtype)
    cache = state.cache.replace(length_B=jnp.array(start_B - 1))
    return state.replace(length_B=jnp.array(start_B), stop_B=running_B, cache=cache)


def time_prefill(
    model: Model,
    batch: int,
    tokens: int,
    repeats: int,
    *,
    chunk: int | None = None,
    cache_dtype: str = "float32",
    dtype: str = "float32",
) -> Timing:
    """Time taking prompts of `tokens` tokens into an empty cache, `chunk` at once (as `generate` does, where None)."""
    chunk = min(chunk or buckets.prefill_chunks(tokens, buckets.power_of_two(batch))[0], tokens)
    state = ready_state(model, batch, tokens, 0, cache_dtype=cache_dtype, dtype=dtype)
    cache, left_B = state.cache, jnp.full(batch, tokens, jnp.int32)
    started = time.perf_counter()
    program = fill_cache.lower(
        model.params, model.config, cache, state.tokens_BS, left_B, chunk, None, dtype=dtype
    ).compile()
    compiled = time.perf_counter() - started

    def once() -> float:
        nonlocal cache
        cache = jax.block_until_ready(cache.replace(length_B=jnp.zeros(batch, jnp.int32)))
        began = time.perf_counter()
        for done in range(0, tokens, chunk):
            cache = program(model.params, cache, state.tokens_BS, left_B - done, None)
        jax.block_until_ready(cache)
        return time.perf_counter() - began

    once()
    return Timing(batch * tokens, tuple(once() for _ in range(repeats)), compiled)


def median_seconds(function: Callable[..., Any], *arguments: Any, repeats: int) -> float:
    """The median time of a call until its results are there, after two calls to warm up."""
    spent = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[2:])


# --- the floor -------------------------------------------------------------------------------------------------------


def weight_bytes(params: Params, batch: int = 1) -> int:
    """Bytes of weights that a step of `batch` rows reads: all, but of a separate embedding only its rows' lines."""
    every = _nbytes(params)
    if params.output is None:
        return every
    embedding = params.embedding
    rows = embedding.shape[0]
    return every - _nbytes(embedding) * (rows - min(batch, rows)) // rows


def cache_bytes(cache: KVCache, tokens: float) -> float:
    """Bytes of the keys and values of `tokens` tokens, over all rows."""
    _, rows, size, *_ = cache.k.shape
    arrays = (cache.k, cache.v, cache.k_scale, cache.v_scale)
    return sum(_nbytes(x) for x in arrays if x is not None) / (rows * size) * tokens


def step_bytes(model: Model, batch: int, context: int, new_tokens: int, cache_dtype: str = "float32") -> float:
    """Bytes that a decoding step must read at the least, weights and cache, on the average of `new_tokens` steps."""
    cache = jax.eval_shape(lambda: KVCache.create(model.config, 1, 1, cache_dtype))
    return weight_bytes(model.params, batch) + cache_bytes(cache, batch * (context + (new_tokens + 1) / 2))


def read_ceiling(nbytes: int | None = None, repeats: int = 5) -> float:
    """Bytes a second that the default device can read from memory: the best of a sum over a large array and a copy."""
    kind = "cpu" if jax.default_backend() == "cpu" else "gpu"
    words = jnp.ones((nbytes or READ_BYTES[kind]) // 4, jnp.uint32)
    ways: tuple[tuple[Any, int], ...] = ((jax.jit(jnp.sum), 1), (jax.jit(lambda x: x + 1), 2))
    best = 0.0
    for call, traffic in ways:
        jax.block_until_ready(call(words))
        for _ in range(repeats):
            began = time.perf_counter()
            for _ in range(READ_TIMES[kind]):
                result = call(words)  # calls run one after another; what they return is let go
            jax.block_until_ready(result)
            seconds = (time.perf_counter() - began) / READ_TIMES[kind]
            best = max(best, traffic * words.nbytes / seconds)
    return best


def _nbytes(tree: Any) -> int:
    """Bytes of arrays or of their specs."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def formats(params: Params) -> dict[str, int]:
    """Bytes by format of the weights, the largest first."""
    found: dict[str, int] = {}
    for weight in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, QuantizedTensor)):
        name = weight.format if isinstance(weight, QuantizedTensor) else str(weight.dtype)
        found[name] = found.get(name, 0) + _nbytes(weight)
    return dict(sorted(found.items(), key=lambda one: -one[1]))
