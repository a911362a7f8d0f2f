"""Speculative decoding, greedy: token for token what plain decoding says, for every draft, length, rule and batch."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_toys import CONTEXT, noisy, random_model, scripted_model
from lora_toys import random_adapter

import realm_jax as realm
from realm_jax import lora
from realm_jax.compilation import compiled_programs
from realm_jax.decode import Settings, Stop, batch, generate, loop, speculative, stream
from realm_jax.decode.draft_models import prepare_draft, self_draft
from realm_jax.decode.prompts import Request
from realm_jax.errors import RealmError

MODEL = random_model()
CONFIG = MODEL.config
GOOD = noisy(MODEL, 0.05)  # right about half of the time
WRONG = random_model(1)
PROMPTS = ["hello", "a", "the quick brown fox jumps over the lazy dog", "abcabcabcabcab", "ab"]
DRAFTS = {
    "good": GOOD, "wrong": WRONG, "itself": MODEL, "ngram": "ngram", "q8": "self:Q8_0", "q2": "self:Q2_K",
    "half": "self:F32:1",
}  # fmt: skip
RULES = [
    {},
    {"max_new_tokens": 0},
    {"max_new_tokens": 1},
    {"max_new_tokens": 2},
    {"max_new_tokens": 3},
    {"max_new_tokens": 5},
    {"repetition_penalty": 1.5},
    {"presence_penalty": 9.0, "frequency_penalty": 4.0},
    {"logit_bias": {0: 24.0}},  # ends early
    {"logit_bias": {65: 30.0, 66: 30.0, 67: -math.inf}},
    {"frequency_penalty": -3.0},  # repeats itself
]
ROUNDING = 2e-3
"""The log-probabilities of this model span 40; plain decoding and one pass over the same tokens differ by 7e-4."""
ROWS = [{"max_new_tokens": 33, "logprobs": 2} | rule for rule in RULES]


def said(completions):
    return [(c.text, c.tokens, c.stop_reason) for c in completions]


def drain(pieces):
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def together(rows, draft=None, tokens=3, **options):
    """One batch in which every row has a prompt and rules of its own."""
    requests = []
    for i, rules in enumerate(rows):
        prompt = MODEL.tokenizer.encode(PROMPTS[i % len(PROMPTS)])
        requests.append(Request(i, prompt, Settings(**rules).checked(CONFIG.vocab_size)))
    ahead = None if draft is None else prepare_draft(MODEL, draft, tokens, **options)
    return drain(batch.run_batch(MODEL, requests, draft=ahead))


@functools.cache
def plain():
    return together(ROWS)


def check_same(got, want):
    assert said(got) == said(want)
    for one, other in zip(got, want, strict=True):
        assert [p.token for p in one.logprobs] == one.tokens
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            np.testing.assert_allclose(a.logprob, b.logprob, atol=ROUNDING)
            np.testing.assert_allclose([x[1] for x in a.top], [x[1] for x in b.top], atol=ROUNDING)


def test_the_rows_are_worth_comparing():
    reasons, lengths = [c.stop_reason for c in plain()], [len(c.tokens) for c in plain()]
    assert set(reasons) == {"eos", "length"} and lengths[1:6] == [0, 1, 2, 3, 5]
    assert any(n in range(1, 33) for n, reason in zip(lengths, reasons, strict=True) if reason == "eos")
    assert len({tuple(c.tokens) for c in plain()}) >= len(ROWS) - 1


SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("kind", ["good", "ngram", "half", SLOW("itself"), SLOW("q2"), SLOW("q8"), SLOW("wrong")])
def test_every_draft_gives_the_tokens_of_plain_decoding(kind):
    check_same(together(ROWS, DRAFTS[kind]), plain())


@pytest.mark.parametrize("tokens", [8, *map(SLOW, (1, 2, 4, 5, 6, 7, 64))])
def test_every_length_gives_the_tokens_of_plain_decoding(tokens):
    for cost in (0.0, 0.9):  # with the second, rows give speculation up on the way
        check_same(together(ROWS, GOOD, tokens, cost=cost), plain())


@pytest.mark.parametrize("kind", ["wrong", SLOW("good"), SLOW("ngram")])
def test_rows_that_adapt_or_give_up_say_the_same(kind):
    got = together(ROWS, DRAFTS[kind], 4, adaptive=True, cost=0.3)
    check_same(got, plain())
    if kind == "wrong":
        ahead = [c.stats.speculative for c in got]
        assert ahead[0].gave_up and not ahead[1].gave_up
        assert ahead[0].judged[0] < ahead[0].rounds and ahead[0].drafted < 4 * ahead[0].rounds


def test_a_draft_that_loses_is_given_up_and_the_text_stays_the_same():
    options = {"max_new_tokens": 60, "logit_bias": {0: -math.inf}}
    got = generate(MODEL, PROMPTS, draft=WRONG, draft_tokens=3, **options)
    assert said(got) == said(generate(MODEL, PROMPTS, **options))
    for c in got:
        ahead = c.stats.speculative
        assert ahead.gave_up and ahead.judged[0] < ahead.rounds and sum(ahead.histogram) == ahead.rounds
    right = generate(MODEL, PROMPTS, draft=MODEL, draft_tokens=3, **options)
    assert said(right) == said(got)
    assert all(c.stats.speculative.rounds == 15 and not c.stats.speculative.gave_up for c in right)


SNOW = "☃".encode()
STORY = ["<", "once", " up", "on", SNOW[:2], SNOW[2:], " a t", "ime", "\n", "\nthe", " end", "."]


@pytest.mark.parametrize("draft", ["itself", SLOW("ngram")])
@pytest.mark.parametrize("stop", [(), SLOW("\n\n"), SLOW("upon"), "☃ a", SLOW(["time", "a time"]), SLOW("end.")])
def test_nothing_leaks_from_behind_an_end_inside_an_accepted_run(stop, draft):
    """The draft is always right, about what comes after the end too."""
    model = scripted_model(STORY)
    options = {"stop": stop, "max_new_tokens": 40, "logprobs": 1}
    want = generate(model, [[0], [4], [11]], **options)
    options |= {"draft": model if draft == "itself" else draft, "draft_tokens": 6}
    check_same(generate(model, [[0], [4], [11]], **options), want)
    pieces = stream(model, [0], **options)
    assert "".join(pieces) == want[0].text
    check_same([pieces.completion], want[:1])


@pytest.mark.parametrize("draft", [SLOW(MODEL), SLOW(GOOD), "ngram"], ids=["itself", "good", "ngram"])
def test_the_context_and_the_buffer_may_be_filled_to_the_last_place(draft):
    prompts = [[5 + i % 7 for i in range(CONTEXT - n)] for n in (1, 2, 3, 20)]
    options = {"max_new_tokens": 100, "logit_bias": {0: -math.inf}, "draft_tokens": 8}
    got = generate(MODEL, prompts, draft=draft, **options)
    assert said(got) == said(generate(MODEL, prompts, **options | {"draft_tokens": 4}))
    assert [len(c.tokens) for c in got] == [1, 2, 3, 20]


@pytest.mark.parametrize("draft", [GOOD, SLOW("ngram")], ids=["good", "ngram"])
def test_a_rows_tokens_do_not_depend_on_its_neighbours(draft):
    """Sampled rows of one batch, alone, in another order and in a stream: the seed of a row decides."""
    options = {"temperature": 1.2, "top_k": 40, "presence_penalty": 0.5, "max_new_tokens": 20, "draft_tokens": 3}
    batched = generate(MODEL, PROMPTS, seed=7, draft=draft, **options)
    for i, prompt in enumerate(PROMPTS):
        assert said(generate(MODEL, prompt, seed=7 + i, draft=draft, **options)) == said(batched[i : i + 1])
        pieces = stream(MODEL, prompt, seed=7 + i, draft=draft, **options)
        assert "".join(pieces) == batched[i].text and said([pieces.completion]) == said(batched[i : i + 1])
    assert len({tuple(c.tokens) for c in batched}) == 5


def test_adapters_on_the_target_and_on_the_draft():
    adapter, other = random_adapter(MODEL, 1, size=0.1), random_adapter(MODEL, 2, size=0.1)
    want = generate(MODEL, PROMPTS, adapter=adapter, max_new_tokens=20)
    assert said(want) != said(generate(MODEL, PROMPTS, max_new_tokens=20))
    options = {"max_new_tokens": 20, "draft_tokens": 3}
    assert said(generate(MODEL, PROMPTS, adapter=adapter, draft=MODEL, **options)) == said(want)
    both = generate(MODEL, PROMPTS, adapter=adapter, draft=MODEL, draft_adapter=adapter, **options)
    assert said(both) == said(want)
    assert all(c.stats.speculative.accepted == c.stats.speculative.drafted for c in both if c.stop_reason == "length")
    stack, index = lora.stack([adapter, other], MODEL), [0, 1, 2, 1, 0]
    want = generate(MODEL, PROMPTS, adapter=stack, adapter_index=index, **options)
    assert said(generate(MODEL, PROMPTS, adapter=stack, adapter_index=index, draft=GOOD, **options)) == said(want)


def start(draft, prompts, settings=None, size=64, tokens=3, params=MODEL.params, eog=(0,), **options):
    """A state that is prefilled, on both sides, and its draft."""
    prompts = [MODEL.tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
    settings = [s.checked(CONFIG.vocab_size) for s in settings or [Settings(max_new_tokens=12)] * len(prompts)]
    state = loop.init_state(CONFIG, prompts, settings, eog, size=size)
    made = prepare_draft(MODEL, draft, tokens, **options).draft
    state = speculative.begin(loop.prefill(params, CONFIG, state, 64), made)
    return speculative.prefill_draft(made, state, 64), made


def check_cache(model, cache, tokens_BS, running):
    """What counts of a cache is what a fresh run over the row's tokens puts there."""
    fresh = realm.model.KVCache.create(model.config, *tokens_BS.shape)
    fresh = realm.model.run(model.params, model.config, tokens_BS, fresh)[1]
    for b in np.flatnonzero(running):
        n = int(cache.length_B[b])
        np.testing.assert_allclose(cache.k[:, b, :n], fresh.k[:, b, :n], atol=2e-4)
        np.testing.assert_allclose(cache.v[:, b, :n], fresh.v[:, b, :n], atol=2e-4)


