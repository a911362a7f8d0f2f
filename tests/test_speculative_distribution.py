"""Speculative decoding, sampled: the first tokens have the target's joint distribution, and wrong rules are caught.

The exact distribution comes from enumerating every text of a few tokens over a vocabulary of 16; thousands of rows with
seeds of their own are compared with it by a chi-square test.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_toys import noisy, toy_config
from scipy import stats

from realm_jax.decode import Settings, acceptance, loop, sampling, settings, speculative
from realm_jax.decode.draft_models import prepare_draft
from realm_jax.model import Model, init_params, run, unembed
from realm_jax.model.model import Origin

V, ROWS, S = 16, 4096, 16
PROMPT = [3, 5, 7, 3, 5, 11, 3, 5]  # n-grams propose 11, 3, 5; and 7 stood there too
SAFE = 1e-3
"""The least p-value of a right rule; the seeds are fixed. Wrong ones come to less than CAUGHT."""
CAUGHT = 1e-9


def small_model(seed):
    config = dataclasses.replace(toy_config(V), layers=1)
    params = jax.tree.map(lambda x: x * 4 if x.ndim == 2 else x, init_params(config, jax.random.key(seed)))
    return Model(params, config, None, Origin("toy", {}))


TARGET = small_model(0)
DRAFTS = {"like": noisy(TARGET, 0.12), "unlike": small_model(1), "itself": TARGET, "ngram": "ngram"}


def exact(rules, eog, n):
    """P of every text of n tokens, (V,) * n. A token of `eog` ends the text: what follows it is 0 by definition."""
    texts_XN = np.stack(np.meshgrid(*[np.arange(V)] * n, indexing="ij"), -1).reshape(-1, n)
    tokens_XT = np.concatenate([np.tile(PROMPT, (len(texts_XN), 1)), texts_XN], axis=1)
    logits_XTV = unembed(TARGET.params, TARGET.config, run(TARGET.params, TARGET.config, jnp.asarray(tokens_XT))[0])
    params = settings.pack([rules] * len(texts_XN), len(texts_XN), V)
    p_X, ended_X = np.ones(len(texts_XN)), np.zeros(len(texts_XN), bool)
    prompt_X = jnp.full(len(texts_XN), len(PROMPT))
    for i in range(n):
        past = sampling.history(jnp.asarray(tokens_XT), prompt_X, prompt_X + i, V)
        log_p_XV = sampling.log_distribution(logits_XTV[:, len(PROMPT) - 1 + i], params, past)
        p_XV = np.exp(np.asarray(log_p_XV, np.float64))
        of_X = np.where(ended_X, texts_XN[:, i] == 0, p_XV[np.arange(len(p_X)), texts_XN[:, i]])
        p_X, ended_X = p_X * of_X, ended_X | np.isin(texts_XN[:, i], eog)
    assert abs(p_X.sum() - 1) < 1e-5
    return p_X.reshape((V,) * n)


def decoded(kind, rules, n, tokens=2, eog=(), rounds=100, **options):
    """Many rows with seeds of their own, decoded speculatively by the rules as they are now."""
    rows = [dataclasses.replace(rules, max_new_tokens=n, seed=seed) for seed in range(ROWS)]
    draft = prepare_draft(TARGET, DRAFTS[kind], tokens, **options).draft
    state = loop.init_state(TARGET.config, [PROMPT] * ROWS, rows, eog, size=S)
    state = speculative.begin(loop.prefill(TARGET.params, TARGET.config, state, 8), draft)
    state = speculative.prefill_draft(draft, state, 8)
    decode = jax.jit(functools.partial(speculative.decode.__wrapped__, config=TARGET.config))  # nothing remembered
    return decode(TARGET.params, draft=draft, state=state, max_rounds=rounds)


def p_value(kind, rules, n=2, eog=(), **options):
    rules = rules.checked(V)
    rows = decoded(kind, rules, n, eog=eog, **options).decode
    tokens_BS, length_B = np.asarray(rows.tokens_BS), np.asarray(rows.length_B)
    seen = np.zeros((V,) * n)
    for b in range(ROWS):
        text = tokens_BS[b, len(PROMPT) : length_B[b]].tolist()
        text += [*eog, *[0] * n][: n - len(text)]
        seen[tuple(text)] += 1
    expected = (exact(rules, eog, n) * ROWS).ravel()
    assert np.all(expected[seen.ravel() > 0] > 0), "a text that the target would never say"
    common = expected >= 5
    seen, expected = ([*x[common], x[~common].sum()] for x in (seen.ravel(), expected))
    if expected[-1] < 5:  # too rare together to be a class of its own
        seen, expected = ([*x[:-2], x[-2] + x[-1]] for x in (seen, expected))
    expected = np.array(expected) * ROWS / np.sum(expected)
    assert len(expected) > 8
    return stats.chisquare(seen, expected).pvalue


PENALTIES = Settings(
    temperature=1.3, repetition_penalty=1.4, presence_penalty=0.7, frequency_penalty=0.4, logit_bias={2: 1.5, 5: -1.0}
)
TRUNCATED = Settings(temperature=0.8, top_k=6, top_p=0.95, min_p=0.02)
HOT = Settings(temperature=1.0)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "rules", "options"),
    [
        ("unlike", HOT, {"n": 3}),
        ("ngram", HOT, {"n": 3}),
        ("like", TRUNCATED, {"n": 3, "tokens": 1}),
        ("like", PENALTIES, {"n": 3}),
        ("unlike", HOT, {"n": 3, "eog": (9,), "adaptive": True, "cost": 0.3}),
        slow("like", HOT, {}),
        slow("itself", HOT, {"n": 3}),
        slow("like", HOT, {"tokens": 1}),
        slow("like", HOT, {"n": 3, "tokens": 5}),
        slow("unlike", TRUNCATED, {"n": 3}),
        slow("unlike", PENALTIES, {"n": 3}),
        slow("ngram", TRUNCATED, {"n": 3}),
        slow("ngram", PENALTIES, {"n": 3, "adaptive": True}),
        slow("like", PENALTIES, {"n": 3, "adaptive": True, "cost": 0.5}),
        slow("like", HOT, {"n": 3, "eog": (9,)}),
    ],
)
def test_sampled_tokens_have_the_targets_distribution(kind, rules, options):
    assert p_value(kind, rules, **options) > SAFE


def accept_everything(rows, proposal, log_p_BJV):
    log_p_BV = jnp.take_along_axis(log_p_BJV, proposal.count_B[:, None, None], axis=1)[:, 0]
    return proposal.count_B, sampling.draw(log_p_BV, rows.keys_B, rows.length_B + proposal.count_B)


def accept_by_the_inverse(rows, proposal, log_p_BJV):
    """q / p for p / q, and the right replacement."""
    swapped_BGV = jnp.where(jnp.isfinite(proposal.log_q_BGV), proposal.log_q_BGV, -30.0)
    drafted_BG = proposal.drafted(rows.length_B)
    take = functools.partial(jnp.take_along_axis, indices=drafted_BG[..., None], axis=2)
    ratio_BG1 = take(swapped_BGV) - take(log_p_BJV[:, :-1])
    # min(1, q / p) = min(1, p' / q) with p' = q * q / p
    hit_BGV = jnp.arange(V) == drafted_BG[..., None]
    changed_BGV = jnp.where(hit_BGV, take(swapped_BGV) + ratio_BG1, log_p_BJV[:, :-1])
    accepted_B, _ = acceptance.accept(rows, proposal, jnp.concatenate([changed_BGV, log_p_BJV[:, -1:]], axis=1))
    return accepted_B, replacement(rows, proposal, log_p_BJV, accepted_B, bonus=True)


def replacement(rows, proposal, log_p_BJV, accepted_B, bonus):
    """The target's token; without `bonus`, the residual even where every proposal was accepted."""
    log_p_BV = jnp.take_along_axis(log_p_BJV, accepted_B[:, None, None], axis=1)[:, 0]
    at_B = jnp.minimum(accepted_B, proposal.log_q_BGV.shape[1] - 1)
    log_q_BV = jnp.take_along_axis(proposal.log_q_BGV, at_B[:, None, None], axis=1)[:, 0]
    residual_BV = acceptance.residual(log_p_BV, log_q_BV)
    whole_B1 = ((accepted_B >= proposal.count_B) & bonus)[:, None]
    log_next_BV = jnp.where(whole_B1, log_p_BV, residual_BV)
    return sampling.draw(log_next_BV, rows.keys_B, rows.length_B + accepted_B)


