"""A request in a slot: the host's numbers about it, and what a call of the device has added. Called by the engine."""

import time

import numpy as np

from realm_jax.decode.completion import Completion, Stats, TokenLogprob
from realm_jax.decode.loop import Stop
from realm_jax.decode.row import Row
from realm_jax.decode.tally import summary
from realm_jax.engine.device import Report
from realm_jax.engine.request import Handle
from realm_jax.gguf.tokenizer import Tokenizer


class Seat:
    """slot: where. row: how far its text has been read. adapter: its entry in the stack. tokens: the prompt, int32.

    filled: prompt tokens in the cache. length: tokens in all. stop: a `Stop`, as the device has last reported it.
    placed: whether it has begun, from the prefix cache or from nothing. ready_at: when its prompt had been dispatched.
    report: the latest, on the host.
    """

    def __init__(self, slot: int, handle: Handle, adapter: int, tokenizer: Tokenizer | None):
        self.slot, self.handle, self.adapter = slot, handle, adapter
        self.tokens = np.array(handle.prompt, np.int32)
        self.row = Row(len(handle.prompt), handle.settings, tokenizer)
        self.filled, self.length, self.placed = 0, len(handle.prompt), False
        self.stop = Stop.RUNNING
        self.ready_at: float | None = None
        self.report: Report | None = None

    @property
    def left(self) -> int:
        """Prompt tokens that are not yet in the cache; the last one is pending."""
        return len(self.tokens) - 1 - self.filled

    def read(self, tokens: list[int], stop: int, report: Report) -> str:
        """Take in what a call has added; returns the new text."""
        handle = self.handle
        if handle.logprobs is not None:
            handle.logprobs += [self._logprob(report, n, token) for n, token in enumerate(tokens)]
        piece = self.row.advance(tokens, stop)
        handle.text, handle.tokens = self.row.text.text, self.row.text.tokens
        if handle.logprobs is not None:
            handle.logprobs = handle.logprobs[: len(handle.tokens)]
        return piece

    def completion(self, reason: str, rows: int, ran_on: tuple[str, str], draft: str | None) -> Completion:
        """What has come of it by now. draft: the name of the engine's draft, if it ran ahead of this request."""
        handle, now = self.handle, time.perf_counter()
        started = self.ready_at or now
        decoding = max(now - started, 1e-9)
        ahead = None
        if draft is not None and self.report is not None:
            ahead = summary(draft, self.report.tally, self.slot, self.report.propose_B[self.slot] == 0)
        stats = Stats(
            prefill_seconds=started - handle.timing.admitted,
            decode_seconds=decoding,
            compile_seconds=0.0,
            tokens_per_second=len(handle.tokens) / decoding,
            rows=rows,
            device=ran_on[0],
            matmul=ran_on[1],
            speculative=ahead,
        )
        return Completion(handle.text, handle.tokens, handle.prompt_tokens, reason, stats, handle.logprobs)

    def _logprob(self, report: Report, n: int, token: int) -> TokenLogprob:
        """Of token n of a report."""
        most = self.handle.settings.logprobs
        ids, values = report.top_ids_BNK[self.slot, n, :most], report.top_BNK[self.slot, n, :most]
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return TokenLogprob(token, float(report.chosen_BN[self.slot, n]), top)
