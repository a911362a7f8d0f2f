"""What `batching_throughput` compares: ways to serve requests, behind one small interface.

A system takes requests in (`submit`), works (`step`), and notes in a `Record` when tokens came and what they were. All
get the same jobs: token ids of a prompt, and how many tokens to go on with, greedily and without ending early.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from realm_jax import Engine, Request
from realm_jax.compilation import compile_seconds
from realm_jax.decode.batch import run_batch
from realm_jax.decode.prompts import Request as BatchRequest
from realm_jax.decode.settings import Settings
from realm_jax.errors import RealmError
from realm_jax.model import Model


@dataclass(frozen=True)
class Job:
    """One request: a prompt, and the number of tokens to generate, no more and no fewer."""

    prompt: list[int]
    tokens: int


class Record:
    """What became of each job. times: of each that tokens came, in seconds of `clock`; answers: token ids or None."""

    def __init__(self, jobs: int):
        self.times: list[list[float]] = [[] for _ in range(jobs)]
        self.answers: list[list[int] | None] = [None] * jobs

    def came(self, index: int) -> None:
        """Tokens of a job have come."""
        self.times[index].append(clock())

    def finish(self, index: int, tokens: list[int]) -> None:
        """All of a job's tokens are there."""
        if self.answers[index] is not None:
            raise RealmError(f"request {index} was answered twice")
        self.answers[index] = tokens
        if not self.times[index]:
            self.came(index)


def clock() -> float:
    """Seconds that go on but for compiling, which a server has behind it: batches of new sizes come at any time."""
    return time.perf_counter() - compile_seconds()


class System(Protocol):
    """A way to serve jobs."""

    def submit(self, index: int, job: Job, record: Record) -> None:
        """Take a job in."""

    def step(self) -> bool:
        """Work a turn; False if nothing is left."""


class Continuous:
    """The engine. warm_up: compile all that it may need, not what is met."""

    def __init__(self, model: Model, slots: int, max_len: int, warm_up: bool = True, **options: Any):
        self.events: list[Any] = []
        self.engine = Engine(model, slots=slots, max_len=max_len, on_event=self.events.append, **options)
        if warm_up:
            self.engine.warm_up()
        self._ban, self._open = _banned(model), {}

    def submit(self, index: int, job: Job, record: Record) -> None:
        handle = self.engine.submit(Request(job.prompt, max_new_tokens=job.tokens, logit_bias=self._ban))
        self._open[index] = (handle, record, [0])

    def step(self) -> bool:
        more = self.engine.step()
        for index, (handle, record, seen) in list(self._open.items()):
            if len(handle.tokens) > seen[0]:
                seen[0] = len(handle.tokens)
                record.came(index)
            if handle.done:
                record.finish(index, handle.result().tokens)
                del self._open[index]
        return more


class Static:
    """Batches in order of arrival, as `generate` runs them: who waits is taken when the batch before has ended.

    slots: of them at most; 1: one request after another. streams: text is handed out as it comes, not at the end.
    """

    def __init__(self, model: Model, slots: int, streams: bool = False):
        self._model, self._slots, self._streams = model, slots, streams
        self._ban, self._waiting = _banned(model), deque()

    def submit(self, index: int, job: Job, record: Record) -> None:
        self._waiting.append((index, job, record))

    def step(self) -> bool:
        batch = [self._waiting.popleft() for _ in range(min(self._slots, len(self._waiting)))]
        requests = [
            BatchRequest(place, job.prompt, self._settings(job).checked(self._model.config.vocab_size))
            for place, (_, job, _) in enumerate(batch)
        ]
        if batch:
            pieces = run_batch(self._model, requests, self._streams)
            completions = _drain(pieces, lambda place: batch[place][2].came(batch[place][0]))
            for (index, _, record), completion in zip(batch, completions, strict=True):
                record.finish(index, completion.tokens)
        return bool(self._waiting)

    def _settings(self, job: Job) -> Settings:
        return Settings(max_new_tokens=job.tokens, logit_bias=self._ban)


def _drain(pieces: Any, came: Callable[[int], None]) -> list:
    while True:
        try:
            came(next(pieces)[0])
        except StopIteration as end:
            return end.value


def _banned(model: Model) -> dict[int, float]:
    """No text ends before its time."""
    return {token: -np.inf for token in (model.tokenizer.eog_ids if model.tokenizer else ())}


# --- llama.cpp, where llama-cpp-python is there ----------------------------------------------------------------------


def import_peer() -> ModuleType | None:
    try:
        import llama_cpp
    except ImportError:
        return None
    return llama_cpp


