"""Thousands of random operations on an engine: nothing is lost, doubled, kept or mixed up.

Few requests are distinct, so that what each gets alone is known at little cost; all else about them is random.
"""

import contextlib
import gc
import random
import weakref

import engine_toys
import pytest
from engine_toys import ADAPTERS, BROKEN, BROKEN_TOKEN, alone, answer, check_drained, make_engine, outcome

from realm_jax import Request
from realm_jax.compilation import compiled_programs
from realm_jax.engine.metrics import RECENT
from realm_jax.engine.seat import Seat
from realm_jax.errors import RealmError, RequestError

SHARED = "a beginning that is common to some of them"
PROMPTS = [
    "a",
    "c",
    [7],
    "hello",
    SHARED,
    SHARED + "x",
    SHARED + " and goes on by itself",
    [7, BROKEN_TOKEN],
    [*b"zzz" * 9, BROKEN_TOKEN, 7],
]
SAMPLED = {"temperature": 0.9, "top_k": 20}
FULLY = {**SAMPLED, "presence_penalty": 0.4, "logit_bias": {65: 2.0}}
BAD = [
    {"prompt": []}, {"prompt": [7] * 300}, {"prompt": [-1]}, {"adapter": "none of them"}, {"temperature": -1.0},
    {"max_new_tokens": 10**9}, {"stop": 5}, {"priority": None}, {"logprobs": 99}, {"on_text": 1}, {"id": ()},
]  # fmt: skip


class Refusal(Exception):
    """What callbacks raise here."""


def distinct_requests(kind, rng):
    """What may be asked for, as keywords; of `generate` these need few programs."""
    known = []
    for prompt in PROMPTS:
        for budget in (0, 1, 6, 17):
            rules = [{}, SAMPLED | {"seed": rng.randrange(3)}, {"stop": ("t", "9")}]
            if kind != "plain":
                rules = [{}, {"stop": "t", "speculate": False, "adapter": "two"}]
                rules += [{**FULLY, "adapter": name, "seed": rng.randrange(2)} for name in ADAPTERS]
            known.append({"prompt": prompt, "max_new_tokens": budget, **rng.choice(rules)})
    return known


