"""The loop on the device: rows alone and together, stretches, buffers reused in place, nothing compiled twice."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_toys import random_model, scripted_model

from realm_jax.compilation import compiled_programs
from realm_jax.decode import Settings, Stop, buckets, loop
from realm_jax.model import run, unembed

MODEL = random_model()
PARAMS, CONFIG = MODEL.params, MODEL.config
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(1, 128, n).tolist() for n in (9, 1, 30, 17)]


def start(prompts=PROMPTS, settings=None, eog=(), **kw):
    settings = settings or [Settings(max_new_tokens=12)] * len(prompts)
    settings = [s.checked(CONFIG.vocab_size) for s in settings]
    return loop.init_state(CONFIG, prompts, settings, eog, size=kw.pop("size", 64), **kw)


def fill(state, chunks=(16, 16), params=PARAMS):
    for chunk in chunks:
        state = loop.prefill(params, CONFIG, state, chunk)
    return state


def generated(state):
    rows = zip(*jax.device_get((state.tokens_BS, state.prompt_length_B, state.length_B)), strict=True)
    return [tokens[first:end].tolist() for tokens, first, end in rows]


@jax.jit
def all_logits(tokens_S):
    """(S, V), without a cache."""
    return unembed(PARAMS, CONFIG, run(PARAMS, CONFIG, tokens_S[None])[0][0])


@functools.cache
def greedy(prompt, n):
    """Tokens by the definition: run everything again for each, no cache, no batch."""
    tokens = list(prompt)
    for _ in range(n):
        padded_S = jnp.array(tokens + [0] * (64 - len(tokens)))
        tokens.append(int(jnp.argmax(all_logits(padded_S)[len(tokens) - 1])))
    return tokens[len(prompt) :]


def test_a_ragged_batch_gives_what_each_row_gives_by_definition():
    state = loop.decode(PARAMS, CONFIG, fill(start()), 100)
    assert generated(state) == [greedy(tuple(prompt), 12) for prompt in PROMPTS]
    assert state.stop_B.tolist() == [Stop.LENGTH] * 4
    np.testing.assert_array_equal(state.cache.length_B, state.length_B - 1)


@pytest.mark.parametrize("chunks", [(64,), (32,), (16, 16), (16, 32), (16, 16, 16, 16)])
def test_prefill_may_be_cut_into_any_chunks(chunks):
    state = loop.decode(PARAMS, CONFIG, fill(start(), chunks), 100)
    assert generated(state) == [greedy(tuple(prompt), 12) for prompt in PROMPTS]


def test_rows_that_are_not_prefilled_wait():
    """Decoding between two chunks of a long prompt moves the short rows only, and changes nothing for the long one."""
    state = fill(start(), [16])
    state = loop.decode(PARAMS, CONFIG, state, 5)
    assert [len(tokens) for tokens in generated(state)] == [5, 5, 0, 5]
    state = loop.decode(PARAMS, CONFIG, fill(state, [16]), 100)
    assert generated(state) == [greedy(tuple(prompt), 12) for prompt in PROMPTS]


SAMPLED = [
    Settings(max_new_tokens=12, temperature=1.2, seed=2**40),
    Settings(max_new_tokens=7, temperature=0.9, top_k=20, top_p=0.9, seed=1),
    Settings(max_new_tokens=12, repetition_penalty=1.3, logit_bias={5: 2.0}),
    Settings(max_new_tokens=3, temperature=1.0, min_p=0.05, frequency_penalty=0.5, seed=3),
]


def test_stretches_of_any_length_give_the_same_tokens():
    whole = generated(loop.decode(PARAMS, CONFIG, fill(start(settings=SAMPLED)), 100))
    state = fill(start(settings=SAMPLED))
    for steps in itertools.cycle((1, 3, 2)):
        state = loop.decode(PARAMS, CONFIG, state, steps)
        if not np.any(state.ready_B):
            break
    assert generated(state) == whole
    assert [len(tokens) for tokens in whole] == [12, 7, 12, 3]


def test_a_rows_tokens_do_not_depend_on_its_neighbours_place_or_padding():
    whole = generated(loop.decode(PARAMS, CONFIG, fill(start(settings=SAMPLED)), 100))
    for b, (prompt, settings) in enumerate(zip(PROMPTS, SAMPLED, strict=True)):
        alone = loop.decode(PARAMS, CONFIG, fill(start([prompt], [settings], size=128)), 100)
        assert generated(alone) == [whole[b]]
    order = [2, 3, 0, 1]
    moved = start([PROMPTS[b] for b in order], [SAMPLED[b] for b in order], rows=8)
    moved = loop.decode(PARAMS, CONFIG, fill(moved), 100)
    assert generated(moved)[:4] == [whole[b] for b in order]
    assert moved.stop_B.tolist()[4:] == [Stop.EMPTY] * 4 and generated(moved)[4:] == [[]] * 4


def test_an_end_of_generation_token_ends_its_row_and_is_not_kept():
    model = scripted_model("abcdef")  # token 6 ends
    settings = [Settings(max_new_tokens=n).checked(7) for n in (50, 50, 2)]
    state = loop.init_state(model.config, [[0], [4], [0, 1]], settings, model.tokenizer.eog_ids, size=64)
    state = loop.prefill(model.params, model.config, state, 16)
    state = loop.decode(model.params, model.config, state, 1000)
    assert generated(state) == [[1, 2, 3, 4, 5], [5], [2, 3]]
    assert state.stop_B.tolist() == [Stop.EOS, Stop.EOS, Stop.LENGTH]


def test_a_row_that_is_done_keeps_everything_it_had():
    settings = [Settings(max_new_tokens=n, logprobs=2) for n in (2, 12, 12, 5)]
    state = loop.decode(PARAMS, CONFIG, fill(start(settings=settings)), 5)
    before = jax.device_get(state.replace(keys_B=None))
    after = jax.device_get(loop.decode(PARAMS, CONFIG, state, 100).replace(keys_B=None))
    for b in (0, 3):
        for was, now in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            if was.shape[:1] == (4,) and was.ndim < 5:
                np.testing.assert_array_equal(was[b], now[b])
        end = before.cache.length_B[b]
        np.testing.assert_array_equal(before.cache.k[:, b, :end], after.cache.k[:, b, :end])
        np.testing.assert_array_equal(before.cache.v[:, b, :end], after.cache.v[:, b, :end])


def test_a_row_may_fill_its_buffers_to_the_last_place():
    """Row 0 ends at S and then takes part as padding; nothing wraps around or overwrites."""
    prompts, settings = [PROMPTS[2] * 2, PROMPTS[0]], [Settings(max_new_tokens=4), Settings(max_new_tokens=30)]
    state = loop.decode(PARAMS, CONFIG, fill(start(prompts, settings), [64]), 1000)
    alone = loop.decode(PARAMS, CONFIG, fill(start(prompts[:1], settings[:1], size=128), [64]), 1000)
    assert state.length_B.tolist() == [64, 39]
    assert generated(state) == [*generated(alone), greedy(tuple(PROMPTS[0]), 30)]


def test_no_budget_means_no_step():
    state = loop.decode(PARAMS, CONFIG, start(settings=[Settings(max_new_tokens=0)] * 4), 100)
    assert state.stop_B.tolist() == [Stop.LENGTH] * 4 and state.cache.length_B.tolist() == [0] * 4


def test_logits_that_are_not_finite_end_their_row_alone():
    broken = PARAMS.replace(embedding=PARAMS.embedding.at[77].set(jnp.nan))
    # tied embedding: a NaN row makes logit 77 NaN everywhere, so give the model its own output
    broken = broken.replace(output=PARAMS.embedding)
    prompts = [PROMPTS[0], [3, 77, 4], PROMPTS[3]]
    settings = [Settings(max_new_tokens=5)] * 3
    state = loop.decode(broken, CONFIG, fill(start(prompts, settings), [32], broken), 100)
    whole = loop.decode(PARAMS, CONFIG, fill(start(prompts, settings), [32]), 100)
    assert state.stop_B.tolist()[1] == Stop.FAILED and generated(state)[1] == []
    assert 77 not in generated(whole)[0] + generated(whole)[2]
    assert [generated(state)[b] for b in (0, 2)] == [generated(whole)[b] for b in (0, 2)]


def test_penalties_see_what_was_generated():
    """With a large presence penalty no token comes twice; with a repetition penalty none of the prompt either."""
    settings = [Settings(max_new_tokens=30, presence_penalty=1e5), Settings(max_new_tokens=20, repetition_penalty=1e6)]
    state = loop.decode(PARAMS, CONFIG, fill(start([PROMPTS[0]] * 2, settings)), 100)
    first, second = generated(state)
    assert len(set(first)) == 30
    assert len(set(second)) == 20 and not set(second) & set(PROMPTS[0])


def test_logprobs_are_those_of_the_uncached_model():
    settings = [Settings(max_new_tokens=6, temperature=1.5, top_k=5, logprobs=3, seed=b) for b in range(4)]
    state = loop.decode(PARAMS, CONFIG, fill(start(settings=settings)), 100)
    for b, prompt in enumerate(PROMPTS):
        n = len(prompt)
        tokens_T = np.asarray(state.tokens_BS[b])[: n + 6]
        want_TV = np.asarray(jax.nn.log_softmax(all_logits(state.tokens_BS[b])))[n - 1 : n + 5]
        np.testing.assert_allclose(state.logprobs.chosen_BS[b, n : n + 6], want_TV[range(6), tokens_T[n:]], atol=1e-4)
        np.testing.assert_allclose(state.logprobs.top_BSN[b, n : n + 6], -np.sort(-want_TV)[:, :3], atol=1e-4)
        np.testing.assert_array_equal(state.logprobs.top_ids_BSN[b, n : n + 6], np.argsort(-want_TV)[:, :3])


def test_nothing_is_compiled_again_within_a_bucket():
    """Prompts, lengths, seeds, temperatures, penalties, budgets, stretches and mixes of rows are data, not code."""
    rng = np.random.default_rng(1)

    def go(seed):
        prompts = [rng.integers(1, 128, rng.integers(1, 33)).tolist() for _ in range(4)]
        settings = [
            Settings(
                max_new_tokens=int(rng.integers(0, 20)), temperature=float(rng.choice([0.0, 0.5, 2.0])),
                top_k=int(rng.integers(0, 50)), top_p=float(rng.uniform(0.1, 1)), min_p=float(rng.uniform(0, 0.2)),
                repetition_penalty=float(rng.uniform(0.5, 2)), seed=seed + b,
                logit_bias={int(t): 1.0 for t in rng.integers(0, 128, rng.integers(0, 16))},
            )
            for b in range(3)
        ]  # fmt: skip
        always = Settings(temperature=1.0, top_k=3, presence_penalty=1.0, logit_bias={1: 1.0})
        state = fill(start(prompts, [*settings, always], eog=[0], rows=4), [32])
        jax.block_until_ready(loop.decode(PARAMS, CONFIG, state, int(rng.integers(1, 50))))

    go(0)
    compiled = compiled_programs()
    for seed in range(1, 8):
        go(seed)
    assert compiled_programs() == compiled


def test_the_cache_is_updated_in_place():
    """The loop's output reuses the input's memory, and its scratch memory is far smaller than the cache."""
    for size in (256, 2048):
        lowered = loop.decode.lower(PARAMS, CONFIG, start(size=size), 10)
        memory = lowered.compile().memory_analysis()
        cache = start(size=size).cache.k.nbytes * 2
        assert memory.alias_size_in_bytes >= cache
        assert memory.temp_size_in_bytes < cache


def test_donated_states_are_gone():
    state = fill(start())
    loop.decode(PARAMS, CONFIG, state, 1)
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(state.tokens_BS)


def test_buckets_are_few_and_large_enough():
    assert [buckets.power_of_two(n) for n in (0, 1, 2, 3, 5, 32)] == [1, 1, 2, 4, 8, 32]
    assert buckets.prefill_chunks(0) == [] and buckets.prefill_chunks(1) == [16]
    assert buckets.prefill_chunks(513) == [512, 16] and buckets.prefill_chunks(1500) == [512, 512, 512]
    assert buckets.prefill_chunks(130, 64) == [64, 64, 16] and buckets.prefill_chunks(20, 4096) == [16, 16]
    for tokens in [*range(1, 3000), 8191, 8192, 100_000]:
        size = buckets.cache_bucket(tokens)
        assert size >= tokens
        for rows in (1, 16, 1024):
            assert tokens - 1 <= sum(buckets.prefill_chunks(tokens - 1, rows)) <= size
    assert len({buckets.cache_bucket(n) for n in range(1, 8193)}) == 9
    assert len({chunk for n in range(8192) for chunk in buckets.prefill_chunks(n)}) == 6
