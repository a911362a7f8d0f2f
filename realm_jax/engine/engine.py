"""Continuous batching: requests come at any time, share one padded ragged batch, and leave it when they are done.

`Engine.step` is the whole of it: take in what the last call of the device has done, seat who waits, dispatch a chunk of
prompts (`engine.prompts`) and some steps of decoding (`engine.driver`), and hand out text while the device works. What
happens on the device is in `engine.device`, whose functions have a short list of shapes (`engine.shapes`).
"""

import contextlib
import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future

import jax

from realm_jax.decode.batch import ran_on
from realm_jax.decode.completion import Completion
from realm_jax.decode.draft_models import DraftLike, prepare_optional_draft
from realm_jax.decode.loop import Stop
from realm_jax.decode.row import not_finite
from realm_jax.engine import memory
from realm_jax.engine.admission import Limits, check
from realm_jax.engine.driver import Driver
from realm_jax.engine.metrics import Event, Metrics
from realm_jax.engine.prefixes import PrefixIndex
from realm_jax.engine.prompts import PromptReader
from realm_jax.engine.request import Handle, Request
from realm_jax.engine.seat import Seat
from realm_jax.engine.settings import EngineSettings
from realm_jax.engine.shapes import Shapes
from realm_jax.engine.stream import Stream
from realm_jax.engine.waiting import Waiting
from realm_jax.errors import RealmError, RequestError
from realm_jax.lora import stack
from realm_jax.lora.stack import AdapterLike, One
from realm_jax.model.model import Model


