"""What speculation is worth, and what it did: theory by brute force, counts by hand, n-grams by definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_toys import noisy, random_model, scripted_model

from realm_jax.decode import Settings, generate, loop
from realm_jax.decode.draft_models import prepare_draft, weight_bytes
from realm_jax.decode.drafts import LONGEST_NGRAM, propose
from realm_jax.decode.speedup import best_length, break_even, expected_speedup, expected_tokens
from realm_jax.decode.tally import Tally, estimate, next_length
from realm_jax.errors import RequestError

MODEL = random_model()
ACCEPTANCES = [0.0, 1e-6, 0.1, 0.5, 0.83, 0.99, 0.9999, 1 - 2e-6, 1.0]


@pytest.mark.parametrize("g", [0, 1, 2, 5, 64])
def test_expected_tokens_and_speedup_are_the_sums(g):
    a = np.array(ACCEPTANCES, np.float32)
    want = sum(a.astype(np.float64) ** i for i in range(g + 1))
    np.testing.assert_allclose(expected_tokens(a, g), want, rtol=1e-5)
    for c in (0.0, 0.1, 1.0):
        np.testing.assert_allclose(expected_speedup(a, g, c), want / (1 + g * c), rtol=1e-5)
    assert float(expected_tokens(2.0, g)) == g + 1 and float(expected_tokens(-1.0, g)) == 1


def test_the_best_length_is_that_of_most_speed():
    a = np.linspace(0, 1, 41)
    for c in (0.02, 0.1, 0.4, 1.0, 3.0):
        speeds = np.stack([sum(a**i for i in range(g + 1)) / (1 + g * c) for g in range(9)])
        best = np.asarray(best_length(jnp.asarray(a, jnp.float32), c, 8))
        assert best.dtype == np.int32
        np.testing.assert_allclose(speeds[best, range(41)], speeds.max(0), rtol=1e-5)


@pytest.mark.parametrize("g", [1, 2, 4, 8, 64])
@pytest.mark.parametrize("c", [0.0, 0.01, 0.2, 0.5, 0.99, 1.0])
def test_at_break_even_speculation_neither_wins_nor_loses(g, c):
    a = break_even(g, c)
    assert 0 <= a <= 1
    assert abs(sum(a**i for i in range(g + 1)) - (1 + g * c)) < 1e-7 * (g + 1)


def test_break_even_says_where_there_is_none():
    assert break_even(4, 1.5) == float("inf") and break_even(1, 0.3) == pytest.approx(0.3)
    for g, c in ((0, 0.1), (-1, 0.1), (2, -0.1), (2, float("nan"))):
        with pytest.raises(RequestError, match="break_even wants") as error:
            break_even(g, c)
        assert "\n" not in str(error.value)


def check_sums(c, g):
    ahead = c.stats.speculative
    assert len(ahead.by_position) == len(ahead.judged) == g and len(ahead.histogram) == g + 1
    assert sum(ahead.histogram) == ahead.rounds
    assert sum(n * rounds for n, rounds in enumerate(ahead.histogram)) == ahead.accepted <= ahead.drafted
    accepted = [
        0 if share is None else round(share * n) for share, n in zip(ahead.by_position, ahead.judged, strict=True)
    ]
    assert sum(accepted) == ahead.accepted and sum(ahead.judged) <= ahead.drafted
    assert accepted == [sum(ahead.histogram[j + 1 :]) for j in range(g)]
    assert all(n <= before for n, before in zip(ahead.judged[1:], accepted, strict=False))
    assert all((share is None) == (n == 0) for share, n in zip(ahead.by_position, ahead.judged, strict=True))
    assert ahead.tokens == len(c.tokens) + (c.stop_reason == "eos")
    assert ahead.forwards_saved == ahead.tokens - ahead.rounds >= 0
    assert ahead.mean_accepted == (ahead.accepted / ahead.rounds if ahead.rounds else 0)


@pytest.mark.parametrize(
    "draft",
    [noisy(MODEL, 0.05), *(pytest.param(d, marks=pytest.mark.slow) for d in ("ngram", random_model(1)))],
    ids=["good", "ngram", "wrong"],
)
def test_the_counts_of_a_completion_agree(draft):
    """Rows that have given speculation up included, whatever their neighbours do."""
    prompts = ["hello", "a", "abcabcabcab", "it is"]
    for options in ({}, {"logit_bias": {0: 24.0}}, {"temperature": 1.0, "seed": 3}):
        for c in generate(MODEL, prompts, draft=draft, draft_tokens=3, max_new_tokens=50, **options):
            check_sums(c, 3)


def test_the_counts_of_a_draft_that_is_always_right_or_wrong():
    model, wrong = scripted_model("abcdefghij"), scripted_model("abcdefghij")
    wrong = wrong.replace(params=wrong.params.replace(output=jnp.roll(wrong.params.output, 3, axis=0)))
    for draft, saved in ((model, 8), (wrong, 0)):
        (c,) = generate(model, "a", draft=draft, draft_tokens=4, max_new_tokens=30)
        check_sums(c, 4)
        assert (c.text, c.stop_reason) == ("bcdefghij", "eos")
        ahead = c.stats.speculative
        assert ahead.tokens == 10 and ahead.forwards_saved == saved
    assert (ahead.accepted, ahead.mean_accepted, ahead.by_position) == (0, 0.0, (0.0, None, None, None))
    (c,) = generate(model, "a", draft=model, draft_tokens=4, max_new_tokens=30)
    ahead = c.stats.speculative
    assert (ahead.rounds, ahead.histogram, ahead.judged) == (2, (0, 0, 0, 0, 2), (2, 2, 2, 2))
    (c,) = generate(model, "a", draft=model, draft_tokens=4, max_new_tokens=7)
    ahead = c.stats.speculative  # 4 + 1, then 1 + 1: the last token is always the target's own
    assert (ahead.rounds, ahead.drafted, ahead.accepted, ahead.histogram) == (2, 5, 5, (0, 1, 0, 0, 1))
    (c,) = generate(model, "a", draft=model, draft_tokens=4, max_new_tokens=0)
    assert c.stats.speculative.rounds == 0 and c.stats.speculative.by_position == (None,) * 4


def test_the_cost_of_a_draft_is_the_weights_that_it_reads():
    half = prepare_draft(MODEL, "self:F32:1", 4).draft
    layer = sum(leaf.nbytes for leaf in jax.tree.leaves(MODEL.params.layers[0]))
    assert float(half.cost) == pytest.approx(1 - layer / weight_bytes(MODEL.params))
    assert float(prepare_draft(MODEL, MODEL, 4).draft.cost) == 1
    for cost in (-1, float("nan"), float("inf")):
        with pytest.raises(RequestError, match="the cost of a draft token is"):
            prepare_draft(MODEL, MODEL, 4, cost=cost)


def test_the_length_follows_the_acceptance():
    """Rows: always right; half; never, seen often; never, but hardly seen; given up before."""
    tally, seen = Tally.empty(5, 4), np.array([64, 64, 64, 2, 64])
    share = np.array([1.0, 0.5, 0.0, 0.0, 1.0])
    tally = tally.replace(
        reached_BG=jnp.zeros((5, 4), jnp.int32).at[:, 0].set(seen),
        accepted_BG=jnp.zeros((5, 4), jnp.int32).at[:, 0].set((seen * share).astype(int)),
    )
    before = jnp.array([4, 4, 4, 4, 0])
    for adaptive, want in ((True, [4, 1, 0, 1, 0]), (False, [4, 0, 0, 4, 0])):
        draft = prepare_draft(MODEL, MODEL, 4, adaptive=adaptive, cost=0.3).draft
        assert next_length(draft, tally, jnp.asarray(share), before).tolist() == want
    judged = jnp.array([[True, True], [False, False]])
    accepted_B, judged_B = estimate(
        jnp.array([5.0, 5.0]), jnp.array([10.0, 10.0]), judged, jnp.array([[True, False]] * 2) & judged
    )
    np.testing.assert_allclose([accepted_B, judged_B], [[5.5, 5.0], [11.0, 10.0]], rtol=1e-6)


def looked_up(row, most):
    """Prompt lookup by its definition."""
    for n in range(LONGEST_NGRAM, 0, -1):
        for s in range(len(row) - 1, n - 1, -1):
            if row[s - n : s] == row[len(row) - n :]:
                return row[s : s + most]
    return []


@pytest.mark.parametrize("kinds", [2, 5, 100])
def test_ngrams_are_found_where_the_definition_finds_them(kinds):
    rng = np.random.default_rng(kinds)
    prompts = [rng.integers(1, 1 + kinds, n).tolist() for n in [*range(1, 9), *rng.integers(9, 60, 24)]]
    budgets = [Settings(max_new_tokens=int(rng.integers(1, 5))) for _ in prompts]
    state = loop.init_state(MODEL.config, prompts, budgets, size=64)
    state = state.replace(
        tokens_BS=jnp.where(jnp.arange(64) < state.length_B[:, None], state.tokens_BS, 1),  # leftovers that would match
        cache=state.cache.replace(length_B=state.length_B - 1),
    )
    asked = jnp.asarray(rng.integers(1, 6, len(prompts)))
    proposal, _ = propose(prepare_draft(MODEL, "ngram", 5).draft, 128, state, None, asked)
    found = 0
    for b, row in enumerate(prompts):
        want = looked_up(row, min(int(asked[b]), budgets[b].max_new_tokens - 1))
        n = int(proposal.count_B[b])
        assert proposal.tokens_BS[b, len(row) : len(row) + n].tolist() == want
        assert np.argmax(proposal.log_q_BGV[b, :n], axis=-1).tolist() == want
        found += bool(want)
    assert found > 5 or kinds == 100