@pytest.mark.parametrize("adaptive", [True, SLOW(False)])
def test_after_every_round_both_caches_hold_the_rows_tokens(adaptive):
    settings = [Settings(max_new_tokens=n, temperature=t) for n, t in ((30, 0), (4, 0), (17, 1.0), (30, 0.7), (1, 0))]
    state, draft = start(GOOD, PROMPTS, settings, adaptive=adaptive, cost=0.2)
    lags, rounds = set(), 0
    while np.any(state.decode.ready_B):
        state = speculative.decode(MODEL.params, CONFIG, draft, state, 1)
        rows, rounds = state.decode, rounds + 1
        running = np.asarray(rows.stop_B) == Stop.RUNNING
        np.testing.assert_array_equal(rows.cache.length_B, rows.length_B - 1)
        assert np.all(rows.length_B <= rows.limit_B)
        lag_B = np.asarray(rows.length_B - state.cache.length_B)[running & (np.asarray(state.propose_B) > 0)]
        lags |= set(lag_B.tolist())
        check_cache(MODEL, rows.cache, rows.tokens_BS, running)
        check_cache(GOOD, state.cache, rows.tokens_BS, running)
    assert lags == {1, 2} and rounds > 5
    assert np.asarray(state.tally.rounds_B).max() == rounds


