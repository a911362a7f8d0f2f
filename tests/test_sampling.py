"""The sampling rules against a plain numpy statement of them, and the draws against their exact distribution."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from realm_jax.decode import sampling
from realm_jax.decode.sampling import History
from realm_jax.decode.settings import Settings, pack, row_keys
from realm_jax.errors import RequestError

V = 16
log_distribution = jax.jit(sampling.log_distribution)
keep_top_k = jax.jit(sampling._keep_top_k)


def exact(logits_V, s: Settings, seen_V, generated_V) -> np.ndarray:
    """The probabilities that the module's documentation promises, in float64, by sorting."""
    x = np.asarray(logits_V, np.float64).copy()
    seen_V, generated_V = np.asarray(seen_V), np.asarray(generated_V)
    for token, value in (s.logit_bias or {}).items():
        x[token] += value
    damped = np.where(x > 0, x / s.repetition_penalty, x * s.repetition_penalty)
    x = np.where(seen_V, damped, x)
    x = x - s.frequency_penalty * generated_V - s.presence_penalty * (generated_V > 0)
    if s.temperature == 0:
        return np.eye(x.size)[np.argmax(x)]
    if s.top_k:
        x[x < np.sort(x)[::-1][min(s.top_k, x.size) - 1]] = -np.inf
    p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    if s.top_p < 1:
        order = np.argsort(-p, kind="stable")
        last = order[np.argmax(np.cumsum(p[order]) >= s.top_p)]
        x[p < p[last]] = -np.inf
    x[np.exp(x - x.max()) < s.min_p] = -np.inf
    weight = np.exp((x - x.max()) / s.temperature)
    return weight / weight.sum()


def batch(settings, vocab_size=V):
    return pack([s.checked(vocab_size) for s in settings], len(settings), vocab_size)


RULES = {
    "plain": Settings(temperature=1.0),
    "hot": Settings(temperature=1.7),
    "cold": Settings(temperature=0.3),
    "top-k": Settings(temperature=1.0, top_k=4),
    "top-p": Settings(temperature=1.0, top_p=0.7),
    "min-p": Settings(temperature=1.0, min_p=0.2),
    "bias": Settings(temperature=1.0, logit_bias={0: 2.5, 3: -math.inf, 7: -1.0}),
    "repetition": Settings(temperature=1.0, repetition_penalty=1.6),
    "presence": Settings(temperature=1.0, presence_penalty=0.8),
    "frequency": Settings(temperature=1.0, frequency_penalty=0.6),
    "top-k, top-p, min-p, hot": Settings(temperature=1.5, top_k=9, top_p=0.9, min_p=0.1),
    "everything": Settings(
        temperature=0.8, top_k=12, top_p=0.95, min_p=0.02, repetition_penalty=1.2, presence_penalty=0.3,
        frequency_penalty=0.2, logit_bias={1: 1.0, 2: -math.inf},
    ),
    "greedy": Settings(),
    "greedy, penalised": Settings(repetition_penalty=3.0, presence_penalty=1.0, logit_bias={5: 0.5}),
}  # fmt: skip


def problem(seed=0, rows=1):
    """Logits, and a history in which some tokens stand in the prompt and some were generated."""
    rng = np.random.default_rng(seed)
    logits_BV = rng.normal(0, 1.5, (rows, V)).astype(np.float32)
    generated_BV = rng.poisson(0.5, (rows, V)).astype(np.int32)
    seen_BV = (rng.random((rows, V)) < 0.3) | (generated_BV > 0)
    return jnp.array(logits_BV), History(seen_BV=jnp.array(seen_BV), generated_BV=jnp.array(generated_BV))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", range(5))
def test_distribution_is_the_documented_one(name, seed):
    logits_BV, past = problem(seed)
    log_p_BV = log_distribution(logits_BV, batch([RULES[name]]), past)
    want_V = exact(logits_BV[0], RULES[name], past.seen_BV[0], past.generated_BV[0])
    assert log_p_BV.dtype == jnp.float32
    np.testing.assert_allclose(np.exp(log_p_BV[0]), want_V, rtol=2e-5, atol=1e-7)
    np.testing.assert_array_equal(np.isneginf(log_p_BV[0]), want_V == 0)


