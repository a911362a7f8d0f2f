"""What a user asks of the engine, and what they hold on to while it is worked on: `Request` and `Handle`."""

import dataclasses
import operator
import threading
import time
from collections.abc import Callable
from typing import Protocol

from realm_jax.decode.completion import Completion, TokenLogprob
from realm_jax.decode.prompts import Prompt
from realm_jax.decode.settings import Settings
from realm_jax.errors import RealmError, RequestError

HIGHEST_PRIORITY = 2**31 - 1


class Server(Protocol):
    """What a handle asks of its engine."""

    def advance(self, enough: Callable[[], bool]) -> None:
        """Work until `enough()`, or no request is left."""

    def cancel(self, handle: "Handle") -> bool:
        """End a request; False if it had ended already."""

    def forget(self, handle: "Handle") -> None:
        """The request's ending has been told."""

    def abandon(self, handle: "Handle") -> None:
        """Nobody waits for this request any more."""


@dataclasses.dataclass(frozen=True)
class Request(Settings):
    """One prompt, how to go on with it, and how to treat it. The fields of `Settings` are keywords.

    prompt: a string or token ids. id: a name of its own, by default a running number. adapter: the name of one of the
    engine's adapters, None for none. priority: whole number; higher ones are served first. speculate: whether the
    engine's draft, if it has one, runs ahead. add_special, parse_special: for a prompt that is a string, as in
    `Tokenizer.encode`. on_text: called with each new piece of text, in the thread that runs the engine.
    """

    prompt: Prompt = dataclasses.field(kw_only=False)
    id: str | int | None = dataclasses.field(default=None, kw_only=True)
    adapter: str | None = dataclasses.field(default=None, kw_only=True)
    priority: int = dataclasses.field(default=0, kw_only=True)
    speculate: bool = dataclasses.field(default=True, kw_only=True)
    add_special: bool = dataclasses.field(default=True, kw_only=True)
    parse_special: bool = dataclasses.field(default=False, kw_only=True)
    on_text: Callable[[str], None] | None = dataclasses.field(default=None, kw_only=True)

    def check_treatment(self, adapters: tuple[str, ...]) -> None:
        """Raises RequestError for an id, adapter, priority, switch or callback that is none; settings apart."""
        if self.id is not None and (isinstance(self.id, bool) or not isinstance(self.id, str | int)):
            raise RequestError(f"id is {self.id!r}; it must be a string or a whole number")
        if self.adapter is not None and self.adapter not in adapters:
            known = ", ".join(map(repr, adapters)) or "none"
            raise RequestError(f"adapter {self.adapter!r} is not one of the engine's ({known})")
        try:
            priority = operator.index(self.priority)
        except TypeError:
            priority = None
        if priority is None or isinstance(self.priority, bool) or abs(priority) > HIGHEST_PRIORITY:
            raise RequestError(
                f"priority is {self.priority!r}; it must be a whole number of at most {HIGHEST_PRIORITY} either way"
            )
        for name in ("speculate", "add_special", "parse_special"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        if self.on_text is not None and not callable(self.on_text):
            raise RequestError(f"on_text is of type {type(self.on_text).__name__}; it must be callable, or None")


@dataclasses.dataclass
class Timing:
    """When things happened to a request, in seconds of `time.perf_counter`; None for what has not happened.

    cached: prompt tokens taken from the prefix cache.
    """

    submitted: float
    admitted: float | None = None
    first_token: float | None = None
    ended: float | None = None
    cached: int = 0


class Handle:
    """A request on its way. Made by `Engine.submit`.

    id, request, prompt_tokens (their number), timing. text, tokens, logprobs: what has been generated so far; without a
    tokenizer there is no text. completion: the result, once there is one; that of a cancelled request has
    stop_reason "cancelled". error: a RealmError if the request failed. Every request ends once, with the one or
    the other.
    """

    def __init__(self, engine: Server, request: Request, id: str | int, tokens: list[int], settings: Settings):
        self.id, self.request, self.settings, self.prompt = id, request, settings, tokens
        self.text = ""
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] | None = [] if settings.logprobs else None
        self.completion: Completion | None = None
        self.error: RealmError | None = None
        self.timing = Timing(time.perf_counter())
        self.status = "waiting"
        self.pieces: list[str] = []
        self._engine = engine
        self._ended = threading.Event()

    def __repr__(self) -> str:
        return f"Handle({self.id!r}, {self.status}, {len(self.prompt)} + {len(self.tokens)} tokens)"

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self._ended.is_set()

    def result(self) -> Completion:
        """The completion; runs the engine until there is one. Raises the request's error if it failed."""
        while not self.done:
            self._engine.advance(lambda: self.done)
        self._engine.forget(self)
        if self.error is not None:
            raise self.error
        return self.completion

    def cancel(self) -> bool:
        """End the request now, with what it has; False if it had ended already."""
        return self._engine.cancel(self)

    def end(self, completion: Completion | None, error: RealmError | None = None) -> None:
        """For the engine: the one ending."""
        assert not self.done, "a request ends once"
        self.completion, self.error, self.status = completion, error, "done"
        self.timing.ended = time.perf_counter()
        self._ended.set()
