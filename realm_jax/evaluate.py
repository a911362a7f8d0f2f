"""How well a model predicts a text: perplexity, and divergence from a reference model. `realm perplexity` calls this.

Windows are those of llama.cpp's perplexity tool, so that numbers can be compared: the text is tokenized once; it is
cut into chunks of `context` tokens, without overlap, a shorter rest is left out; the first token of each chunk gives
way to BOS where the vocabulary adds one; tokens in the second half of a chunk are scored, so that each has at least
half a chunk of context.

Shapes: N chunks, B chunks a step, T tokens a chunk, W scored tokens a chunk, D width, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.errors import RequestError
from realm_jax.lora.stack import AdapterLike, deltas_for
from realm_jax.model.cache import KVCache
from realm_jax.model.config import Config
from realm_jax.model.model import Model
from realm_jax.model.params import Params, for_any_rows
from realm_jax.model.transformer import run, unembed
from realm_jax.model.vocabulary import check_same_vocabulary

VALUES_AT_ONCE = 2**26  # 256 MiB of float32: about the most that a step gives to logits or to attention scores
MIN_CONTEXT = 3  # the first half is at least one token, and one token must be left to predict


@dataclass(frozen=True)
class Estimate:
    """A mean over scored tokens and its standard error, sqrt(variance / (n - 1)) as llama.cpp has it."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Estimate":
        """Mean and standard error of independent values, in float64. The error of one value is NaN."""
        values = np.asarray(values, np.float64)
        error = math.sqrt(values.var() / (values.size - 1)) if values.size > 1 else math.nan
        return cls(float(values.mean()), error)


@dataclass(frozen=True)
class Scores:
    """What one model makes of each scored token, in nats, float32 of shape (N, W).

    nll: negative log-likelihood of the token. With a reference model also reference_nll, its own; kl, the
    divergence KL(reference || model) of the two distributions; same_top (bool): both put the same token first.
    """

    nll: np.ndarray
    reference_nll: np.ndarray | None = None
    kl: np.ndarray | None = None
    same_top: np.ndarray | None = None


@dataclass(frozen=True)
class Perplexity:
    """exp(mean nll) with its standard error, from the nll's by the delta method."""

    perplexity: float
    error: float
    nll: Estimate

    @classmethod
    def of(cls, nll: np.ndarray) -> "Perplexity":
        """From the negative log-likelihoods of scored tokens, in nats; infinite where the mean is beyond float64."""
        estimate = Estimate.of(nll)
        with np.errstate(over="ignore"):
            value = float(np.exp(np.float64(estimate.mean)))
        return cls(value, value * estimate.error, estimate)


@dataclass(frozen=True)
class Divergence:
    """How far a model is from its reference over the scored tokens; KL in nats.

    log_ratio: ln(perplexity / reference perplexity), its error from paired differences. kl_median_error and
    kl_99_error: standard errors of these quantiles, see `quantile_error`.
    """

    reference: Perplexity
    log_ratio: Estimate
    kl: Estimate
    kl_median: float
    kl_median_error: float
    kl_99: float
    kl_99_error: float
    kl_max: float
    top1_agreement: Estimate

    @classmethod
    def of(cls, scores: Scores) -> "Divergence":
        """Raises RequestError where the scores were made without a reference."""
        if scores.kl is None or scores.reference_nll is None or scores.same_top is None:
            raise RequestError("these scores have no reference model: make them with one")
        kl = scores.kl.astype(np.float64)
        median, high = np.quantile(kl, [0.5, 0.99])
        return cls(
            reference=Perplexity.of(scores.reference_nll),
            log_ratio=Estimate.of(scores.nll.astype(np.float64) - scores.reference_nll),
            kl=Estimate.of(kl),
            kl_median=float(median),
            kl_median_error=quantile_error(kl, 0.5),
            kl_99=float(high),
            kl_99_error=quantile_error(kl, 0.99),
            kl_max=float(kl.max()),
            top1_agreement=Estimate.of(scores.same_top),
        )