@pytest.mark.parametrize("case", json.loads((Path(__file__).parent / "golden" / "sampling.json").read_text()))
def test_distribution_is_that_of_llama_cpp(case):
    """Its default sampler chain with the same numbers; golden/make_sampling.py made the file."""
    case = dict(case)
    logits_BV, tokens_BS = jnp.array([case.pop("logits")], jnp.float32), jnp.array([case.pop("tokens")])
    want_V = case.pop("probabilities")
    settings = Settings(**case | {"logit_bias": dict(case["logit_bias"])})
    past = sampling.history(tokens_BS, jnp.array([0]), jnp.array([tokens_BS.size]), logits_BV.size)
    params = batch([settings], logits_BV.size)
    np.testing.assert_allclose(np.exp(log_distribution(logits_BV, params, past)[0]), want_V, atol=2e-6)


def test_rows_of_all_kinds_in_one_batch_are_what_each_is_alone():
    """Greedy and sampled rows mix, and a rule that only some rows need changes nothing for the others."""
    logits_BV, past = problem(3, len(RULES))
    together_BV = log_distribution(logits_BV, batch(RULES.values()), past)
    for b, rule in enumerate(RULES.values()):
        one = History(seen_BV=past.seen_BV[b : b + 1], generated_BV=past.generated_BV[b : b + 1])
        alone_BV = log_distribution(logits_BV[b : b + 1], batch([rule]), one)
        np.testing.assert_allclose(together_BV[b], alone_BV[0], rtol=1e-6, atol=1e-6)


def chi_square(rule: Settings, wanted: Settings, draws: int = 20_000, seed: int = 0) -> float:
    """p-value of tokens drawn under `rule`, one key each, against the exact probabilities of `wanted`."""
    logits_BV, past = problem(11)
    params = batch([rule])

    @jax.jit
    def one(key):
        position_B = jnp.array([17])
        return sampling.next_token(logits_BV, params, past, key[None], position_B)[0]

    tokens = jax.vmap(one)(row_keys(range(seed, seed + draws)))
    want_V = exact(logits_BV[0], wanted, past.seen_BV[0], past.generated_BV[0])
    observed_V = np.bincount(tokens, minlength=V)
    if observed_V[want_V == 0].any():
        return 0.0
    inside = want_V > 0
    return stats.chisquare(observed_V[inside], want_V[inside] * draws).pvalue if inside.sum() > 1 else 1.0


@pytest.mark.parametrize("name", RULES)
def test_draws_follow_the_distribution(name):
    assert chi_square(RULES[name], RULES[name]) > 1e-3


@pytest.mark.parametrize(
    ("drawn", "wanted"),
    [
        (Settings(temperature=1.0), Settings(temperature=1.05)),
        (Settings(temperature=1.0, top_k=6), Settings(temperature=1.0, top_k=5)),
        (Settings(temperature=1.0, top_p=0.8), Settings(temperature=1.0)),
        (Settings(temperature=1.0, frequency_penalty=0.6), Settings(temperature=1.0, presence_penalty=0.6)),
    ],
)
def test_the_statistic_notices_a_slightly_wrong_distribution(drawn, wanted):
    assert chi_square(drawn, wanted) < 1e-6


def test_draws_of_one_key_at_many_positions_are_independent():
    logits_V = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    n = 20_000
    tokens = np.asarray(
        sampling.draw(jnp.tile(logits_V, (n, 1)), jnp.broadcast_to(row_keys([5])[0], (n,)), jnp.arange(n))
    )
    pairs = np.bincount(tokens[:-1] * 3 + tokens[1:], minlength=9).reshape(3, 3)
    assert stats.chisquare(np.bincount(tokens), np.exp(logits_V.astype(np.float64)) * n).pvalue > 1e-3
    assert stats.chi2_contingency(pairs).pvalue > 1e-3


def test_a_draw_depends_on_key_and_position_alone():
    logits_BV, past = problem(1, 4)
    params = batch([Settings(temperature=1.0)] * 4)
    keys_B, position_B = row_keys([3, 1, 4, 1]), jnp.array([5, 6, 7, 6])
    tokens_B = sampling.next_token(logits_BV, params, past, keys_B, position_B)
    order = jnp.array([2, 0, 3, 1])
    moved_B = sampling.next_token(logits_BV[order], params, past, keys_B[order], position_B[order])
    np.testing.assert_array_equal(moved_B, tokens_B[order])


def test_truncation_looks_at_the_distribution_before_the_temperature():
    """As in llama.cpp's default chain: heat does not let the tail back in."""
    logits_BV, past = problem(2)
    kept = [
        np.isfinite(log_distribution(logits_BV, batch([Settings(temperature=t, top_p=0.8, min_p=0.1)]), past))
        for t in (0.2, 1.0, 50.0)
    ]
    np.testing.assert_array_equal(kept[0], kept[1])
    np.testing.assert_array_equal(kept[1], kept[2])