def test_a_row_that_is_done_keeps_everything_it_had():
    settings = [Settings(max_new_tokens=n, logprobs=2) for n in (2, 25, 25, 5)]
    state, draft = start(GOOD, PROMPTS[:4], settings)
    state = speculative.decode(MODEL.params, CONFIG, draft, state, 5)
    before = jax.device_get(state.decode.replace(keys_B=None))
    after = speculative.decode(MODEL.params, CONFIG, draft, state, 100)
    after = jax.device_get(after.decode.replace(keys_B=None))
    for b in (0, 3):
        assert before.stop_B[b] == Stop.LENGTH
        for was, now in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            if was.shape[:1] == (4,) and was.ndim < 5:
                np.testing.assert_array_equal(was[b], now[b])
        end = before.cache.length_B[b]
        np.testing.assert_array_equal(before.cache.k[:, b, :end], after.cache.k[:, b, :end])


@pytest.mark.parametrize("draft", [GOOD, SLOW("ngram")], ids=["good", "ngram"])
def test_the_caches_are_updated_in_place(draft):
    state, made = start(draft, PROMPTS, size=2048)
    caches = sum(2 * c.k.nbytes for c in (state.decode.cache, state.cache) if c is not None)
    memory = speculative.decode.lower(MODEL.params, CONFIG, made, state, 10).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= caches
    assert memory.temp_size_in_bytes < 2 * state.decode.cache.k.nbytes


