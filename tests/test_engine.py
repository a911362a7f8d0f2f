"""The engine: every request gets what it gets alone, in its turn, once, whatever happens to the others."""

import asyncio
import dataclasses
import gc
import math
import random
import threading
import weakref

import engine_toys
import jax.numpy as jnp
import numpy as np
import pytest
from engine_toys import (
    ADAPTERS,
    BROKEN,
    BROKEN_TOKEN,
    HALF,
    MODEL,
    SLOTS,
    alone,
    answer,
    check_drained,
    check_endings,
    events,
    make_engine,
    outcome,
)
from hypothesis import given
from hypothesis import strategies as st

import realm_jax as realm
from realm_jax import Request
from realm_jax.compilation import compiled_programs
from realm_jax.engine import device, memory
from realm_jax.engine.waiting import MOST_OVERTAKEN, Waiting
from realm_jax.errors import RealmError, RequestError

ROUNDING = 2e-3
"""The log-probabilities of this model span 40; plain decoding and one pass over the same tokens differ by 7e-4."""
SEVERAL_CHUNKS = "the quick brown fox jumps over the lazy dog and then some more of it "
ENDLESS = {"logit_bias": {0: -math.inf}, "presence_penalty": 0.1}
SAMPLED = {
    "temperature": 0.9, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3, "presence_penalty": 0.5,
    "frequency_penalty": 0.2, "logit_bias": {65: 3.0, 66: -math.inf},
}  # fmt: skip


few_shapes = engine_toys.few_shapes


# Everything at once.


def mixed_requests():
    greedy = [
        Request("a", max_new_tokens=30, logprobs=2),
        Request(SEVERAL_CHUNKS, max_new_tokens=9, logprobs=1),
        Request(SEVERAL_CHUNKS + "x", max_new_tokens=14, priority=3),
        Request(SEVERAL_CHUNKS + "yz", max_new_tokens=1),
        Request("hello", max_new_tokens=0),
        Request("hello", max_new_tokens=2),
        Request([5], max_new_tokens=40),
        Request("abcabcabcabcab", max_new_tokens=25, stop=["bi", "H"]),
    ]
    plain = [
        Request("hello", adapter="one", speculate=False, logprobs=2),
        Request("ab", adapter="two", speculate=False, stop="z", max_new_tokens=33),
        Request(SEVERAL_CHUNKS, adapter="one", speculate=False, max_new_tokens=20, priority=-1),
    ]
    sampled = [
        Request(prompt, adapter=adapter, seed=seed, max_new_tokens=budget, **SAMPLED | other)
        for prompt, adapter, seed, budget, other in (
            ("a", "one", 1, 40, {}),
            ("a", "two", 1, 40, {"top_p": 0.7, "logprobs": 2}),
            ("a", "one", 2**63, 40, {"min_p": 0.0, "stop": ("A",)}),
            (SEVERAL_CHUNKS, "two", 3, 16, {"temperature": 3.0, "top_k": 5}),
            (SEVERAL_CHUNKS + "more", "one", 4, 16, {"frequency_penalty": -1.0}),
            ("hello", "two", 5, 30, {"repetition_penalty": 0.8, "logit_bias": {0: 6.0}}),
            ("ab", "one", 6, 30, {"logit_bias": {65: 80.0}}),  # which n-grams foresee
        )
    ]
    requests = greedy + plain + sampled
    random.Random(0).shuffle(requests)
    return requests


@pytest.mark.parametrize("kind, draft", [("draft", "half"), pytest.param("ngram", "ngram", marks=pytest.mark.slow)])
def test_everything_at_once_is_as_alone(kind, draft):
    requests = mixed_requests()
    assert len(requests) > 5 * SLOTS
    with make_engine(kind) as engine:
        handles = [engine.submit(request) for request in requests]
        assert len(engine.run()) == len(requests)
        check_drained(engine, handles)
        for handle in handles:
            expected = alone(handle.request, draft=draft, logprobs=2)
            assert outcome(handle) == (expected.tokens, expected.text, expected.stop_reason), handle.request
            check_logprobs(handle, expected.logprobs)
            speculative = handle.completion.stats and handle.completion.stats.speculative
            assert bool(speculative) == (handle.request.speculate and bool(handle.tokens))
            if speculative and not handle.request.stop:  # behind a stop string more or less may have been done
                assert speculative == expected.stats.speculative
        assert {outcome(handle)[2] for handle in handles} == {"eos", "stop", "length"}
        assert engine.metrics.counts["prefix_hits"] and engine.metrics.counts["accepted"]