def kept(logits, **rule) -> list[int]:
    params = batch([Settings(temperature=1.0, **rule)], len(logits))
    log_p_BV = log_distribution(jnp.array([logits], jnp.float32), params)
    return np.flatnonzero(np.isfinite(log_p_BV[0])).tolist()


def test_at_least_one_token_is_kept():
    logits = [0.0, 3.0, 1.0, 2.0]
    for rule in (
        {"top_k": 1},
        {"top_p": 1e-6},
        {"top_p": 1e-37},
        {"min_p": 1.0},
        {"top_k": 1, "top_p": 0.1, "min_p": 1.0},
    ):
        assert kept(logits, **rule) == [1], rule


def test_off_means_off():
    logits = [0.0, 30.0, -40.0, 20.0]
    assert kept(logits) == kept(logits, top_k=4) == kept(logits, top_k=10**9, min_p=0.0, top_p=1.0) == [0, 1, 2, 3]
    assert kept(logits, top_k=3, top_p=1.0) == [0, 1, 3]


def test_ties_at_the_edge_stand_or_fall_together():
    assert kept([1.0, 2.0, 1.0, 0.0], top_k=2) == [0, 1, 2]
    assert kept([1.0, 1.0, 1.0, 1.0], top_k=1) == [0, 1, 2, 3]
    assert kept([1.0, 1.0, 1.0, 1.0], top_p=0.3) == [0, 1, 2, 3]


def test_the_edge_of_top_p_is_the_token_that_reaches_it():
    logits = np.log([0.5, 0.25, 0.125, 0.125])
    assert kept(logits, top_p=0.49) == [0]
    assert kept(logits, top_p=0.51) == [0, 1]
    assert kept(logits, top_p=0.76) == [0, 1, 2, 3]


@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=40), st.integers(1, 45))
def test_top_k_keeps_the_k_largest_of_any_logits(logits, k):
    x = np.array(logits, np.float32)
    padded = np.concatenate([x, np.full(40 - x.size, -np.inf, np.float32)])  # one shape, compiled once
    got = np.isfinite(keep_top_k(jnp.array(padded[None]), jnp.array([k])))[0, : x.size]
    x = np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, x)  # XLA takes subnormal numbers for 0 where it compares
    threshold = np.sort(x)[::-1][min(k, x.size) - 1]
    assert got[x > threshold].all() and not got[x < threshold].any() and got.sum() >= min(k, x.size)


def test_greedy_takes_the_lowest_id_of_equals_and_obeys_bias_and_penalties():
    logits_BV = jnp.array([[1.0, 3.0, 3.0, -1.0]])
    choose = lambda s, past=None: int(  # noqa: E731
        sampling.next_token(logits_BV, batch([s], 4), past, row_keys([0]), jnp.array([1]))[0]
    )
    seen = History(seen_BV=jnp.array([[False, True, False, False]]), generated_BV=jnp.array([[0, 1, 2, 0]]))
    assert choose(Settings()) == 1
    assert choose(Settings(logit_bias={1: -math.inf})) == 2
    assert choose(Settings(logit_bias={3: 100.0})) == 3
    assert choose(Settings(logit_bias={1: -math.inf, 2: -math.inf, 3: -math.inf})) == 0
    assert choose(Settings(repetition_penalty=1.5), seen) == 2
    assert choose(Settings(frequency_penalty=0.1), seen) == 1
    assert choose(Settings(frequency_penalty=3.0), seen) == 0


def test_repetition_penalty_pushes_negative_logits_down():
    seen = History(seen_BV=jnp.array([[True, True, False]]), generated_BV=jnp.zeros((1, 3), jnp.int32))
    params = batch([Settings(repetition_penalty=2.0)], 3)
    np.testing.assert_array_equal(sampling.adjust(jnp.array([[4.0, -4.0, -4.0]]), params, seen), [[2.0, -8.0, -4.0]])


def test_history_counts_prompt_and_generated_tokens_apart():
    tokens_BS = jnp.array([[3, 3, 1, 2, 2, 9], [5, 0, 0, 0, 0, 0]])
    past = sampling.history(tokens_BS, jnp.array([2, 1]), jnp.array([5, 1]), 10)
    assert np.flatnonzero(past.seen_BV[0]).tolist() == [1, 2, 3]
    assert np.flatnonzero(past.seen_BV[1]).tolist() == [5]
    assert past.generated_BV[0].tolist() == [0, 1, 2, 0, 0, 0, 0, 0, 0, 0]
    assert not past.generated_BV[1].any()


