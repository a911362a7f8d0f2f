"""What the engine measures: events as they happen, and their sums. Pure host code, called by the engine."""

import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from realm_jax.engine.request import Handle

RECENT = 4096
"""Ended requests whose latencies are kept, for quantiles."""

Event = Mapping[str, Any]


class Metrics:
    """Counts and latencies. on_event: called with each event, a flat dict that JSON can hold; must not call the engine.

    Events have "event" and "time" (seconds since the engine was made): "submitted" (id, prompt_tokens), "admitted" (id,
    slot, adapter, waited), "prefix" (id, tokens that came from the prefix cache), "first_token" (id, seconds since
    submission), "ended" (id, slot or null, reason, tokens, seconds, cached, drafted, accepted), and "call" of each call
    of the device (seconds, host_seconds: that the device stood still before it, waiting, occupied: slots, ready: slots
    that decode, tokens appended, window).
    """

    def __init__(self, slots: int, on_event: Callable[[Event], None] | None = None):
        self.slots = slots
        self.counts: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self._on_event = on_event
        self._started = time.perf_counter()
        self._first: deque[float] = deque(maxlen=RECENT)
        self._between: deque[float] = deque(maxlen=RECENT)
        self._speed: deque[float] = deque(maxlen=RECENT)
        self._last: dict[str, int] = {"waiting": 0, "occupied": 0}

    def submitted(self, handle: Handle) -> None:
        self.counts["submitted"] += 1
        self._emit("submitted", id=handle.id, prompt_tokens=handle.prompt_tokens)

    def admitted(self, handle: Handle, slot: int) -> None:
        waited = handle.timing.admitted - handle.timing.submitted
        self._emit("admitted", id=handle.id, slot=slot, adapter=handle.request.adapter, waited=waited)

    def prefix(self, handle: Handle, tokens: int) -> None:
        """So many tokens of a prompt came from the prefix cache."""
        self.counts["prefix_hits"] += 1
        self.counts["cached_tokens"] += tokens
        self._emit("prefix", id=handle.id, tokens=tokens)

    def first_token(self, handle: Handle) -> None:
        seconds = handle.timing.first_token - handle.timing.submitted
        self._first.append(seconds)
        self._emit("first_token", id=handle.id, seconds=seconds)

    def ended(self, handle: Handle, slot: int | None) -> None:
        timing, tokens = handle.timing, len(handle.tokens)
        reason = "failed" if handle.error is not None else handle.completion.stop_reason
        self.counts[reason] += 1
        self.counts["ended"] += 1
        self.counts["generated_tokens"] += tokens
        self.counts["prompt_tokens"] += handle.prompt_tokens
        seconds = timing.ended - timing.submitted
        if tokens:
            self._speed.append(tokens / max(timing.ended - timing.admitted, 1e-9))
        if tokens > 1 and timing.first_token is not None:  # one may end with tokens that nobody has been told of
            self._between.append((timing.ended - timing.first_token) / (tokens - 1))
        ahead = handle.completion and handle.completion.stats and handle.completion.stats.speculative
        drafted, accepted = (ahead.drafted, ahead.accepted) if ahead else (0, 0)
        self.counts["drafted"] += drafted
        self.counts["accepted"] += accepted
        self._emit(
            "ended",
            id=handle.id,
            slot=slot,
            reason=reason,
            tokens=tokens,
            seconds=seconds,
            cached=timing.cached,
            drafted=drafted,
            accepted=accepted,
        )

    def call(self, *, seconds: float, host_seconds: float, **numbers: int) -> None:
        """One call of the device is over. numbers: those of the event."""
        self.counts["calls"] += 1
        self.counts["occupied_in_calls"] += numbers["occupied"]
        self.seconds["device"] += seconds
        self.seconds["host"] += host_seconds
        self._last = {"waiting": numbers["waiting"], "occupied": numbers["occupied"]}
        self._emit("call", seconds=seconds, host_seconds=host_seconds, **numbers)

    def summary(self) -> dict[str, Any]:
        """All of it so far: counts; seconds; medians and 95% quantiles of the latencies of recent requests."""
        elapsed = time.perf_counter() - self._started
        counts = self.counts
        return {
            **{name: counts[name] for name in ("submitted", "ended", "eos", "stop", "length", "cancelled", "failed")},
            "prompt_tokens": counts["prompt_tokens"],
            "generated_tokens": counts["generated_tokens"],
            "tokens_per_second": counts["generated_tokens"] / elapsed,
            "seconds": elapsed,
            "calls": counts["calls"],
            "device_seconds": self.seconds["device"],
            "host_seconds": self.seconds["host"],
            "occupancy": counts["occupied_in_calls"] / (counts["calls"] * self.slots) if counts["calls"] else 0.0,
            "prefix_hits": counts["prefix_hits"],
            "cached_tokens": counts["cached_tokens"],
            "drafted": counts["drafted"],
            "accepted": counts["accepted"],
            "acceptance": counts["accepted"] / counts["drafted"] if counts["drafted"] else None,
            "first_token_seconds": _quantiles(self._first),
            "between_tokens_seconds": _quantiles(self._between),
            "request_tokens_per_second": _quantiles(self._speed),
            **self._last,
        }

    def _emit(self, event: str, **fields: Any) -> None:
        if self._on_event is None:
            return
        try:
            self._on_event({"event": event, "time": time.perf_counter() - self._started, **fields})
        except Exception as error:
            self._on_event = None
            why = f"on_event raised {type(error).__name__} at {event!r} and is not called again: {error}"
            warnings.warn(why, RuntimeWarning, stacklevel=1)


def _quantiles(values: deque[float]) -> dict[str, float] | None:
    if not values:
        return None
    median, high = np.quantile(np.array(values), [0.5, 0.95])
    return {"median": float(median), "p95": float(high)}