def quantile_error(values: np.ndarray, probability: float) -> float:
    """The standard error of the quantile of independent values; NaN where there are too few to say.

    The share of values below the true quantile varies with a deviation of sqrt(p (1 - p) / n), so the quantiles at
    p plus and minus that are about two standard errors apart (Woodruff, Journal of the American Statistical
    Association 47, 1952). Too few are those of which the upper one would lie beyond the largest.
    """
    spread = math.sqrt(probability * (1 - probability) / max(1, values.size))
    if not spread <= probability <= 1 - spread:
        return math.nan
    low, high = np.quantile(values, [probability - spread, probability + spread])
    return float(high - low) / 2


def chunk_tokens(tokens: Sequence[int], context: int, bos: int | None) -> np.ndarray:
    """Cuts tokens into chunks: int32 (N, context), each beginning with `bos` unless that is None.

    Raises RequestError where there are fewer than two chunks, saying which context would do.
    """
    if context < MIN_CONTEXT:
        raise RequestError(f"a context of {context} leaves nothing to score: give at least {MIN_CONTEXT}")
    count = len(tokens) // context
    if count < 2:
        largest = len(tokens) // 2
        would_do = f", or a context of at most {largest}" if largest >= MIN_CONTEXT else ""
        raise RequestError(
            f"the text has {len(tokens)} tokens: a context of {context} needs at least {2 * context}; "
            f"give a longer text{would_do}"
        )
    chunks_NT = np.array(tokens[: count * context], np.int32).reshape(count, context)
    if bos is not None:
        chunks_NT[:, 0] = bos
    return chunks_NT


def score(
    model: Model,
    chunks_NT: np.ndarray,
    *,
    adapter: AdapterLike | None = None,
    reference: Model | None = None,
    reference_adapter: AdapterLike | None = None,
    cache_dtype: str | None = None,
    batch: int | None = None,
    on_chunks: Callable[[int], None] | None = None,
) -> Scores:
    """Scores the second half of every chunk, `batch` chunks in a step (None: as many as memory allows, at most 8).

    chunks_NT: int32 token ids. adapter, reference_adapter: what the model and the reference run with. cache_dtype: one
    of `model.cache.DTYPES`; the model then reads keys and values from a cache of this type, as decoding does, and the
    reference runs without one; None: neither has a cache. A model in int8 arithmetic has it for all tokens here.
    on_chunks: called with the number of chunks of each step when
    it is done. Raises RequestError where a token id is not in the vocabulary, the reference has another vocabulary, or
    the type of cache is none; AdapterError for an adapter that does not fit.
    """
    vocab_size = model.config.vocab_size
    if chunks_NT.size and not (chunks_NT.min() >= 0 and chunks_NT.max() < vocab_size):
        raise RequestError(f"the text has token ids outside the model's vocabulary of {vocab_size} tokens")
    if reference is not None:
        check_same_vocabulary(model, reference, "reference model")
    batch = batch or default_batch(chunks_NT.shape[1], model.config)
    models = (model,) if reference is None else (model, reference)
    params, configs = tuple(for_any_rows(m.params) for m in models), tuple(m.config for m in models)
    deltas = tuple(deltas_for(m, a) for m, a in zip(models, (adapter, reference_adapter), strict=False))
    steps = []
    for rows, chunks_BT in batches(chunks_NT, min(batch, len(chunks_NT))):
        scored = jax.tree.map(np.asarray, _score_step(params, configs, chunks_BT, deltas, cache_dtype))
        steps.append(jax.tree.map(lambda x, rows=rows: x[:rows], scored))
        if on_chunks:
            on_chunks(rows)
    return Scores(**{key: np.concatenate([step[key] for step in steps]) for key in steps[0]})


