"""Perplexity and divergence against the same numbers computed directly in float64 from whole logits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import realm_jax as realm
from realm_jax import evaluate
from realm_jax.errors import RequestError
from realm_jax.evaluate import Divergence, Estimate, Perplexity, chunk_tokens, score

TEXT = "In the beginning there was the word, and the word was thin. " * 8
CONTEXT = 48


@pytest.fixture(scope="module")
def model(model_file):
    return realm.load(model_file)


@pytest.fixture(scope="module")
def reference(make_model_file):
    return realm.load(make_model_file("reference.gguf", seed=1))


def log_probabilities(model, tokens) -> np.ndarray:
    """(T, V) float64, from the logits of one chunk."""
    logits = np.asarray(realm.forward(model, jnp.asarray([tokens], jnp.int32))[0], np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def direct(model, text, context, reference=None) -> dict[str, np.ndarray]:
    """The windows written out: every chunk by itself, every scored token by itself."""
    tokens = model.tokenizer.encode(text)
    found = {"nll": [], "reference_nll": [], "kl": [], "same_top": []}
    for start in range(0, len(tokens) - context + 1, context):
        chunk = tokens[start : start + context]
        inputs = [model.tokenizer.bos_id, *chunk[1:]]
        ours = log_probabilities(model, inputs)
        theirs = log_probabilities(reference, inputs) if reference else None
        for position in range(context // 2, context - 1):
            found["nll"].append(-ours[position, chunk[position + 1]])
            if theirs is None:
                continue
            p, q = theirs[position], ours[position]
            found["reference_nll"].append(-p[chunk[position + 1]])
            found["kl"].append(np.sum(np.exp(p) * (p - q)))
            found["same_top"].append(p.argmax() == q.argmax())
    return {key: np.array(values) for key, values in found.items() if values}


def test_perplexity_equals_the_direct_computation(model):
    nll = direct(model, TEXT, CONTEXT)["nll"]
    ours = evaluate.perplexity(model, TEXT, context=CONTEXT)
    assert ours.perplexity == pytest.approx(np.exp(nll.mean()), rel=1e-5)
    assert ours.nll.error == pytest.approx(np.sqrt((np.mean(nll**2) - nll.mean() ** 2) / (nll.size - 1)), rel=1e-4)
    assert ours.error == pytest.approx(ours.perplexity * ours.nll.error)


def test_divergence_equals_the_direct_computation(model, reference):
    wanted = direct(model, TEXT, CONTEXT, reference)
    own, ours = evaluate.compare(model, reference, TEXT, context=CONTEXT)
    n = wanted["kl"].size
    assert own.nll.mean == pytest.approx(wanted["nll"].mean(), rel=1e-5)
    assert ours.reference.nll.mean == pytest.approx(wanted["reference_nll"].mean(), rel=1e-5)
    assert ours.kl.mean == pytest.approx(wanted["kl"].mean(), rel=1e-4)
    assert ours.kl.error == pytest.approx(wanted["kl"].std() / np.sqrt(n - 1), rel=1e-3)
    assert ours.kl_median == pytest.approx(np.median(wanted["kl"]), rel=1e-3)
    assert ours.kl_99 == pytest.approx(np.quantile(wanted["kl"], 0.99), rel=1e-3)
    deviation = np.sqrt(0.01 * 0.99 / n)
    low, high = np.quantile(wanted["kl"], [0.99 - deviation, 0.99 + deviation])
    assert ours.kl_99_error == pytest.approx((high - low) / 2, rel=1e-2)
    assert 0 < ours.kl_median_error < ours.kl_99
    assert ours.kl_max == pytest.approx(wanted["kl"].max(), rel=1e-3)
    share = wanted["same_top"].mean()
    assert ours.top1_agreement.mean == pytest.approx(share)
    assert ours.top1_agreement.error == pytest.approx(np.sqrt(share * (1 - share) / (n - 1)))
    difference = wanted["nll"] - wanted["reference_nll"]
    assert ours.log_ratio.mean == pytest.approx(difference.mean(), abs=1e-5)
    assert ours.log_ratio.error == pytest.approx(difference.std() / np.sqrt(n - 1), rel=1e-3)


def test_a_model_does_not_diverge_from_itself(model):
    _, divergence = evaluate.compare(model, model, TEXT, context=CONTEXT)
    assert divergence.kl_max == 0
    assert divergence.top1_agreement == Estimate(1.0, 0.0)
    assert divergence.log_ratio == Estimate(0.0, 0.0)


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_the_batch_changes_nothing(model, batch):
    chunks = evaluate.text_chunks(model, TEXT, CONTEXT)
    assert len(chunks) > 5
    seen = []
    ours = score(model, chunks, batch=batch, on_chunks=seen.append)
    alone = np.concatenate([score(model, chunks[i : i + 1]).nll for i in range(len(chunks))])
    np.testing.assert_allclose(ours.nll, alone, rtol=1e-5, atol=1e-5)
    assert sum(seen) == len(chunks)


def test_blocks_of_positions_change_nothing(model, reference, monkeypatch):
    """Logits taken in small blocks, the last one padded, are those taken at once."""
    chunks = evaluate.text_chunks(model, TEXT, CONTEXT)
    at_once = score(model, chunks, reference=reference)
    monkeypatch.setattr(evaluate, "VALUES_AT_ONCE", 7 * model.config.vocab_size)
    jax.clear_caches()
    in_blocks = score(model, chunks, reference=reference, batch=2)
    jax.clear_caches()
    for name in ("nll", "reference_nll", "kl"):
        np.testing.assert_allclose(getattr(in_blocks, name), getattr(at_once, name), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(in_blocks.same_top, at_once.same_top)


def test_one_compilation_for_all_chunks(model, monkeypatch):
    traced = chex.assert_max_traces(evaluate._score_step.__wrapped__, n=1)
    monkeypatch.setattr(evaluate, "_score_step", jax.jit(traced, static_argnames="configs"))
    chunks = evaluate.text_chunks(model, TEXT, CONTEXT)
    score(model, chunks, batch=3)
    score(model, chunks[:3], batch=3)


def test_chunks():
    chunks = chunk_tokens(list(range(100, 111)), 4, bos=1)
    assert chunks.tolist() == [[1, 101, 102, 103], [1, 105, 106, 107]]
    assert chunk_tokens(list(range(8)), 4, bos=None).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_short_text_is_refused_with_what_would_do():
    with pytest.raises(RequestError, match=r"has 900 tokens: a context of 512 needs at least 1024.*at most 450"):
        chunk_tokens([0] * 900, 512, None)
    with pytest.raises(RequestError, match=r"has 3 tokens.*give a longer text$"):
        chunk_tokens([0] * 3, 512, None)
    with pytest.raises(RequestError, match="leaves nothing to score"):
        chunk_tokens([0] * 100, 2, None)


def test_tokens_outside_the_vocabulary_are_refused(model):
    with pytest.raises(RequestError, match="outside"):
        score(model, np.full((2, 8), model.config.vocab_size, np.int32))


def test_another_vocabulary_is_refused(model, make_model_file, byte_vocabulary):
    from realm_jax.gguf.types import field

    key = "tokenizer.ggml.tokens"
    tokens = list(byte_vocabulary[key].value)
    swapped = [*tokens[:100], tokens[101], tokens[100], *tokens[102:]]
    other = realm.load(make_model_file("swapped.gguf", vocabulary=byte_vocabulary | {key: field(swapped)}))
    with pytest.raises(RequestError, match=r"token 100 is .* in the reference model"):
        evaluate.check_same_vocabulary(model, other, "reference model")
    longer = byte_vocabulary | {
        key: field([*tokens, "<extra>"]),
        "tokenizer.ggml.token_type": field([3, 3] + [1] * (len(tokens) - 2) + [3]),
    }
    with pytest.raises(RequestError, match=f"has {len(tokens) + 1} tokens and the model {len(tokens)}"):
        evaluate.check_same_vocabulary(
            model, realm.load(make_model_file("longer.gguf", vocabulary=longer)), "reference model"
        )


def test_estimates():
    values = np.array([1.0, 2.0, 4.0])
    assert Estimate.of(values).mean == pytest.approx(7 / 3)
    assert Estimate.of(values).error == pytest.approx(values.std() / np.sqrt(2))
    assert np.isnan(Estimate.of(values[:1]).error)
    assert Perplexity.of(np.full(3, 1e4)).perplexity == np.inf
    with pytest.raises(RequestError, match="no reference"):
        Divergence.of(evaluate.Scores(nll=values))


@pytest.mark.parametrize("probability", [0.5, 0.99])
@pytest.mark.parametrize("spread", [0.5, 1.5])
def test_errors_of_quantiles_are_their_spread(probability, spread):
    """Over many samples of a skewed distribution, like that of KL, the mean of the errors is the true deviation."""
    samples = np.random.default_rng(0).lognormal(-4, spread, (1000, 4000))
    true = np.quantile(samples, probability, axis=1).std()
    errors = [evaluate.quantile_error(sample, probability) for sample in samples]
    assert np.mean(errors) == pytest.approx(true, rel=0.1)


def test_errors_of_quantiles_of_few_values():
    values = np.arange(100.0)
    assert evaluate.quantile_error(values, 0.5) == pytest.approx(0.05 * 99)
    assert np.isnan(evaluate.quantile_error(values[:90], 0.99))
    assert np.isnan(evaluate.quantile_error(values[:1], 0.99))
    assert evaluate.quantile_error(np.ones(500), 0.99) == 0


def test_kl_divergence_takes_impossible_tokens():
    log_p = jnp.array([0.0, -jnp.inf])
    log_q = jnp.log(jnp.array([0.5, 0.5]))
    assert evaluate.kl_divergence(log_p, log_q) == pytest.approx(np.log(2))