def check_logprobs(handle, expected):
    asked = handle.request.logprobs
    if not asked:
        assert handle.completion.logprobs is None
        return
    assert len(handle.completion.logprobs) == len(expected)
    for got, want in zip(handle.completion.logprobs, expected, strict=True):
        assert got.token == want.token and len(got.top) == asked
        np.testing.assert_allclose(got.logprob, want.logprob, atol=ROUNDING)
        np.testing.assert_allclose([v for _, v in got.top], [v for _, v in want.top[:asked]], atol=ROUNDING)


RULES = [
    {},
    {"temperature": 0.8},
    {"temperature": 0.8, "seed": 7},
    {"temperature": 1.5, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.6},
    {"temperature": 1.5, "min_p": 0.3},
    {"presence_penalty": 9.0, "frequency_penalty": 4.0, "logit_bias": {0: 24.0}},
    {"frequency_penalty": -1.0, "logit_bias": {i: -math.inf for i in range(91, 107)}},
    {"repetition_penalty": 0.9, "logit_bias": {7: 3.0}},
    {"temperature": 1e-7, "top_k": 3},
]


def test_every_rule_is_as_alone_whatever_its_neighbours_ask_for():
    requests = [Request(prompt, max_new_tokens=24, **rule) for rule in RULES for prompt in ("hello", [9])]
    engine = make_engine()
    handles = [engine.submit(request) for request in requests]
    engine.run()
    check_drained(engine, handles)
    for handle in handles:
        assert outcome(handle) == answer(handle.request), handle.request


def test_cached_in_int8_answers_are_as_alone_in_such_an_engine():
    requests = [Request(p, max_new_tokens=20) for p in ("a", SEVERAL_CHUNKS, SEVERAL_CHUNKS + "x", "hello", "ab", "c")]
    requests += [Request("hello", temperature=1.0, seed=seed, max_new_tokens=20) for seed in range(4)]
    engine = make_engine("int8")
    together = [engine.submit(request) for request in requests]
    engine.run()
    check_drained(engine, together)
    assert engine.metrics.counts["prefix_hits"]
    for handle in together:
        single = make_engine("int8")
        assert single.submit(handle.request).result().tokens == handle.completion.tokens
        single.close()


# Compiled once.


@pytest.mark.parametrize("kind", ["plain", "draft", "int8", pytest.param("ngram", marks=pytest.mark.slow)])
def test_no_traffic_compiles_after_warm_up(kind):
    rng = random.Random(1)
    engine = make_engine(kind)
    engine.warm_up()
    before = compiled_programs()
    handles = []
    for _ in range(60):
        length = rng.choice((1, 2, 3, rng.randrange(1, engine.max_len)))
        budget = rng.randrange(0, min(30, engine.max_len - length) + 1)
        rule = rng.choice([*RULES, SAMPLED])
        request = Request(
            [rng.choice((7, 8, 9)) if rng.random() < 0.5 else 7 for _ in range(length)], max_new_tokens=budget,
            adapter=rng.choice([None, *engine.limits.adapters]), speculate=rng.random() < 0.7,
            logprobs=rng.randint(0, engine.limits.logprobs), stop=rng.choice(((), "Q")), priority=rng.randint(-2, 2),
            **rule,
        )  # fmt: skip
        handles.append(engine.submit(request))
        if rng.random() < 0.2:
            rng.choice(handles).cancel()
        for _ in range(rng.choice((0, 0, 0, 1, 5))):
            engine.step()
    engine.run()
    check_drained(engine, handles)
    assert compiled_programs() == before
    engine.warm_up()  # of an engine at rest: harmless, and it serves on
    assert outcome_of(engine, Request("hello", max_new_tokens=5))[0] and compiled_programs() == before


def outcome_of(engine, request):
    handle = engine.submit(request)
    engine.run()
    return outcome(handle)


def test_a_wrong_warm_up_is_refused_and_harms_nothing():
    engine = make_engine()
    handle = engine.submit(Request("hello", max_new_tokens=20))
    engine.step()
    with pytest.raises(RealmError, match="warmed up only while no request is being served"):
        engine.warm_up()
    engine.run()
    assert outcome(handle) == answer(handle.request)
    engine.close()
    with pytest.raises(RealmError, match="serves no more"):
        engine.warm_up()


# Whose turn it is.


def test_priority_then_arrival():
    engine = make_engine()
    priorities = [0, 0, 5, -1, 5, np.uint8(7), 0, -1, 2]
    handles = [engine.submit(Request("hello", max_new_tokens=3, priority=p, id=i)) for i, p in enumerate(priorities)]
    engine.run()
    check_drained(engine, handles)
    order = sorted(range(len(priorities)), key=lambda i: (-int(priorities[i]), i))
    assert [event["id"] for event in events(engine, "admitted")] == order