class LlamaSequential:
    """llama.cpp, one request after another: `Llama.generate`, which its `create_completion` is made of."""

    def __init__(self, llama_cpp: ModuleType, path: Path, max_len: int, eog_ids: Collection[int]):
        threads = os.cpu_count()
        self._llama = llama_cpp.Llama(
            str(path), n_ctx=max_len, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self._eog, self._waiting = sorted(eog_ids), deque()

    def submit(self, index: int, job: Job, record: Record) -> None:
        self._waiting.append((index, job, record))

    def step(self) -> bool:
        if self._waiting:
            index, job, record = self._waiting.popleft()
            tokens, stream = [], self._llama.generate(job.prompt, temp=0.0, logits_processor=[self._ban])
            while len(tokens) < job.tokens:
                tokens.append(next(stream))
                record.came(index)
            stream.close()
            record.finish(index, tokens)
        return bool(self._waiting)

    def _ban(self, _: np.ndarray, scores_V: np.ndarray) -> np.ndarray:
        scores_V = scores_V.copy()
        scores_V[self._eog] = -np.inf
        return scores_V


class LlamaContinuous:
    """llama.cpp, several sequences in one `llama_batch`, each with its next token, or as much of its prompt as fits."""

    LARGEST_BATCH = 512

    def __init__(self, llama_cpp: ModuleType, path: Path, slots: int, max_len: int, eog_ids: Collection[int]):
        self._api = llama_cpp
        self._owner = llama_cpp.Llama(str(path), n_ctx=32, verbose=False)  # holds the model
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch = slots * -(-max_len // 256) * 256, slots, self.LARGEST_BATCH
        params.n_threads = params.n_threads_batch = os.cpu_count()
        self._context = llama_cpp.llama_init_from_model(self._owner.model, params)
        self._batch = llama_cpp.llama_batch_init(self.LARGEST_BATCH, 0, 1)
        self._eog, self._vocab = sorted(eog_ids), self._owner.n_vocab()
        self._waiting, self._seats, self._free = deque(), {}, list(range(slots))

    def submit(self, index: int, job: Job, record: Record) -> None:
        self._waiting.append((index, job, record))

    def step(self) -> bool:
        while self._free and self._waiting:
            index, job, record = self._waiting.popleft()
            self._seats[self._free.pop(0)] = _Sequence(index, job, record, list(job.prompt))
        if not self._seats:
            return False
        asking = self._fill()
        if self._api.llama_decode(self._context, self._batch):
            raise RealmError("llama_decode: failed")
        logits_BV = np.ctypeslib.as_array(self._api.llama_get_logits(self._context), (len(asking), self._vocab)).copy()
        logits_BV[:, self._eog] = -np.inf
        for slot, token in zip(asking, logits_BV.argmax(1).tolist(), strict=True):
            self._append(slot, token)
        return bool(self._seats or self._waiting)

    def _fill(self) -> list[int]:
        """Put tokens into the batch, of who decodes first; returns the slots that a token is asked of, in order."""
        batch, n, asking = self._batch, 0, []
        for slot, seat in sorted(self._seats.items(), key=lambda item: len(item[1].left) > 1):
            taken = seat.left[: self.LARGEST_BATCH - n]
            del seat.left[: len(taken)]
            for token in taken:
                batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.seq_id[n][0] = token, seat.place, 1, slot
                batch.logits[n] = False
                seat.place, n = seat.place + 1, n + 1
            if taken and not seat.left:
                batch.logits[n - 1] = True
                asking.append(slot)
        batch.n_tokens = n
        return asking

    def _append(self, slot: int, token: int) -> None:
        seat = self._seats[slot]
        seat.tokens.append(token)
        seat.left = [token]
        seat.record.came(seat.index)
        if len(seat.tokens) == seat.job.tokens:
            seat.record.finish(seat.index, seat.tokens)
            self._api.llama_memory_seq_rm(self._api.llama_get_memory(self._context), slot, -1, -1)
            del self._seats[slot]
            self._free.append(slot)


class _Sequence:
    """left: tokens that are not in the cache; place: how many are."""

    def __init__(self, index: int, job: Job, record: Record, left: list[int]):
        self.index, self.job, self.record, self.left = index, job, record, left
        self.place, self.tokens = 0, []


# --- serving ---------------------------------------------------------------------------------------------------------


def serve(system: System, jobs: Sequence[Job], arrivals: Sequence[float]) -> tuple[Record, float]:
    """Give a system each job at its time (seconds, ascending); returns what came, and when it began.

    Raises RealmError unless every job has its answer, of the right length.
    """
    record, start, given = Record(len(jobs)), clock(), 0
    while True:
        while given < len(jobs) and arrivals[given] <= clock() - start:
            system.submit(given, jobs[given], record)
            given += 1
        if system.step():
            continue
        if given == len(jobs):
            break
        time.sleep(max(0.0, arrivals[given] - (clock() - start)))
    for index, (job, answer) in enumerate(zip(jobs, record.answers, strict=True)):
        if answer is None or len(answer) != job.tokens:
            came = "no" if answer is None else len(answer)
            raise RealmError(
                f"{type(system).__name__}: request {index}: {came} tokens came, {job.tokens} were asked for"
            )
    return record, start
