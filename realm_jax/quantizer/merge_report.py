"""What a merge costs: the merged model against the unmerged one, and against merging by way of F16.

Called by `realm merge` and by experiments. Shapes: N chunks, T tokens a chunk.
"""

from dataclasses import dataclass

import jax
import numpy as np

from realm_jax.decode.generate import generate
from realm_jax.errors import RealmError
from realm_jax.evaluate import Divergence, Estimate, Scores, chunk_tokens, score
from realm_jax.lora.adapter import weight_of
from realm_jax.lora.merge import acting_together, deltas_by_path, with_weights
from realm_jax.lora.misfit import gguf_name
from realm_jax.lora.stack import AdapterLike
from realm_jax.model.model import Model
from realm_jax.model.params import Weight, get_weight, tensor_specs
from realm_jax.quant import DEFAULT_METHOD, DENSE_FORMATS
from realm_jax.quantizer.encode import Errors
from realm_jax.quantizer.imatrix import Imatrix
from realm_jax.quantizer.merging import EMBEDDING, rebuild, weight_errors
from realm_jax.quantizer.models import format_of, quantize_weight

SAMPLES_AT_ONCE = 16
SAMPLE_CONTEXT = 256
SAMPLE_TOKENS = SAMPLES_AT_ONCE * SAMPLE_CONTEXT


@dataclass(frozen=True)
class MergeReport:
    """A merged model over some text, as seen from the unmerged model with its adapter; divergences in nats.

    chunks, context: of the text; tokens: how many of it were scored. merged: KL(unmerged || merged) and more.
    through_f16: the same of the model that comes from merging into F16 and then quantizing the whole into the formats
    of the merged one; None where `no_f16` says why there is none. gain: KL of that minus KL of the merged
    model, over the same tokens. tensors: error of the weights, by name.
    """

    chunks: int
    context: int
    tokens: int
    merged: Divergence
    through_f16: Divergence | None
    no_f16: str | None
    gain: Estimate | None
    tensors: dict[str, Errors]


def merge_report(
    model: Model,
    adapter: AdapterLike,
    merged: Model,
    chunks_NT: np.ndarray | None = None,
    *,
    scale: float = 1.0,
    method: str = DEFAULT_METHOD,
    imatrix: Imatrix | None = None,
    batch: int | None = None,
) -> MergeReport:
    """Measures what `merge(model, adapter, ...)` made; scale, method and imatrix as they were there.

    chunks_NT: token ids as `evaluate.score` takes them (from `evaluate.text_chunks`); None: text that the unmerged
    model itself says (`sample_chunks`). Raises what `score` raises.
    """
    acting = acting_together(adapter, scale)
    chunks_NT = sample_chunks(model, acting) if chunks_NT is None else chunks_NT

    def scored(other: Model) -> Scores:
        return score(other, chunks_NT, reference=model, reference_adapter=acting, batch=batch)

    ours = scored(merged)
    theirs, why = None, None
    try:
        theirs = scored(requantize_through_f16(model, acting, merged, method=method, imatrix=imatrix))
    except RealmError as error:
        why = str(error)
    return MergeReport(
        chunks=len(chunks_NT),
        context=chunks_NT.shape[1],
        tokens=ours.kl.size,
        merged=Divergence.of(ours),
        through_f16=Divergence.of(theirs) if theirs else None,
        no_f16=why,
        gain=Estimate.of(theirs.kl.astype(np.float64) - ours.kl) if theirs else None,
        tensors=weight_errors(model, acting, merged),
    )


def requantize_through_f16(
    model: Model,
    adapter: AdapterLike,
    merged: Model,
    *,
    method: str = DEFAULT_METHOD,
    imatrix: Imatrix | None = None,
) -> Model:
    """What merging into F16 and then quantizing the whole would give: every matrix of `merged` anew, in its format.

    That is what one does without `merge`: tensors that the adapter leaves alone lose, too. Raises RealmError for a
    format without an encoder, for weights beyond F16, and where no tensor that changed is packed, so that there is
    nothing to compare.
    """
    deltas = deltas_by_path(model, adapter)
    weights = {s.path: get_weight(merged.params, s.path) for s in tensor_specs(merged.config)}
    weights = {path: weight for path, weight in weights.items() if weight is not None and weight.ndim > 1}
    if all(format_of(weights[path]) in DENSE_FORMATS for path in deltas):
        raise RealmError("what the adapter changes is in floating point: there is nothing to quantize")
    for path, weight in weights.items():
        name, target = gguf_name(path), format_of(weight)

        def encode(w_RK: jax.Array, name: str = name, target: str = target) -> Weight:
            half = quantize_weight(model.origin.source, name, w_RK, "F16", None, method)
            return quantize_weight(model.origin.source, name, half, target, imatrix, method)

        source = weight_of(model.params, path)
        weights[path] = rebuild(source, deltas.get(path, ()), encode, embedding=path == EMBEDDING, keep=False)
    return with_weights(merged, weights)


def sample_chunks(
    model: Model,
    adapter: AdapterLike | None = None,
    *,
    tokens: int = SAMPLE_TOKENS,
    context: int = SAMPLE_CONTEXT,
    seed: int = 0,
) -> np.ndarray:
    """Text that the model says of itself at temperature 1, as chunks for `evaluate.score`: int32 (N, context).

    KL(p || q) is a mean over what p says. Each document begins with BOS (EOS where there is none, token 0 without a
    vocabulary); documents stand end to end, as in a file, until there are about `tokens`. context: at most the model's.
    """
    context = min(context, model.config.context_length)
    first, last = _ends(model)
    stream: list[int] = []
    while len(stream) < max(tokens, 2 * context):
        documents = generate(
            model,
            [[first]] * SAMPLES_AT_ONCE,
            max_new_tokens=context - 1,
            temperature=1.0,
            seed=seed,
            adapter=adapter,
        )
        seed += SAMPLES_AT_ONCE
        for document in documents:
            stream += [first, *document.tokens]
            if document.stop_reason == "eos" and last not in (None, first):
                stream.append(last)
    bos = first if model.tokenizer is not None and model.tokenizer.add_bos else None
    return chunk_tokens(stream, context, bos)


def _ends(model: Model) -> tuple[int, int | None]:
    """The token that documents begin with, and the one that ends them, if there is one."""
    if model.tokenizer is None:
        return 0, None
    known = [token for token in (model.tokenizer.bos_id, model.tokenizer.eos_id) if token is not None]
    return (known or [0])[0], model.tokenizer.eos_id