def test_nobody_starves_under_a_stream_of_others():
    engine = make_engine()
    old = engine.submit(Request("hello", max_new_tokens=8, priority=-5, id="old"))
    later = []
    while not old.done:
        while len(engine._waiting) < 2 * SLOTS:
            later.append(engine.submit(Request([7], max_new_tokens=1, priority=9)))
        engine.step()
        assert len(later) < 4 * MOST_OVERTAKEN
    engine.run()
    check_drained(engine, [old, *later])
    ids = [event["id"] for event in events(engine, "admitted")]
    assert ids.index("old") == MOST_OVERTAKEN


class Asked:
    """What the queue wants to know of a handle."""

    def __init__(self, priority):
        self.request = Request("", priority=priority)


@given(st.lists(st.one_of(st.integers(-2, 2), st.just("pop"), st.just("pop"), st.just("remove")), max_size=400))
def test_the_queue_is_that_of_its_plain_description(operations):
    queue, plain, overtaken, rng = Waiting(), [], {}, random.Random(0)
    for operation in operations:
        if operation == "pop":
            wanted = None
            if plain:
                oldest = plain[0]
                wanted = oldest if overtaken[oldest] >= MOST_OVERTAKEN else max(plain, key=lambda h: h.request.priority)
                for handle in plain[: plain.index(wanted)]:
                    overtaken[handle] += 1
                plain.remove(wanted)
            assert queue.pop() is wanted
        elif operation == "remove":
            gone = rng.choice(plain) if plain else Asked(0)
            assert queue.remove(gone) == (gone in plain)
            plain = [handle for handle in plain if handle is not gone]
        else:
            handle = Asked(operation)
            overtaken[handle] = 0
            queue.push(handle)
            plain.append(handle)
        assert len(queue) == len(plain)


def test_the_queue_keeps_nothing_of_those_who_left():
    queue = Waiting()
    first = Asked(-1)
    queue.push(first)
    for _ in range(2000):
        for priority in (5, -3):
            queue.push(handle := Asked(priority))
            queue.remove(handle)
    assert len(queue._by_priority) + len(queue._by_arrival) < 500
    assert queue.pop() is first and queue.pop() is None


def test_a_long_prompt_does_not_stall_those_who_decode(monkeypatch):
    engine = make_engine()
    chunks = []  # prompt tokens of each prefill since the last decoding
    prefill, decode = device.prefill, device.decode
    between = []

    def prefills(*args):
        chunks.append(len(args[-2]) * args[-1])
        return prefill(*args)

    def decodes(*args):
        between.append(sum(chunks))
        chunks.clear()
        return decode(*args)

    monkeypatch.setattr(device, "prefill", prefills)
    monkeypatch.setattr(device, "decode", decodes)
    running = engine.submit(Request("hello", max_new_tokens=90, **ENDLESS))
    engine.step()
    long = engine.submit(Request(SEVERAL_CHUNKS + SEVERAL_CHUNKS, max_new_tokens=3))
    lengths = []
    while not long.tokens and engine.step():
        lengths.append(len(running.tokens))
    assert len(lengths) > 8 and np.all(np.diff(lengths) == engine.settings.steps)
    assert max(between) <= engine.settings.prefill_tokens
    engine.run()
    check_drained(engine, [running, long])
    assert outcome(running) == answer(running.request) and outcome(long) == answer(long.request)


def test_a_request_that_never_fits_is_refused_at_once():
    engine = make_engine(max_len=96)
    with pytest.raises(RequestError, match=r"request 'x': its prompt of 90 tokens and 7 new ones never fit"):
        engine.submit(Request([7] * 90, max_new_tokens=7, id="x"))
    assert engine.submit(Request([7] * 90, max_new_tokens=6, id="x")).id == "x"


def test_what_a_draft_is_too_short_for_is_refused_unless_it_does_without():
    short = HALF.replace(config=dataclasses.replace(HALF.config, context_length=40))
    engine = make_engine("draft", draft=short)
    with pytest.raises(RequestError, match=r"request 'x': 41 tokens are more than the draft is made for \(40\)"):
        engine.submit(Request([7] * 30, max_new_tokens=11, id="x"))
    for asked in ({"max_new_tokens": 10}, {"max_new_tokens": 11, "speculate": False}):
        assert not engine.submit(Request([7] * 30, **asked)).done