class Engine:
    """Serves requests from slots of one batch.

    slots: requests served at once; None: as many as the device's free memory holds. max_len: tokens of a slot, prompt
    and new ones; at most the model's context. adapters: by name, what requests may ask for, each an `Adapter` or the
    path of one, alone or with a scale. draft: what runs ahead, as in `generate`; draft_tokens, draft_adaptive,
    draft_adapter: also as there. options: the fields of `EngineSettings`. on_event: is told every event of `Metrics`.

    Greedy or sampled, a request's tokens are those it would get alone. Methods may be called from several threads; one
    at a time runs the engine. Raises RequestError for an option that makes no sense, AdapterError for an
    adapter that does not fit, RealmError if there is not enough memory.
    """

    def __init__(
        self,
        model: Model,
        slots: int | None = 32,
        max_len: int = 2048,
        adapters: Mapping[str, One | tuple[One, float]] | None = None,
        draft: DraftLike | None = None,
        *,
        draft_tokens: int = 4,
        draft_adaptive: bool = False,
        draft_adapter: AdapterLike | None = None,
        on_event: Callable[[Event], None] | None = None,
        **options,
    ):
        self.settings = EngineSettings(**options).checked(slots, max_len)
        self.model = model
        adapters = dict(adapters or {})
        self._adapters = {name: i for i, name in enumerate(adapters, 1)}
        stacked = stack(list(adapters.values()), model) if adapters else None
        ahead = prepare_optional_draft(model, draft, draft_tokens, adaptive=draft_adaptive, adapter=draft_adapter)
        self._draft, self._draft_name = (ahead.draft, ahead.name) if ahead else (None, None)
        self.max_len = min(max_len, model.config.context_length)
        self.limits = Limits(
            self.max_len,
            tuple(adapters),
            self.settings.max_logit_bias,
            self.settings.max_logprobs,
            ahead and ahead.context_length,
        )
        self.slots = self._choose_slots(slots)
        self.metrics = Metrics(self.slots, on_event)
        self._ran_on = ran_on(model, self.slots)
        self._shapes = Shapes.of(self.slots, self.max_len, self.settings.prefill_tokens)
        self._driver = Driver(model, self._draft, stacked, self.slots, self.max_len, self.settings)
        self._reader = PromptReader(self._driver, self._shapes, self.settings, self.metrics)
        self._waiting, self._seats, self._free = Waiting(), dict[int, Seat](), list(range(self.slots))
        self._ending: set[int] = set()
        self._flying: tuple[Future, list[Seat], float, dict[str, float]] | None = None
        self._ids, self._open, self._sat = itertools.count(), dict[str | int, Handle](), dict[str | int, Seat]()
        self._finished: dict[Handle, None] = {}
        self._abandoned: deque[Handle] = deque()
        self._running, self._queue, self._closed, self._stepping = threading.RLock(), threading.RLock(), "", False

    def submit(self, request: Request) -> Handle:
        """Take a request in; it is worked on when the engine runs. Raises RequestError if it can never be served."""
        tokens, settings = check(self.model, request, self.limits)
        with self._queue:
            self._check_open()
            if request.id is not None and request.id in self._open:
                raise RequestError(f"request {request.id!r}: another one of that id has not ended; give another id")
            id = request.id if request.id is not None else next(i for i in self._ids if i not in self._open)
            handle = Handle(self, request, id, tokens, settings)
            self._open[id] = handle
            self.metrics.submitted(handle)
            if settings.max_new_tokens == 0 or len(tokens) >= self.model.config.context_length:
                self._end(handle, "length")
            else:
                self._waiting.push(handle)
        return handle

    def step(self) -> bool:
        """One turn, as the module says; returns whether there is anything left to do."""
        with self._running:
            self._check_open()
            if self._stepping:
                raise RealmError("a callback cannot run the engine: it is in the middle of a step")
            with self._unbroken():
                while self._abandoned:
                    self.cancel(self._abandoned[0])
                    self.forget(self._abandoned.popleft())
                arrived = self._collect()
                idle_since = time.perf_counter()
                self._leave()
                self._admit()
                self._reader.read(self._seats.values())
                self._decode(idle_since if arrived else None)
                for seat, came in arrived:
                    self._deliver(seat, came)
                return bool(self._seats or len(self._waiting) or self._flying or self._abandoned)

    def run(self) -> list[Handle]:
        """Work until no request is left; returns those that have ended since the last time, in the order they did.

        Not among them: streams, and those whose `result` somebody has asked for.
        """
        while self.step():
            pass
        return self.take_finished()

    def take_finished(self) -> list[Handle]:
        """The requests that have ended since the last time, in the order they did; whoever calls `step` asks now and
        then, or they are held for ever."""
        with self._queue:
            finished, self._finished = self._finished, {}
        return list(finished)

    def advance(self, enough: Callable[[], bool]) -> None:
        """Work until `enough()`, or no request is left."""
        while not enough():
            with self._running:
                if enough() or not self.step():
                    return

    def stream(self, request: Request) -> Stream:
        """Submit a request and iterate over its text, with `for` or `async for`; see `Stream`."""
        return Stream(self, self.submit(request))

    def cancel(self, handle: Handle) -> bool:
        """End a request with what it has; False if it had ended already. Its slot is free at the next step."""
        with self._queue:
            if handle.done:
                return False
            if self._open.get(handle.id) is not handle:
                raise RequestError(f"request {handle.id!r} is another engine's: cancel it there")
            self._waiting.remove(handle)
            self._end(handle, "cancelled")
            return True

    def forget(self, handle: Handle) -> None:
        """For handles and streams: the request's ending has been told."""
        self._finished.pop(handle, None)

    def abandon(self, handle: Handle) -> None:
        """For streams that nobody holds any more, at whatever moment: takes no lock; cancels at the next step."""
        if handle.done:
            self.forget(handle)
        else:
            self._abandoned.append(handle)

    def close(self) -> None:
        """Cancel what has not ended, and give the memory back. Closing again does nothing."""
        self._shut("it is closed", None)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def warm_up(self) -> None:
        """Compile everything that any traffic can need; only before the first request, or when none is left."""
        with self._running:
            self._check_open()
            if self._seats or self._flying or self._stepping:
                raise RealmError("an engine can be warmed up only while no request is being served")
            with self._unbroken():
                self._driver.compile(self._shapes)
                self._reader.index = PrefixIndex(self.settings.prefix_rows)

    def _choose_slots(self, wanted: int | None) -> int:
        each = memory.slot_bytes(self.model.config, self._draft, self.max_len, self.settings.cache_dtype)
        where = next(iter(jax.tree.leaves(self.model.params)[0].devices()))
        return memory.choose_slots(wanted, self.settings.prefix_rows, each, memory.free_bytes(where))

    @contextlib.contextmanager
    def _unbroken(self) -> Iterator[None]:
        """If the device, or the engine itself, fails half-way, all that is open ends and says so."""
        self._stepping = True
        try:
            yield
        except BaseException as error:
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            self._shut(f"it broke off ({why})", RealmError(f"the engine broke off ({why})"))
            if isinstance(error, RealmError) or not isinstance(error, Exception):
                raise
            raise RealmError(f"the engine broke off ({why})") from error
        finally:
            self._stepping = False

    def _shut(self, why: str, error: RealmError | None) -> None:
        with self._running, self._queue:
            if self._closed:
                return
            self._closed = why
            for handle in list(self._open.values()):
                self._waiting.remove(handle)
                self._end(handle, "cancelled", error)
            self._seats.clear()
            self._flying = None
            self._driver.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RealmError(f"the engine serves no more: {self._closed}; make a new one")

    # One step, in the order of its parts.

    def _collect(self) -> list[tuple[Seat, tuple[str | None, list[int]]]]:
        """Wait for the call in flight; who was in it, and what it added: the numbers now, the text later."""
        if self._flying is None:
            return []
        call, seats, since, numbers = self._flying
        report, self._flying = call.result(), None
        arrived, appended = [], 0
        for seat in seats:
            count = int(report.length_B[seat.slot]) - seat.length
            tokens = report.tokens_BN[seat.slot, :count].tolist()
            seat.length, seat.stop, seat.report = seat.length + count, int(report.stop_B[seat.slot]), report
            appended += count
            # Stop strings decide who sits where next; all other text can wait until the device is at work again.
            with self._queue:
                reads = seat.handle.settings.stop and not seat.handle.done
                piece = seat.read(tokens, seat.stop, report) if reads else None
            arrived.append((seat, (piece, tokens)))
        self.metrics.call(seconds=time.perf_counter() - since, tokens=appended, **numbers)
        return arrived

    def _leave(self) -> None:
        """Free the slots of those who have ended."""
        for slot, seat in list(self._seats.items()):
            stopped = seat.row.reason is Stop.STOP or seat.handle.done
            if stopped and seat.stop == Stop.RUNNING:
                self._ending.add(slot)
            if stopped or seat.stop != Stop.RUNNING:
                del self._seats[slot]
                heapq.heappush(self._free, slot)

    def _admit(self) -> None:
        """Seat those whose turn it is, as long as there are slots."""
        new = []
        with self._queue:
            while self._free and (handle := self._waiting.pop()) is not None:
                slot = heapq.heappop(self._free)
                seat = Seat(slot, handle, self._adapters.get(handle.request.adapter, 0), self.model.tokenizer)
                self._seats[slot] = self._sat[handle.id] = seat
                self._ending.discard(slot)
                handle.status, handle.timing.admitted = "prefill", time.perf_counter()
                self.metrics.admitted(handle, slot)
                new.append(seat)
        if new:
            self._driver.admit(new)

    def _decode(self, idle_since: float | None) -> None:
        """Dispatch some steps of all who are ready. idle_since: when the last call ended, if there was one."""
        seats = [seat for seat in self._seats.values() if seat.ready_at is not None]
        if not seats:
            return
        window = self._shapes.window(max(seat.length for seat in seats) + self._driver.most)
        call = self._driver.decode(list(self._ending), window)
        self._ending.clear()
        now = time.perf_counter()
        numbers = {"waiting": len(self._waiting), "occupied": len(self._seats), "ready": len(seats), "window": window}
        numbers["host_seconds"] = now - idle_since if idle_since else 0.0
        self._flying = (call, seats, now, numbers)

    def _deliver(self, seat: Seat, came: tuple[str | None, list[int]]) -> None:
        """Hand out what a call has added to a request, and end it if it is over."""
        piece, tokens = came
        with self._queue:
            handle = seat.handle
            if handle.done:
                return
            if piece is None:
                piece = seat.read(tokens, seat.stop, seat.report)
            if tokens and handle.timing.first_token is None:
                handle.timing.first_token = time.perf_counter()
                self.metrics.first_token(handle)
            if piece:
                handle.pieces.append(piece)
        # Without the lock: a callback may wait for another thread, and that one for the lock.
        error = self._call_back(handle, piece) if piece else None
        with self._queue:
            if handle.done:
                return
            if error is not None:
                self._end(handle, "failed", error)
            elif seat.row.reason is Stop.FAILED:
                self._end(handle, "failed", RealmError(not_finite(f"request {handle.id!r}", seat.length)))
            elif seat.row.reason is not None:
                self._end(handle, seat.row.reason.name.lower())

    def _call_back(self, handle: Handle, piece: str) -> RealmError | None:
        """Give the request's callback a piece; if it raises, that ends its own request and no other."""
        if handle.request.on_text is None:
            return None
        try:
            handle.request.on_text(piece)
        except Exception as error:
            why = str(error).splitlines()[0] if str(error) else "no message"
            failure = RealmError(f"request {handle.id!r}: its on_text raised {type(error).__name__}: {why}")
            failure.__cause__ = error
            return failure
        return None

    def _end(self, handle: Handle, reason: str, error: RealmError | None = None) -> None:
        """The one ending of a request, which may wait, sit in a slot, or have left it with its last text unread."""
        del self._open[handle.id]
        seat = self._sat.pop(handle.id, None)
        completion: Completion | None = None
        if error is None and seat is not None:
            draft = self._draft_name if handle.request.speculate else None
            completion = seat.completion(reason, self.slots, self._ran_on, draft)
        elif error is None:
            completion = Completion("", [], handle.prompt_tokens, reason, None, handle.logprobs)
        handle.end(completion, error)
        self._finished[handle] = None
        self.metrics.ended(handle, seat and seat.slot)