@pytest.mark.parametrize("draft", [GOOD, SLOW("ngram")], ids=["good", "ngram"])
def test_nothing_is_compiled_again_and_the_device_is_asked_once(draft, monkeypatch):
    rng, calls = np.random.default_rng(2), []

    def go(seed):
        prompts = [rng.integers(1, 128, rng.integers(2, 17)).tolist() for _ in range(rng.integers(3, 5))]
        options = {"temperature": float(rng.uniform(0.1, 2)), "top_k": int(rng.integers(1, 90)), "seed": seed}
        return generate(MODEL, prompts, max_new_tokens=int(rng.integers(1, 40)), draft=draft, **options)[0]

    go(0)
    go(1)
    compiled = compiled_programs()
    real = speculative.decode
    monkeypatch.setattr(speculative, "decode", lambda *args: calls.append(args[4]) or real(*args))
    for seed in range(2, 7):
        assert go(seed).stats.compile_seconds == 0
    assert compiled_programs() == compiled
    assert calls == [batch.UNBOUNDED] * 5
    calls.clear()
    generate(MODEL, PROMPTS, max_new_tokens=40, stop=["\x01\x02\x03"], draft=draft, draft_tokens=1)
    assert set(calls) == {batch.STRETCH}


def test_logits_that_are_not_finite_end_their_row_alone():
    broken = MODEL.params.replace(embedding=MODEL.params.embedding.at[77].set(jnp.nan), output=MODEL.params.embedding)
    prompts = [MODEL.tokenizer.encode("hello"), [3, 77, 4], MODEL.tokenizer.encode("abcab"), [7]]
    state, made = start(GOOD, prompts, params=broken)
    state = speculative.decode(broken, CONFIG, made, state, 100).decode
    assert np.flatnonzero(np.asarray(state.stop_B) == Stop.FAILED).tolist() == [1]
    assert int(state.length_B[1]) == 3
    whole = generate(MODEL, prompts, max_new_tokens=12)
    for b in (0, 2, 3):
        n = len(prompts[b])
        assert state.tokens_BS[b, n : int(state.length_B[b])].tolist() == whole[b].tokens
    with pytest.raises(RealmError, match="prompt 1, after 3 tokens: the model's logits are not finite") as error:
        generate(MODEL.replace(params=broken), prompts, draft=GOOD, draft_tokens=3, max_new_tokens=12)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_that_is_not_finite_changes_nothing(temperature):
    """Whatever such a draft proposes is rejected, and the replacement drawn from the target's own distribution."""
    broken = MODEL.replace(params=MODEL.params.replace(norm=MODEL.params.norm.at[3].set(jnp.nan)))
    options = {"max_new_tokens": 12, "temperature": temperature}
    assert said(generate(MODEL, PROMPTS, draft=broken, **options)) == said(generate(MODEL, PROMPTS, **options))