def test_slots_are_chosen_from_free_memory(monkeypatch):
    each = memory.slot_bytes(MODEL.config, None, 64, "float32")
    assert each == 2 * 2 * 64 * 2 * 16 * 4 + 64 * 4

    def slots(free, **options):
        monkeypatch.setattr(memory, "free_bytes", lambda device: free)
        return realm.Engine(MODEL, max_len=64, prefix_rows=2, **options).slots

    assert slots(10 * each / 0.8 + 1, slots=None) == 8
    assert slots(10**12, slots=None) == memory.MOST_SLOTS
    assert slots(None, slots=None) == 32
    assert slots(10 * each, slots=8) == 8
    assert slots(10 * each / 0.8 + 1, slots=None, cache_dtype="int8") > 20
    for options in ({"slots": 9}, {"slots": 300}):
        with pytest.raises(RealmError, match=r"slots and 2 rows for prefixes take .* are free: give fewer") as error:
            slots(10 * each, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(RealmError, match="give fewer slots"):
        slots(each, slots=None)


# Prompts that begin alike.


def count_prefilled(monkeypatch, engine):
    """A list that gets the prompt tokens of every chunk."""
    counts, fill = [], engine._reader._fill

    def counted(seats, rows, chunk):
        counts.extend(min(seat.left, chunk) for seat in seats)
        fill(seats, rows, chunk)

    monkeypatch.setattr(engine._reader, "_fill", counted)
    return counts


def test_a_prefix_is_computed_once(monkeypatch):
    engine = make_engine()
    counts = count_prefilled(monkeypatch, engine)
    first = [engine.submit(Request(SEVERAL_CHUNKS + tail, max_new_tokens=6)) for tail in ("", "x", "yz")]
    engine.run()
    assert sum(counts) == len(SEVERAL_CHUNKS + "y")  # the last token of a prompt is for decoding
    again = [engine.submit(Request(SEVERAL_CHUNKS + tail, max_new_tokens=6)) for tail in ("yz", "w")]
    engine.run()
    assert sum(counts) == len(SEVERAL_CHUNKS + "y")
    check_drained(engine, first + again)
    for handle in first + again:
        assert outcome(handle) == answer(handle.request)
    assert [handle.timing.cached for handle in again] == [len(SEVERAL_CHUNKS) + 1, len(SEVERAL_CHUNKS)]


@pytest.mark.parametrize("steps", [1, 2])
def test_followers_outlive_a_leader_that_is_cancelled(monkeypatch, steps):
    engine = make_engine()
    counts = count_prefilled(monkeypatch, engine)
    running = engine.submit(Request("hello", max_new_tokens=90, **ENDLESS))
    engine.step()
    leader, *followers = [engine.submit(Request(SEVERAL_CHUNKS + tail, max_new_tokens=6)) for tail in ("", "x")]
    for _ in range(steps):
        engine.step()
    assert leader.status == followers[0].status == "prefill"
    assert leader.cancel() and leader.completion.tokens == []
    followers.append(engine.submit(Request(SEVERAL_CHUNKS + "yz", max_new_tokens=6)))
    engine.run()
    check_drained(engine, [running, leader, *followers])
    for handle in (running, *followers):
        assert outcome(handle) == answer(handle.request)
    # Of each prompt all but the last token: the running one's, what the leader read in vain, the followers' together.
    assert sum(counts) == 4 + 16 * steps + len(SEVERAL_CHUNKS + "y")


def test_prefixes_are_few_and_the_least_recently_used_goes():
    engine = make_engine()
    prompts = {name: name * 30 for name in "abc"}

    def cached(name):
        handle = engine.submit(Request(prompts[name], max_new_tokens=2))
        assert handle.result() and outcome(handle) == answer(handle.request)
        assert len(engine._reader.index) <= 2
        return handle.timing.cached

    assert [cached(name) for name in "abacab"] == [0, 0, 29, 0, 29, 0]


def test_prefixes_of_different_adapters_have_nothing_in_common():
    engine = make_engine("draft", prefix_rows=2)
    names = (None, "one")
    requests = [Request(SEVERAL_CHUNKS, adapter=name, speculate=not name, max_new_tokens=9) for name in names]
    for cached in (0, len(SEVERAL_CHUNKS) - 1):
        handles = [engine.submit(request) for request in requests]
        engine.run()
        assert [handle.timing.cached for handle in handles] == [cached] * 2
        for handle in handles:
            assert outcome(handle) == answer(handle.request, draft="half", logprobs=2)
    check_endings(engine)


# What goes wrong.


def test_cancelled_before_during_and_after():
    engine = make_engine()
    long, running, *others = [
        engine.submit(Request(p, max_new_tokens=40)) for p in ("hello", "ab", SEVERAL_CHUNKS, "c", "d")
    ]
    reading, waiting, last = others
    assert waiting.cancel() and not waiting.cancel()
    assert outcome(waiting) == ([], "", "cancelled")
    while not running.tokens:
        engine.step()
    assert reading.status == "prefill" and running.status == "decode"
    assert reading.cancel() and running.cancel() and not reading.cancel()
    tokens, text, reason = outcome(running)
    whole = answer(running.request)
    assert reason == "cancelled" and tokens and tokens == whole[0][: len(tokens)] and whole[1].startswith(text)
    engine.run()
    check_drained(engine, [long, running, *others])
    assert outcome(running) == (tokens, text, reason)
    assert outcome(long) == answer(long.request) and outcome(last) == answer(last.request)
    assert not long.cancel() and outcome(long)[2] != "cancelled"


def test_a_cancelled_answer_does_not_change_afterwards():
    """Text with stop strings is read early, when a call that was in flight comes back."""
    engine = make_engine()
    handle = engine.submit(Request("hello", max_new_tokens=40, stop="never"))
    for _ in range(3):
        engine.step()
    handle.cancel()
    before = list(handle.completion.tokens), handle.completion.text
    engine.run()
    assert (handle.completion.tokens, handle.completion.text) == before and len(before[0]) == len(before[1])


@pytest.mark.parametrize("stop", [(), "never"])
def test_cancelled_by_a_neighbours_callback_as_its_last_text_comes(stop):
    engine = make_engine()
    budget = engine.settings.steps
    handles = []
    first = Request("a", max_new_tokens=budget, on_text=lambda piece: handles[1].cancel())
    handles += [engine.submit(first), engine.submit(Request("c", max_new_tokens=2 * budget, stop=stop))]
    engine.run()
    check_drained(engine, handles)
    assert outcome(handles[0]) == answer(first)
    tokens, text, reason = outcome(handles[1])
    assert reason == "cancelled" and len(tokens) == len(text) == (budget if stop else 0)
    # The same in the call that was to be its last: it had left its slot.
    handles.clear()
    late = Request(
        "a", max_new_tokens=2 * budget, on_text=lambda p: len(handles[0].tokens) > budget and handles[1].cancel()
    )
    handles += [engine.submit(late), engine.submit(Request("c", max_new_tokens=2 * budget, stop=stop))]
    engine.run()
    check_drained(engine, handles)
    tokens, text, reason = outcome(handles[1])
    assert reason == "cancelled" and tokens == answer(handles[1].request)[0][: len(tokens)]
    assert len(tokens) == len(text) == (2 * budget if stop else budget)


def test_a_handle_of_another_engine_is_refused():
    one, other = make_engine(), make_engine()
    handle = one.submit(Request("hello", max_new_tokens=3))
    with pytest.raises(RequestError, match="another engine's"):
        other.cancel(handle)
    assert outcome_of(one, Request("a", max_new_tokens=1)) and outcome(handle) == answer(handle.request)


def abandon_by_del(engine, request):
    stream = engine.stream(request)
    next(stream)
    handle = stream.handle
    del stream
    gc.collect()
    return handle


def abandon_by_close(engine, request):
    stream = engine.stream(request)
    next(stream)
    stream.close()
    stream.close()
    assert next(stream, None) is None
    return stream.handle


def abandon_by_break(engine, request):
    with engine.stream(request) as stream:
        for _ in stream:
            break
    return stream.handle


def abandon_by_exception(engine, request):
    with pytest.raises(ZeroDivisionError), engine.stream(request) as stream:
        next(stream)
        raise ZeroDivisionError
    return stream.handle


def abandon_by_async_cancel(engine, request):
    async def main():
        stream = engine.stream(request)
        got = asyncio.Event()

        async def take():
            async for _ in stream:
                got.set()

        task = asyncio.create_task(take())
        await got.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return stream.handle

    return asyncio.run(main())


@pytest.mark.parametrize(
    "abandon", [abandon_by_del, abandon_by_close, abandon_by_break, abandon_by_exception, abandon_by_async_cancel]
)
def test_a_stream_that_is_left_ends_its_request_alone(abandon):
    engine = make_engine()
    neighbour = engine.submit(Request("ab", max_new_tokens=30))
    handle = abandon(engine, Request("hello", max_new_tokens=180))
    finished = engine.run()
    check_drained(engine, [neighbour, handle])
    assert finished == [neighbour] and outcome(neighbour) == answer(neighbour.request)
    assert outcome(handle)[2] == "cancelled" and 0 < len(handle.tokens) < 180


def test_streams_give_the_text_and_keep_nothing():
    engine = make_engine()
    requests = [Request("hello", max_new_tokens=20), Request("hello", max_new_tokens=20, stop="[[Z"), Request("a")]
    assert ["".join(engine.stream(request)) for request in requests] == [answer(request)[1] for request in requests]
    assert engine.submit(requests[0]).result().text == answer(requests[0])[1]
    check_endings(engine)
    assert not engine._finished and engine.run() == []


def test_a_row_that_is_not_a_number_fails_alone():
    engine = make_engine(model=BROKEN)
    bad = [Request([7] * 3 + [BROKEN_TOKEN] + [8] * n, max_new_tokens=5, id=f"bad {n}") for n in (0, 2, 40)]
    good = [Request(p, max_new_tokens=12) for p in ("hello", "ab", [7, 7, 7], [7] * 30, [7, 7, 7, *[8] * 40], "c")]
    handles = [engine.submit(request) for pair in zip(bad + bad[:0], good, strict=False) for request in pair]
    handles += [engine.submit(request) for request in good[len(bad) :]]
    engine.run()
    again = [engine.submit(request) for request in good]  # in the slots that the broken rows have left
    engine.run()
    check_drained(engine, handles + again)
    for handle in handles + again:
        assert outcome(handle) == answer(handle.request, model="BROKEN")
    for handle in handles:
        if handle.request in bad:
            with pytest.raises(RealmError, match=rf"request '{handle.id}', after .* logits are not finite"):
                handle.result()


def test_a_callback_that_raises_ends_its_own_request_only():
    engine = make_engine()

    def fail(piece):
        raise ValueError("no more\nof this")

    bad = engine.submit(Request("hello", max_new_tokens=20, on_text=fail, id="bad"))
    good = [engine.submit(Request(p, max_new_tokens=20)) for p in ("hello", "a", "b", "c")]
    engine.run()
    check_drained(engine, [bad, *good])
    with pytest.raises(RealmError, match=r"^request 'bad': its on_text raised ValueError: no more$"):
        bad.result()
    for handle in good:
        assert outcome(handle) == answer(handle.request)


def test_callbacks_may_cancel_and_submit_but_not_run():
    engine = make_engine()
    handles, refused = {}, []

    def cancel_self(piece):
        handles["self"].cancel()

    def submit(piece):
        if "new" not in handles:
            handles["other"].cancel()
            handles["new"] = engine.submit(Request("ab", max_new_tokens=7))

    def run(piece):
        for do in (engine.run, engine.step, engine.warm_up, handles["waits"].result, lambda: next(engine.stream(late))):
            with pytest.raises(RealmError):
                do()
            refused.append(do)

    late = Request("d", max_new_tokens=3)
    for name, request in {
        "self": Request("hello", max_new_tokens=50, on_text=cancel_self),
        "submits": Request("b", max_new_tokens=20, on_text=submit),
        "runs": Request("c", max_new_tokens=1, on_text=run),
        "other": Request("a", max_new_tokens=50),
        "waits": Request("a", max_new_tokens=5, priority=-1),
    }.items():
        handles[name] = engine.submit(request)
    engine.run()
    check_drained(engine, handles.values())
    assert outcome(handles["self"])[2] == outcome(handles["other"])[2] == "cancelled" and len(refused) == 5
    for name in ("submits", "runs", "new", "waits"):
        assert outcome(handles[name]) == answer(handles[name].request)


def test_a_callback_may_wait_for_a_thread_that_submits():
    engine = make_engine()
    submitted = []

    def wait(piece):
        thread = threading.Thread(target=lambda: submitted.append(engine.submit(Request("a", max_new_tokens=1))))
        thread.start()
        thread.join(30)
        assert not thread.is_alive()

    handle = engine.submit(Request("hello", max_new_tokens=2, on_text=wait))
    engine.run()
    check_drained(engine, [handle, *submitted])
    assert submitted and outcome(handle) == answer(handle.request)


def test_a_callback_may_close_the_engine():
    engine = make_engine()
    handles = [engine.submit(Request(p, max_new_tokens=20, on_text=lambda _: engine.close())) for p in "abcde"]
    engine.run()
    assert all(outcome(handle)[2] == "cancelled" for handle in handles)
    check_endings(engine)


@pytest.mark.parametrize("when", ["submitted", "admitted", "call", "first_token", "ended"])
def test_an_on_event_that_raises_is_left_out_with_a_warning(when):
    def on_event(event):
        assert event["event"] != when, "enough"

    engine = make_engine(on_event=on_event)
    with pytest.warns(RuntimeWarning, match=f"on_event raised AssertionError at '{when}'"):
        handle = engine.submit(Request("hello", max_new_tokens=5))
        engine.run()
    assert outcome(handle) == answer(handle.request) and engine.metrics.counts["ended"] == 1


WRONG = {
    "adapter": ({"adapter": "three"}, r"adapter 'three' is not one of the engine's \(none\)"),
    "no tokens": ({"prompt": []}, "has no tokens"),
    "no text": ({"prompt": ""}, "has no tokens"),
    "no prompt": ({"prompt": None}, "is of type NoneType"),
    "ids": ({"prompt": [1, 128]}, "has 128 at place 1"),
    "too long": ({"prompt": [7] * 300}, "has 300 tokens; at most 255 fit"),
    "never fits": ({"prompt": [7] * 150, "max_new_tokens": 50}, "never fit into a slot of 192"),
    "budget": ({"max_new_tokens": -1}, "max_new_tokens is -1"),
    "budget text": ({"max_new_tokens": "5"}, "max_new_tokens is '5'"),
    "temperature": ({"temperature": math.nan}, "temperature is nan"),
    "top_p": ({"top_p": 0.0}, "top_p is 0.0"),
    "top_k": ({"top_k": 1.5}, "top_k is 1.5"),
    "min_p": ({"min_p": 2}, "min_p is 2"),
    "penalty": ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    "bias": ({"logit_bias": {500: 1.0}}, "token id of logit_bias is 500"),
    "bias kind": ({"logit_bias": [1]}, "logit_bias is a list"),
    "biases": (
        {"logit_bias": {i: 1.0 for i in range(65)}},
        r"asks for 65; .* at most 64 \(max_logit_bias\)",
    ),
    "logprobs": ({"logprobs": 1}, r"logprobs asks for 1; .* at most 0 \(max_logprobs\)"),
    "stop": ({"stop": [""]}, r"stop\[0\] has 0 characters"),
    "seed": ({"seed": -1}, "seed is -1"),
    "seed large": ({"seed": 2**64}, "seed is"),
    "priority": ({"priority": "high"}, "priority is 'high'"),
    "priority large": ({"priority": 2**40}, "priority is 1099511627776"),
    "speculate": ({"speculate": 1}, "speculate is 1"),
    "callback": ({"on_text": "print"}, "on_text is of type str"),
    "id": ({"id": 1.5}, "id is 1.5"),
    "id taken": ({"id": "taken"}, "request 'taken': another one of that id has not ended"),
}


@pytest.fixture(scope="module")
def serving():
    """An engine in the middle of a request, which ends as if nothing had been."""
    engine = make_engine()
    handle = engine.submit(Request("hello", max_new_tokens=180, id="taken", **ENDLESS))
    engine.step()
    yield engine
    engine.run()
    check_drained(engine, [handle])
    assert outcome(handle) == answer(handle.request)


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_served_is_refused_in_one_line(serving, name):
    asked, why = WRONG[name]
    with pytest.raises(RequestError, match=why) as error:
        serving.submit(Request(**{"prompt": "hello", "id": "mine"} | asked))
    assert "\n" not in str(error.value) and ("id" in asked or "request 'mine': " in str(error.value))
    assert len(serving._open) == 1
    serving.step()


def test_what_is_no_request_and_options_that_make_no_sense_are_refused(serving):
    with pytest.raises(RequestError, match="a request is of type str; it must be"):
        serving.submit("hello")
    for options, why in (
        ({"slots": 0}, "slots is 0"), ({"slots": 1.5}, "slots is 1.5"), ({"max_len": 1}, "max_len is 1"),
        ({"steps": 0}, "steps is 0"), ({"prefill_tokens": 3}, "prefill_tokens is 3"), ({"prefix_rows": -1}, "prefix"),
        ({"cache_dtype": "int4"}, "cache_dtype is 'int4'"),
        ({"draft": "ngram", "draft_tokens": 0}, "draft_tokens is 0"), ({"draft_adapter": ADAPTERS["one"]}, "no(ne)?"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=why):
            realm.Engine(MODEL, **options)


@pytest.mark.parametrize("function", ["admit", "prefill", "decode", "keep", "start_from"])
@pytest.mark.parametrize("call", [1, 3])
def test_if_the_device_fails_everything_ends_once_and_says_why(monkeypatch, function, call):
    engine = make_engine()
    prompts = [30 * letter for letter in "wxyz"] + [30 * "y" + tail for tail in "abcdef"]
    handles = [engine.submit(Request(prompt, max_new_tokens=4)) for prompt in prompts]
    calls, real = [], getattr(device, function)

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("out of memory\nand more")
        return real(*args, **kwargs)

    monkeypatch.setattr(device, function, fails)
    with pytest.raises(RealmError, match=r"^the engine broke off \(RuntimeError: out of memory\)$"):
        engine.run()
    check_endings(engine)
    for handle in handles:
        assert handle.done
        if handle.error is None:
            assert outcome(handle) == answer(handle.request)
        else:
            with pytest.raises(RealmError, match=r"^the engine broke off \(RuntimeError: out of memory\)$"):
                handle.result()
    assert any(handle.error for handle in handles)
    for do in (engine.step, engine.run, lambda: engine.submit(Request("hello"))):
        with pytest.raises(RealmError, match="serves no more: it broke off"):
            do()
    engine.close()


def test_an_interrupt_ends_everything_and_goes_on():
    engine = make_engine()

    def interrupt(piece):
        raise KeyboardInterrupt

    handles = [engine.submit(Request(p, max_new_tokens=4, on_text=(p == "b" and interrupt) or None)) for p in "abcde"]
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    assert all(handle.done for handle in handles)
    check_endings(engine)


def test_closing_cancels_what_is_open():
    with make_engine() as engine:
        handles = [engine.submit(Request("hello", max_new_tokens=100)) for _ in range(2 * SLOTS)]
        stream = engine.stream(Request("ab", max_new_tokens=100, priority=9))
        got = next(stream)
    engine.close()
    assert [outcome(handle)[2] for handle in (*handles, stream.handle)] == ["cancelled"] * (2 * SLOTS + 1)
    assert got + "".join(stream) == stream.handle.text
    check_endings(engine)
    with pytest.raises(RealmError, match="serves no more: it is closed; make a new one"):
        engine.submit(Request("hello"))


def test_threads_may_submit_stream_and_cancel_at_once():
    engine = make_engine()
    requests = [Request(p, max_new_tokens=n, temperature=t) for p in ("a", "hello") for n in (3, 20) for t in (0, 0.8)]
    expected = [answer(request) for request in requests]
    wrong = []

    def work(seed):
        rng = random.Random(seed)
        try:
            for _ in range(8):
                i = rng.randrange(len(requests))
                how = rng.randrange(3)
                if how == 0:
                    got = "".join(engine.stream(requests[i])), expected[i][1]
                elif how == 1:
                    got = engine.submit(requests[i]).result().tokens, expected[i][0]
                else:
                    handle = engine.submit(requests[i])
                    got = True, handle.cancel() or handle.result() is not None
                if got[0] != got[1]:
                    wrong.append(got)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert not wrong
    engine.run()
    check_drained(engine, [])
    assert engine.metrics.counts["submitted"] == 48


def test_many_asynchronous_streams_at_once():
    engine = make_engine()
    requests = [Request(p, max_new_tokens=n) for p in ("a", "hello", "ab", "c") for n in (1, 5, 20)]

    async def text(request):
        async with engine.stream(request) as stream:
            return "".join([piece async for piece in stream])

    async def main():
        return await asyncio.gather(*map(text, requests))

    assert asyncio.run(main()) == [answer(request)[1] for request in requests]
    engine.run()
    check_drained(engine, [])


def test_nothing_of_an_ended_request_is_kept():
    engine = make_engine()
    handles = [engine.submit(Request(p, max_new_tokens=n)) for p in ("hello", SEVERAL_CHUNKS) for n in (0, 1, 9)]
    engine.stream(Request("ab"))  # abandoned at once
    handles[1].cancel()
    known = [weakref.ref(handle) for handle in handles]
    del handles
    engine.run()
    gc.collect()
    assert [ref() for ref in known] == [None] * len(known)


def test_a_model_without_a_tokenizer_gives_tokens():
    engine = make_engine(model=MODEL.replace(tokenizer=None))
    handle = engine.submit(Request([7, 8], max_new_tokens=5))
    assert handle.result().tokens == alone(handle.request).tokens and handle.text == ""
    with pytest.raises(RequestError, match="the model has no tokenizer"):
        engine.submit(Request("hello"))
    with pytest.raises(RequestError, match="stop strings need a tokenizer"):
        engine.submit(Request([7], stop="a"))


def test_the_cache_of_a_slot_is_full_to_the_last_place():
    """Rows that end where their slot does, beside others, through every window."""
    engine = make_engine()
    requests = [Request([7, *[8] * n], max_new_tokens=191 - n, **ENDLESS) for n in (0, 100, 126, 150, 189, 190)]
    handles = [engine.submit(request) for request in requests]
    engine.run()
    check_drained(engine, handles)
    for handle in handles:
        assert handle.prompt_tokens + len(handle.tokens) == 192
        assert outcome(handle) == answer(handle.request)
    assert {event["window"] for event in events(engine, "call")} == {128, 192}
    assert jnp.max(engine._driver._state.rows.length_B) == 192