def default_batch(context: int, config: Config) -> int:
    """Chunks a step: from 1 to 8, as many as keep logits and attention scores of a step small."""
    return max(1, min(8, VALUES_AT_ONCE // (context * max(config.vocab_size, context * config.heads))))


def batches(chunks_NT: np.ndarray, batch: int) -> Iterator[tuple[int, np.ndarray]]:
    """(rows that count, (batch, T) tokens); the last step is filled up, so that all have one shape."""
    for start in range(0, len(chunks_NT), batch):
        chunks = chunks_NT[start : start + batch]
        fill = np.repeat(chunks[:1], batch - len(chunks), axis=0)
        yield len(chunks), np.concatenate([chunks, fill])


@functools.partial(jax.jit, static_argnames=("configs", "cache_dtype"))
def _score_step(
    params: tuple[Params, ...],
    configs: tuple[Config, ...],
    tokens_BT: jax.Array,
    deltas: tuple[Params | None, ...],
    cache_dtype: str | None = None,
) -> dict[str, jax.Array]:
    """The arrays of `Scores`, (B, W), of one model or of a model and its reference, which has no cache."""
    B, T = tokens_BT.shape
    first = T // 2
    target_BW = tokens_BT[:, first + 1 :]
    models = list(zip(params, configs, deltas, strict=True))
    caches = [None if cache_dtype is None else KVCache.create(configs[0], B, T, cache_dtype), None]
    hidden = [
        run(p, c, tokens_BT, cache, deltas=d)[0][:, first : T - 1]
        for (p, c, d), cache in zip(models, caches, strict=False)
    ]

    def score_block(block: tuple[jax.Array, list[jax.Array]]) -> dict[str, jax.Array]:
        target_P, hidden_PD = block
        log_p = [
            jax.nn.log_softmax(unembed(p, c, h, deltas=d), axis=-1)
            for (p, c, d), h in zip(models, hidden_PD, strict=True)
        ]
        nll = [-jnp.take_along_axis(lp_PV, target_P[:, None], axis=-1)[:, 0] for lp_PV in log_p]
        if len(log_p) == 1:
            return {"nll": nll[0]}
        model_PV, reference_PV = log_p
        return {
            "nll": nll[0],
            "reference_nll": nll[1],
            "kl": kl_divergence(reference_PV, model_PV),
            "same_top": jnp.argmax(model_PV, axis=-1) == jnp.argmax(reference_PV, axis=-1),
        }

    # Logits of all positions at once would not fit for long chunks and large vocabularies: block by block.
    W = target_BW.shape[1]
    block = max(1, min(B * W, VALUES_AT_ONCE // configs[0].vocab_size))
    count = -(-B * W // block)

    def in_blocks(x: jax.Array) -> jax.Array:
        flat = x.reshape(B * W, *x.shape[2:])
        padding = [(0, count * block - B * W)] + [(0, 0)] * (flat.ndim - 1)
        return jnp.pad(flat, padding).reshape(count, block, *flat.shape[1:])

    scored = jax.lax.map(score_block, jax.tree.map(in_blocks, (target_BW, hidden)))
    return jax.tree.map(lambda x: x.reshape(-1)[: B * W].reshape(B, W), scored)


def kl_divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p || q) in nats over the last axis, from log-probabilities; where p is 0 the term is 0."""
    p = jnp.exp(log_p)
    return jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0.0), axis=-1)


def text_chunks(model: Model, text: str, context: int) -> np.ndarray:
    """The chunks of a text for `score`: tokenized once, special tokens by the file's rules, cut by `chunk_tokens`."""
    if model.tokenizer is None:
        raise RequestError(f"{model.origin.source}: has no tokenizer, so it cannot score a text: give another model")
    bos = model.tokenizer.bos_id if model.tokenizer.add_bos else None
    return chunk_tokens(model.tokenizer.encode(text), context, bos)


def perplexity(
    model: Model,
    text: str,
    *,
    context: int = 512,
    adapter: AdapterLike | None = None,
    cache_dtype: str | None = None,
    batch: int | None = None,
) -> Perplexity:
    """Perplexity of a text, comparable with llama.cpp's at the same context. Raises RequestError for a short text.

    cache_dtype: as in `score`.
    """
    chunks_NT = text_chunks(model, text, context)
    return Perplexity.of(score(model, chunks_NT, adapter=adapter, cache_dtype=cache_dtype, batch=batch).nll)


def compare(
    model: Model,
    reference: Model,
    text: str,
    *,
    context: int = 512,
    cache_dtype: str | None = None,
    batch: int | None = None,
) -> tuple[Perplexity, Divergence]:
    """Perplexity of a text and the divergence from a reference model, over the same tokens. Errors as `score`.

    cache_dtype: of the model, as in `score`; with the model itself as its reference, the divergence is what it costs.
    """
    chunks_NT = text_chunks(model, text, context)
    scores = score(model, chunks_NT, reference=reference, cache_dtype=cache_dtype, batch=batch)
    return Perplexity.of(scores.nll), Divergence.of(scores)