def small_context():
    return GOOD.replace(config=dataclasses.replace(CONFIG, context_length=32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_tokens": 0}, "draft_tokens is 0; it must be a whole number from 1 to 64"),
        ({"draft_tokens": -1}, "draft_tokens is -1"),
        ({"draft_tokens": 65}, "draft_tokens is 65"),
        ({"draft_tokens": True}, "draft_tokens is True"),
        ({"draft_tokens": 2.5}, "draft_tokens is 2.5"),
        ({"draft_tokens": "4"}, "draft_tokens is '4'"),
        ({"draft": scripted_model("abc")}, "the draft has 4 tokens and the model 128"),
        ({"draft": "no/such.gguf"}, "draft 'no/such.gguf' is no file"),
        ({"draft": "tests"}, "is a folder"),
        ({"draft": 3}, "draft is of type int"),
        ({"draft": "self:Q9_Z"}, "Q9_Z"),
        ({"draft": "self:"}, "self:"),
        ({"draft": "self:Q8_0:0"}, "want self:FORMAT or self:FORMAT:LAYERS with 1 to 2 layers"),
        ({"draft": "self:Q8_0:3"}, "with 1 to 2 layers"),
        ({"draft": "self:Q8_0:1:1"}, "with 1 to 2 layers"),
        ({"draft": "self:Q8_0:x"}, "with 1 to 2 layers"),
        ({"draft": "self"}, "draft 'self' is no file"),
        ({"draft": None, "draft_adapter": random_adapter(MODEL)}, "draft_adapter is for a draft, and none was given"),
        ({"draft": "ngram", "draft_adapter": random_adapter(MODEL)}, "n-grams has no weights for an adapter"),
        ({"draft_adapter": 3}, "adapter is of type int"),
        ({"draft": small_context(), "max_new_tokens": 60}, "65 tokens; the draft toy is made for 32"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, message):
    for call in (generate, stream):
        with pytest.raises(RealmError) as error:
            call(MODEL, "hello", **{"draft": GOOD} | options)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_a_vocabulary_that_differs_in_one_token_is_refused(make_model_file, byte_vocabulary):
    other = dict(byte_vocabulary)
    tokens = other["tokenizer.ggml.tokens"]
    changed = [tokens.value[0], "<end>", *tokens.value[2:]]
    other["tokenizer.ggml.tokens"] = dataclasses.replace(tokens, value=changed)
    model = realm.load(make_model_file("target.gguf"))
    with pytest.raises(RealmError) as error:
        generate(model, "hello", draft=make_model_file("other.gguf", vocabulary=other))
    assert str(error.value).startswith("token 1 is '<end>' in the draft and '</s>' in the model")


def test_layers_left_out_are_spread_evenly():
    config = dataclasses.replace(CONFIG, layers=5)
    model = MODEL.replace(config=config, params=realm.model.init_params(config, jax.random.key(0)))
    norms = [layer.attn.norm for layer in model.params.layers]
    for count, want in ((1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4])):
        draft = self_draft(model, "F32", count)
        assert draft.config.layers == count
        kept = [next(i for i, norm in enumerate(norms) if norm is layer.attn.norm) for layer in draft.params.layers]
        assert kept == want


@pytest.mark.slow
def test_the_bundled_pair_says_what_its_model_says_alone():
    model, draft = realm.load(realm.model.bundled()), realm.load(realm.model.bundled("tiny-draft.gguf"))
    options = {"max_new_tokens": 40, "stop": "\n\n\n"}
    want = generate(model, "Once upon a time", **options)
    got = generate(model, "Once upon a time", draft=draft, **options)
    assert said(got) == said(want)
    ahead = got[0].stats.speculative
    assert ahead.forwards_saved == ahead.tokens - ahead.rounds > 10 and ahead.draft.endswith("tiny-draft.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["ngram", "self:Q2_K", "self:Q4_0:2"])
def test_the_bundled_model_drafts_for_itself(draft):
    model = realm.load(realm.model.bundled())
    prompts, options = ["Once upon a time", "The dog"], {"max_new_tokens": 40}
    assert said(generate(model, prompts, draft=draft, **options)) == said(generate(model, prompts, **options))
