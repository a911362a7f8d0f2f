"""`generate` and `stream`: prompts in, completions out, and every way to ask for something impossible."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from decode_toys import CONTEXT, random_model, scripted_model

import realm_jax as realm
from realm_jax.compilation import compiled_programs
from realm_jax.decode import batch, generate, stream
from realm_jax.errors import RealmError, RequestError

MODEL = random_model()
NO_TOKENIZER = random_model(tokenizer=False)
PROMPTS = ["hello", "a", "the quick brown fox jumps over the lazy dog"]
SAMPLED = {"temperature": 1.3, "top_k": 50, "top_p": 0.95, "max_new_tokens": 24}


def said(completions):
    return [(c.text, c.tokens, c.stop_reason) for c in completions]


def test_the_public_names():
    assert realm.generate is generate and realm.stream is stream


def test_a_completion_says_what_happened():
    (c,) = generate(MODEL, "hello", max_new_tokens=9, logit_bias={0: -math.inf})
    assert c.prompt_tokens == 5 and len(c.tokens) == 9 and c.logprobs is None
    assert c.text == MODEL.tokenizer.decode(c.tokens)
    assert c.stop_reason == "length" and c.stats.rows == 1
    assert c.stats.device and c.stats.matmul == "reference"
    assert c.stats.decode_seconds > 0 and c.stats.tokens_per_second == 9 / c.stats.decode_seconds
    assert json.loads(json.dumps(dataclasses.asdict(c)))["stats"]["rows"] == 1


@pytest.mark.parametrize("options", [{"max_new_tokens": 24}, SAMPLED, {**SAMPLED, "stop": ["e", "ab"]}])
def test_a_list_of_prompts_gives_what_each_gives_alone(options):
    """Prompt i of a list has seed s + i; batches of any size change nothing."""
    together = said(generate(MODEL, PROMPTS, seed=7, **options))
    assert together == [said(generate(MODEL, p, seed=7 + i, **options))[0] for i, p in enumerate(PROMPTS)]
    assert together == said(generate(MODEL, PROMPTS, seed=7, batch_size=2, **options))


def test_the_seed_decides_and_nothing_else():
    assert said(generate(MODEL, "hello", seed=3, **SAMPLED)) == said(generate(MODEL, "hello", seed=3, **SAMPLED))
    assert len({generate(MODEL, "hello", seed=s, **SAMPLED)[0].text for s in (0, 1, 2, 2**32, 2**64 - 1)}) == 5
    last, first = generate(MODEL, ["hello", "hello"], seed=2**64 - 1, **SAMPLED)
    assert first.tokens == generate(MODEL, "hello", seed=0, **SAMPLED)[0].tokens != last.tokens


def test_prompts_may_be_texts_or_ids():
    ids = MODEL.tokenizer.encode("hello")
    want = said(generate(MODEL, "hello", max_new_tokens=5))
    assert said(generate(MODEL, ids, max_new_tokens=5)) == want
    assert said(generate(MODEL, np.array(ids), max_new_tokens=5)) == want
    assert said(generate(MODEL, np.array([ids, ids]), max_new_tokens=5)) == want * 2
    assert said(generate(MODEL, ("hello", ids), max_new_tokens=5)) == want * 2
    assert generate(MODEL, [], max_new_tokens=5) == []


def test_without_a_tokenizer_ids_give_ids():
    ids = MODEL.tokenizer.encode("hello")
    (c,) = generate(NO_TOKENIZER, ids, max_new_tokens=5)
    assert c.text == "" and len(c.tokens) == 5


def test_ends():
    model = scripted_model(["a", "b", "c", "d"])
    assert said(generate(model, "a")) == [("bcd", [1, 2, 3], "eos")]
    assert said(generate(model, "d")) == [("", [], "eos")]
    assert said(generate(model, "a", max_new_tokens=3)) == [("bcd", [1, 2, 3], "length")]
    assert said(generate(model, "a", max_new_tokens=2)) == [("bc", [1, 2], "length")]
    assert said(generate(model, "a", max_new_tokens=0)) == [("", [], "length")]
    assert said(generate(model, "a", stop="d")) == [("bc", [1, 2], "stop")]
    assert said(generate(model, "a", stop=["cd", "x"])) == [("b", [1], "stop")]
    assert said(generate(model, "a", stop="b", max_new_tokens=1)) == [("", [], "stop")]
    assert said(generate(model, "a", stop="abc")) == [("bcd", [1, 2, 3], "eos")]  # the prompt is not looked at
    assert said(generate(model, "a", logit_bias={4: -math.inf}, max_new_tokens=4))[0][2] == "length"


SNOW = "☃".encode()
STORY = ["<", "once", " up", "on", SNOW[:2], SNOW[2:], " a t", "ime", "\n", "\nthe", " end", "."]


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        ((), "once upon☃ a time\n\nthe end.", range(1, 12)),
        ("\n\n", "once upon☃ a time", range(1, 8)),
        ("upon", "once ", [1, 2]),
        ("☃ a", "once upon", [1, 2, 3]),
        (["time", "a time"], "once upon☃ ", range(1, 7)),
        ("end.", "once upon☃ a time\n\nthe ", range(1, 11)),
        ("ende", "once upon☃ a time\n\nthe end.", range(1, 12)),
    ],
)
def test_stop_strings_cut_at_the_character_in_lists_and_streams(stop, text, tokens):
    model = scripted_model(STORY)
    reason = "stop" if text[-1] != "." else "eos"
    want = (text, list(tokens), reason)
    assert said(generate(model, "<", stop=stop)) == [want]
    pieces = stream(model, "<", stop=stop)
    shown = list(pieces)
    assert "".join(shown) == text and all(shown) and "\ufffd" not in text
    assert said([pieces.completion]) == [want]


def test_only_the_row_that_stops_is_cut(monkeypatch):
    monkeypatch.setattr(batch, "STRETCH", 4)
    model = scripted_model(STORY)
    got = generate(model, [[0], [4], [7]], stop="☃", max_new_tokens=9)
    assert said(got) == [
        ("once upon", [1, 2, 3], "stop"),
        ("\ufffd a time\n\nthe end.", [5, 6, 7, 8, 9, 10, 11], "eos"),
        ("\n\nthe end.", [8, 9, 10, 11], "eos"),
    ]


def test_streamed_text_is_that_of_generate_piece_by_piece():
    (want,) = generate(MODEL, "hello", seed=5, **SAMPLED)
    pieces = stream(MODEL, "hello", seed=5, **SAMPLED)
    assert pieces.completion is None
    shown = [next(pieces)]
    assert pieces.completion is None
    shown += pieces
    assert "".join(shown) == want.text and len(shown) > 1
    assert said([pieces.completion]) == said([want])
    assert next(pieces, None) is None


def test_on_text_gets_every_prompts_pieces():
    texts = {}

    def add(index, piece):
        texts[index] = texts.get(index, "") + piece

    completions = generate(MODEL, PROMPTS, on_text=add, batch_size=2, **SAMPLED)
    assert [texts[i] for i in range(3)] == [c.text for c in completions]


def test_an_error_of_the_callback_comes_through():
    def fail(index, piece):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(MODEL, "hello", on_text=fail)


def test_a_stream_may_be_left():
    pieces = stream(MODEL, "hello", **SAMPLED)
    next(pieces)
    del pieces
    assert generate(MODEL, "hello", **SAMPLED)


def test_logprobs_belong_to_the_tokens():
    (greedy,) = generate(MODEL, "hello", max_new_tokens=6, logprobs=3)
    assert [p.token for p in greedy.logprobs] == greedy.tokens
    assert all(p.top[0] == (p.token, p.logprob) and len(p.top) == 3 for p in greedy.logprobs)
    (cut,) = generate(MODEL, "hello", max_new_tokens=6, logprobs=1, stop=greedy.text[2])
    assert len(cut.logprobs) == len(cut.tokens) <= 2
    # the model's own distribution: rules of sampling do not change what is reported for the same token
    (biased,) = generate(MODEL, "hello", max_new_tokens=1, logprobs=3, logit_bias={7: 1e9})
    assert biased.tokens == [7] and biased.logprobs[0].top == greedy.logprobs[0].top
    assert biased.logprobs[0].logprob < greedy.logprobs[0].logprob


def test_the_context_cuts_the_budget():
    prompt = [5] * (CONTEXT - 3)
    (c,) = generate(MODEL, prompt, max_new_tokens=100, logit_bias={0: -math.inf})
    assert (len(c.tokens), c.stop_reason) == (3, "length")
    (c,) = generate(MODEL, [5] * (CONTEXT - 1), max_new_tokens=100, logit_bias={0: -math.inf})
    assert len(c.tokens) == 1


def test_long_prompts_are_prefilled_in_chunks(monkeypatch):
    monkeypatch.setattr("realm_jax.decode.buckets.LARGEST_CHUNK", 16)
    prompt = np.random.default_rng(0).integers(1, 128, 150).tolist()
    chunked = generate(MODEL, [prompt, prompt[:20]], max_new_tokens=5)
    monkeypatch.undo()
    assert said(chunked) == said(generate(MODEL, [prompt, prompt[:20]], max_new_tokens=5))


def test_broken_weights_are_an_error_not_a_text():
    params = MODEL.params.replace(norm=MODEL.params.norm.at[3].set(np.inf))
    with pytest.raises(RealmError, match="prompt 0, after 5 tokens: the model's logits are not finite"):
        generate(MODEL.replace(params=params), "hello")


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("", {}, "prompt 0 has no tokens"),
        (["a", ""], {}, "prompt 1 has no tokens"),
        (["a", []], {}, "prompt 1 has no tokens"),
        ([[1, 128]], {}, "prompt 0 has 128 at place 1; token ids go from 0 to 127"),
        ([["a"], [-1]], {}, "prompt 0 has 'a' at place 0"),
        ([[-1]], {}, "prompt 0 has -1"),
        ([[1.5]], {}, "prompt 0 has 1.5"),
        ([[True]], {}, "prompt 0 has True"),
        ([3, 200], {}, "prompt 0 has 200"),
        (3, {}, "prompts is of type int"),
        (None, {}, "prompts is of type NoneType"),
        (["a", None], {}, "prompt 1 is of type NoneType"),
        ({"a": 1}, {}, "prompts is of type dict"),
        ([[1] * 300], {}, "prompt 0 has 300 tokens; at most 255 fit in the model's context of 256"),
        ([[1] * 256], {}, "prompt 0 has 256 tokens; at most 255"),
        ([[1] * 257], {"max_new_tokens": 0}, "prompt 0 has 257 tokens; at most 256"),
        ("a", {"max_new_tokens": -1}, "max_new_tokens is -1"),
        ("a", {"temperature": math.nan}, "temperature is nan"),
        ("a", {"stop": [""]}, "stop"),
        ("a", {"batch_size": 0}, "batch_size is 0"),
        ([], {"top_p": 2.0}, "top_p is 2.0"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(prompts, options, message):
    with pytest.raises(RequestError) as error:
        generate(MODEL, prompts, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_text_needs_a_tokenizer():
    for prompt, options in (("hello", {}), ([1, 2], {"stop": "a"})):
        with pytest.raises(RequestError, match=r"no tokenizer|has none"):
            generate(NO_TOKENIZER, prompt, **options)


def test_errors_of_stream_come_at_the_call():
    with pytest.raises(RequestError, match="top_k is -1"):
        stream(MODEL, "a", top_k=-1)
    with pytest.raises(TypeError, match="topk"):
        stream(MODEL, "a", topk=1)


def test_a_full_context_without_budget_is_no_error():
    assert generate(MODEL, [1] * CONTEXT, max_new_tokens=0)[0].tokens == []


def test_nothing_is_compiled_again_after_the_first_call_of_a_size():
    rng = np.random.default_rng(2)

    def go(seed):
        prompts = [rng.integers(1, 128, rng.integers(2, 17)).tolist() for _ in range(rng.integers(3, 5))]
        options = {"temperature": float(rng.uniform(0.1, 2)), "top_k": int(rng.integers(1, 90)), "seed": seed}
        generate(MODEL, prompts, max_new_tokens=int(rng.integers(1, 40)), stop=["zz"] * (seed % 2), **options)
        return generate(MODEL, prompts, max_new_tokens=20, on_text=lambda i, piece: None, **options)

    go(0)
    go(1)
    compiled = compiled_programs()
    for seed in range(2, 8):
        assert go(seed)[0].stats.compile_seconds == 0
    assert compiled_programs() == compiled


def test_the_device_is_asked_once_unless_text_is_watched(monkeypatch):
    calls = []
    real = batch.decode
    monkeypatch.setattr(batch, "decode", lambda *args: calls.append(args[3]) or real(*args))
    generate(MODEL, PROMPTS, max_new_tokens=40)
    assert calls == [batch.UNBOUNDED]
    calls.clear()
    generate(MODEL, PROMPTS, max_new_tokens=40, stop=["\x01\x02\x03"])
    assert calls == [16, 16, 16][: len(calls)] and len(calls) > 1
    calls.clear()
    list(stream(MODEL, "hello", max_new_tokens=40, logit_bias={0: -math.inf}))
    assert calls[0] == 1 and max(calls) <= 16


def test_weights_in_blocks_decode_too():
    weights = MODEL.params
    ffn = weights.layers[0].ffn
    packed = realm.quantize(np.asarray(jax.random.normal(jax.random.key(0), ffn.gate.shape)), "Q8_0")
    layers = (weights.layers[0].replace(ffn=ffn.replace(gate=packed)), *weights.layers[1:])
    dense = (weights.layers[0].replace(ffn=ffn.replace(gate=packed.dequantize())), *weights.layers[1:])
    a = generate(MODEL.replace(params=weights.replace(layers=layers)), PROMPTS, max_new_tokens=10)
    b = generate(MODEL.replace(params=weights.replace(layers=dense)), PROMPTS, max_new_tokens=10)
    assert said(a) == said(b)
