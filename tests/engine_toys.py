"""Engines around toy models, what their requests get alone, and what holds once they have nothing left to do.

All engines of a kind have the same shapes, so that each kind is compiled once.
"""

import dataclasses
import functools
from collections import Counter

import jax.numpy as jnp
import pytest
from decode_toys import random_model
from lora_toys import random_adapter

import realm_jax as realm
from realm_jax.decode import Settings, buckets
from realm_jax.decode.draft_models import self_draft
from realm_jax.errors import RealmError

BROKEN_TOKEN = 126
"""Its embedding is not a number in BROKEN, which is otherwise MODEL."""


def _untied(model):
    return model.replace(params=model.params.replace(output=model.params.embedding))


MODEL = _untied(random_model())
BROKEN = MODEL.replace(params=MODEL.params.replace(embedding=MODEL.params.embedding.at[BROKEN_TOKEN].set(jnp.nan)))
HALF = self_draft(MODEL, "F32", layers=1)
ADAPTERS = {"one": random_adapter(MODEL, seed=1, size=0.3), "two": random_adapter(MODEL, seed=2, size=0.3)}
KINDS = {
    "plain": {"max_len": 192, "prefill_tokens": 16, "prefix_rows": 2, "steps": 4},
    "int8": {"max_len": 96, "prefill_tokens": 64, "prefix_rows": 2, "cache_dtype": "int8"},
    "draft": {"max_len": 96, "prefill_tokens": 16, "prefix_rows": 2, "adapters": ADAPTERS, "draft": HALF,
              "max_logprobs": 2, "draft_tokens": 3, "steps": 2},
    "ngram": {"max_len": 96, "prefill_tokens": 64, "prefix_rows": 2, "adapters": ADAPTERS, "draft": "ngram",
              "max_logprobs": 2, "draft_tokens": 3, "steps": 2},
}  # fmt: skip
SLOTS = 3


@pytest.fixture(autouse=True, scope="module")
def few_shapes():
    """What is generated alone comes in one shape: a cache of 128 and chunks of it. For test modules, by this name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "SMALLEST_CACHE", 128)
        patch.setattr(buckets, "SMALLEST_CHUNK", 128)
        yield


def make_engine(kind="plain", model=MODEL, **options):
    """An engine that keeps its events in `events`."""
    events = []
    engine = realm.Engine(model, **{"slots": SLOTS, "on_event": events.append} | KINDS[kind] | options)
    engine.events = events
    return engine


def events(engine, name):
    return [event for event in engine.events if event["event"] == name]


def outcome(handle):
    """What became of an ended request: tokens, text and reason, or that it failed."""
    if handle.error is not None:
        return "failed"
    return handle.completion.tokens, handle.completion.text, handle.completion.stop_reason


@functools.cache
def _generated(model_name, prompt, settings, adapter, draft):
    model = {"MODEL": MODEL, "BROKEN": BROKEN}[model_name]
    try:
        (done,) = realm.generate(
            model, list(prompt), adapter=ADAPTERS.get(adapter), draft=draft and {"half": HALF}.get(draft, draft),
            draft_tokens=3, **{name: dict(value) if name == "logit_bias" else value for name, value in settings},
        )  # fmt: skip
    except RealmError:
        return None
    return done


def alone(request, draft=None, model="MODEL", logprobs=0):
    """The completion of the same request by `generate`, None if it fails there. draft: "half", "ngram" or None."""
    asked = {f.name: getattr(request, f.name) for f in dataclasses.fields(Settings)} | {"logprobs": logprobs}
    if asked["logit_bias"]:
        asked["logit_bias"] = tuple(asked["logit_bias"].items())
    if not isinstance(asked["stop"], str):
        asked["stop"] = tuple(asked["stop"])
    tokens = MODEL.tokenizer.encode(request.prompt) if isinstance(request.prompt, str) else request.prompt
    settings = tuple(sorted((name, value) for name, value in asked.items() if value is not None))
    return _generated(model, tuple(tokens), settings, request.adapter, draft if request.speculate else None)


def answer(request, **how):
    """`outcome` of the same request alone."""
    done = alone(request, **how)
    return "failed" if done is None else (done.tokens, done.text, done.stop_reason)


def check_drained(engine, handles):
    """What must hold whenever an engine has nothing left to do: nobody sits or waits, every request ended once."""
    assert not engine.step()
    assert sorted(engine._free) == list(range(engine.slots)) and not engine._seats
    assert len(engine._waiting) == 0 and engine._flying is None
    assert not engine._open and not engine._sat
    for handle in handles:
        assert handle.done and handle.status == "done" and (handle.completion is None) != (handle.error is None)
        assert "".join(handle.pieces) == handle.text or outcome(handle) == "failed" or outcome(handle)[2] == "cancelled"
    check_endings(engine)


def check_endings(engine):
    """Every request that was taken in ended once, and none that was not."""
    submitted, ended = (Counter(event["id"] for event in events(engine, name)) for name in ("submitted", "ended"))
    assert submitted == ended
    assert engine.metrics.counts["submitted"] == engine.metrics.counts["ended"] >= submitted.total()