class Simulator:
    """One engine, those who use it, and what they are owed.

    open: handle -> how it may end other than by its answer: a set of "cancelled" and "callback".
    """

    def __init__(self, kind, draft, seed):
        self.rng, self.draft = random.Random(seed), draft
        self.engine = make_engine(kind, model=BROKEN)
        self.known = distinct_requests(kind, self.rng)
        self.open, self.streams, self.heard = {}, [], {}
        self.refs, self.outcomes, self.checked = [], [], 0

    def submit(self, depth=0):
        """A good request, with a callback of one kind or another."""
        asked = dict(self.rng.choice(self.known), priority=self.rng.randint(-3, 3))
        own, heard = [], []
        kind = self.rng.choice(["none", "none", "listen", "raise", "cancel self", "cancel", "submit"])
        when = self.rng.randrange(3)

        def on_text(piece):
            heard.append(piece)
            if len(heard) <= when:
                return
            if kind == "raise":
                self.open[own[0]].add("callback")
                raise Refusal
            if kind == "cancel self":
                self.cancel(own[0])
            if kind == "cancel":
                self.cancel_one()
            if kind == "submit" and depth < 2:
                self.submit(depth + 1)

        id = self.rng.choice([None, None, f"named {self.checked} {len(self.open)} {self.rng.random()}"])
        handle = self.engine.submit(Request(**asked, id=id, on_text=None if kind == "none" else on_text))
        own.append(handle)
        self.open[handle] = set()
        self.heard[handle] = None if kind == "none" else heard
        self.refs.append(weakref.ref(handle))

    def submit_bad(self):
        before = len(self.engine._open)
        with pytest.raises(RequestError) as error:
            self.engine.submit(Request(**{"prompt": "hello"} | self.rng.choice(BAD)))
        assert "\n" not in str(error.value) and len(self.engine._open) == before

    def cancel(self, handle):
        was_open = not handle.done
        assert handle.cancel() == was_open and not handle.cancel()
        if was_open:
            self.open[handle].add("cancelled")

    def cancel_one(self):
        if self.open:
            self.cancel(self.rng.choice(list(self.open)))

    def step(self):
        for _ in range(self.rng.choice((1, 1, 2, 6))):
            self.engine.step()
        self.check()

    def result(self):
        """Somebody waits for one request."""
        handle = self.rng.choice(list(self.open) or [None])
        if handle is not None:
            try:
                assert handle.result() is handle.completion
            except RealmError as error:
                assert error is handle.error

    def stream(self):
        if len(self.streams) < 5:
            stream = self.engine.stream(Request(**self.rng.choice(self.known), priority=self.rng.randint(-3, 3)))
            self.open[stream.handle], self.heard[stream.handle] = set(), []
            self.refs.append(weakref.ref(stream.handle))
            self.streams.append(stream)

    def take(self):
        """A piece, or some, of a stream."""
        if not self.streams:
            return
        stream = self.rng.choice(self.streams)
        for _ in range(self.rng.choice((1, 3, 99))):
            try:
                self.heard[stream.handle].append(next(stream))
            except (StopIteration, RealmError):
                assert stream.handle.done
                self.streams.remove(stream)
                return

    def leave(self):
        """A stream is left in the middle, one way or the other."""
        if not self.streams:
            return
        stream = self.streams.pop(self.rng.randrange(len(self.streams)))
        self.open[stream.handle].add("cancelled")
        if self.rng.random() < 0.5:
            stream.close()
            assert stream.handle.done
        self.heard[stream.handle] = None

    def read_to_the_end(self):
        while self.streams:
            stream = self.streams.pop()
            with contextlib.suppress(RealmError):
                self.heard[stream.handle].extend(stream)

    def check(self):
        """Whoever has ended has got what they were owed; they are let go then, if no stream holds them."""
        held = {stream.handle for stream in self.streams}
        for handle in [handle for handle in self.open if handle.done and handle not in held]:
            self.check_one(handle, self.open.pop(handle), self.heard.pop(handle))
            self.checked += 1

    def check_one(self, handle, otherwise, heard):
        owed, got = answer(handle.request, draft=self.draft, model="BROKEN"), outcome(handle)
        self.outcomes.append(got if got == "failed" else got[2])
        if got == "failed":
            raised = "callback" in otherwise and "on_text raised Refusal" in str(handle.error)
            assert raised or (owed == "failed" and "not finite" in str(handle.error)), handle
            return
        if got == owed:
            assert heard is None or "".join(heard) == got[1]
            return
        tokens, text, reason = got
        assert reason == "cancelled" and "cancelled" in otherwise, (handle, got, owed)
        if owed != "failed":
            assert tokens == owed[0][: len(tokens)] and owed[1].startswith(text)
        if heard is not None:
            assert text.startswith("".join(heard))

    def drain(self):
        """Now and then nothing is left to do."""
        self.engine.run()
        self.read_to_the_end()
        check_drained(self.engine, self.open)
        self.check()
        assert not self.open
        self.engine.run()
        self.engine.events.clear()
        gc.collect()
        assert not [ref for ref in self.refs if ref() is not None]
        self.refs.clear()
        metrics = self.engine.metrics
        assert max(len(kept) for kept in (metrics._first, metrics._between, metrics._speed)) <= RECENT
        assert len(metrics.counts) < 30 and len(self.engine._reader.index) <= 2

    def run(self, operations):
        weights = {
            self.submit: 8, self.submit_bad: 2, self.cancel_one: 1, self.step: 8, self.result: 0.3, self.stream: 1,
            self.take: 2, self.leave: 0.4, self.drain: 0.1,
        }  # fmt: skip
        for _ in range(operations):
            if len(self.open) > 60:
                self.step()
            self.rng.choices(list(weights), list(weights.values()))[0]()
        self.drain()


few_shapes = engine_toys.few_shapes


def seats():
    gc.collect()
    return sum(isinstance(thing, Seat) for thing in gc.get_objects())


@pytest.mark.parametrize(
    "kind, draft, operations, seed",
    [
        ("plain", None, 500, 0),
        *(
            pytest.param(kind, draft, 4000, seed, marks=pytest.mark.slow)
            for kind, draft in (("plain", None), ("draft", "half"), ("ngram", "ngram"))
            for seed in (1, 2)
        ),
    ],
)
def test_nothing_is_lost_doubled_kept_or_mixed_up(kind, draft, operations, seed):
    before = seats()
    simulator = Simulator(kind, draft, seed)
    for asked in simulator.known:
        alone(Request(**asked), draft=draft, model="BROKEN")
    simulator.engine.warm_up()
    programs = compiled_programs()
    simulator.run(operations)
    assert compiled_programs() == programs
    assert seats() == before
    assert simulator.checked > operations / 4
    assert {"failed", "cancelled", "length", "stop"} <= set(simulator.outcomes)
    simulator.engine.close()