def without_bonus(rows, proposal, log_p_BJV):
    accepted_B, _ = acceptance.accept(rows, proposal, log_p_BJV)
    return accepted_B, replacement(rows, proposal, log_p_BJV, accepted_B, bonus=False)


def right_in_other_words(rows, proposal, log_p_BJV):
    accepted_B, _ = acceptance.accept(rows, proposal, log_p_BJV)
    return accepted_B, replacement(rows, proposal, log_p_BJV, accepted_B, bonus=True)


@pytest.mark.parametrize("rule", [accept_everything, slow(accept_by_the_inverse), without_bonus, None])
def test_a_wrong_rule_fails_the_same_test(rule, monkeypatch):
    if rule is None:  # the replacement drawn from p, not from what is left of p
        monkeypatch.setattr(acceptance, "residual", lambda log_p_BV, log_q_BV: log_p_BV)
    else:
        monkeypatch.setattr(speculative, "accept", rule)
    assert p_value("like", HOT, n=2, tokens=1) < CAUGHT


@pytest.mark.slow
def test_a_right_rule_in_the_place_of_the_wrong_ones_passes(monkeypatch):
    monkeypatch.setattr(speculative, "accept", right_in_other_words)
    assert p_value("like", HOT, n=2, tokens=1) > SAFE


@pytest.mark.slow
def test_a_threshold_in_the_place_of_chance_is_caught(monkeypatch):
    monkeypatch.setattr("jax.random.uniform", lambda key: jnp.float32(0.5))
    assert p_value("like", HOT, n=2, tokens=1) < CAUGHT


def test_acceptance_is_the_sum_of_the_smaller_probabilities():
    """Leviathan et al. 2023, corollary 3.6, at the first place; at the second, given that the first was accepted."""
    rules = HOT.checked(V)
    tally = decoded("like", rules, 5, rounds=1).tally
    tokens_XT = jnp.asarray([[*PROMPT, x] for x in range(V)])
    p_XTV, q_XTV = (
        np.asarray(jax.nn.softmax(unembed(m.params, m.config, run(m.params, m.config, tokens_XT)[0])), np.float64)
        for m in (TARGET, DRAFTS["like"])
    )
    shared_XTV = np.minimum(p_XTV, q_XTV)[:, -2:]
    first_V = shared_XTV[0, 0]
    second = (first_V / first_V.sum() * shared_XTV[:, 1].sum(1)).sum()
    reached_BG, accepted_BG = np.asarray(tally.reached_BG), np.asarray(tally.accepted_BG)
    for g, want in enumerate((first_V.sum(), second)):
        n = reached_BG[:, g].sum()
        assert 0.3 < want < 0.9
        assert abs(accepted_BG[:, g].sum() / n - want) < 3 * (want * (1 - want) / n) ** 0.5
    assert reached_BG[:, 0].sum() == ROWS and reached_BG[:, 1].sum() == accepted_BG[:, 0].sum()