def test_reported_logprobs_are_the_models_own():
    logits_BV, _ = problem(8)
    chosen_B, ids_BN, top_BN = sampling.token_logprobs(logits_BV, jnp.array([6]), 3)
    logits_V = np.asarray(logits_BV[0], np.float64)
    want_V = logits_V - np.log(np.exp(logits_V).sum())
    np.testing.assert_allclose(chosen_B, [want_V[6]], rtol=1e-5)
    assert ids_BN[0].tolist() == np.argsort(-want_V)[:3].tolist()
    np.testing.assert_allclose(top_BN[0], np.sort(want_V)[::-1][:3], rtol=1e-5)


def test_extreme_but_allowed_values_leave_a_distribution():
    logits_BV, past = problem(4)
    extremes = [
        Settings(temperature=3e38),
        Settings(temperature=1e-6),
        Settings(temperature=1e-40),
        Settings(temperature=1.0, repetition_penalty=1e6, frequency_penalty=-1e6, presence_penalty=1e6),
        Settings(temperature=1.0, repetition_penalty=1e-6, logit_bias={2: 1e30, 3: -1e30}),
        Settings(temperature=1.0, logit_bias=dict.fromkeys(range(V - 1), -math.inf)),
        Settings(temperature=1.0, top_k=10**12, logit_bias={1: -1e300}),
    ]
    for rule in extremes:
        log_p_BV = log_distribution(logits_BV, batch([rule]), past)
        assert not np.isnan(log_p_BV).any(), rule
        assert np.exp(log_p_BV).sum() == pytest.approx(1, abs=1e-5), rule


def test_what_is_compiled_is_what_some_row_needs():
    greedy = batch([Settings(), Settings(top_k=3, top_p=0.5)])
    assert (greedy.sample, greedy.truncate, greedy.penalize, greedy.bias_ids.shape) == (False, False, False, (2, 0))
    mixed = batch([Settings(temperature=1.0), Settings(presence_penalty=1.0, logit_bias={1: 1.0})])
    assert (mixed.sample, mixed.truncate, mixed.penalize, mixed.bias_ids.shape) == (True, False, True, (2, 16))
    assert batch([Settings(temperature=1.0, top_p=0.9)]).truncate
    assert batch([Settings(logit_bias=dict.fromkeys(range(17), 1.0))], 20).bias_ids.shape == (1, 64)


def test_keys_use_all_bits_of_a_seed():
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1]
    data = jax.random.key_data(row_keys(seeds))
    assert len({tuple(row) for row in data.tolist()}) == len(seeds)
    for i in (0, 1):
        np.testing.assert_array_equal(data[i], jax.random.key_data(jax.random.key(seeds[i], impl="threefry2x32")))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", -1), ("max_new_tokens", 2.5), ("max_new_tokens", True), ("max_new_tokens", "3"),
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"),
        ("temperature", 1e39), ("temperature", None), ("top_k", -1), ("top_k", 1.5), ("top_p", 0.0), ("top_p", 1.1),
        ("top_p", math.nan), ("top_p", -0.5), ("top_p", 1e-60), ("min_p", -0.1), ("min_p", 1.5), ("min_p", math.nan),
        ("repetition_penalty", 0.0), ("repetition_penalty", -1.0), ("repetition_penalty", math.inf),
        ("presence_penalty", math.nan), ("frequency_penalty", math.inf), ("frequency_penalty", -math.inf),
        ("logit_bias", {16: 1.0}), ("logit_bias", {-1: 1.0}), ("logit_bias", {0: math.nan}),
        ("logit_bias", {0: math.inf}), ("logit_bias", {"a": 1.0}), ("logit_bias", [1.0]),
        ("logit_bias", dict.fromkeys(range(V), -math.inf)),
        ("seed", -1), ("seed", 2**64), ("seed", 1.0), ("stop", [""]), ("stop", ""), ("stop", [3]), ("stop", 3),
        ("stop", ["a"] * 65), ("stop", "a" * 2000), ("logprobs", -1), ("logprobs", 17), ("logprobs", True),
    ],
)  # fmt: skip
def test_absurd_settings_are_refused_in_one_line(name, value):
    with pytest.raises(RequestError) as error:
        Settings(**{name: value}).checked(V)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_settings_take_numpy_numbers():
    s = Settings(max_new_tokens=np.int64(3), temperature=np.float32(0.5), logit_bias={np.int32(2): np.float32(1)})
    assert s.checked(V).logit_bias == {2: 1.0}
