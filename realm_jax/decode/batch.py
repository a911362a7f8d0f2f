"""One batch of requests from prompt to completions: the host's loop around the device's. Called by `decode.generate`.

The device runs without a question from the host until every row is done, unless text is streamed or a row has stop
strings: then it runs in stretches of a few steps, and the host reads the text between them.
"""

import time
from collections.abc import Generator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.compilation import compile_seconds
from realm_jax.decode import buckets, speculative
from realm_jax.decode.completion import Completion, Speculative, Stats, TokenLogprob
from realm_jax.decode.draft_models import PreparedDraft
from realm_jax.decode.loop import DecodeState, LogprobBuffers, Stop, decode, init_state, prefill
from realm_jax.decode.prompts import Request
from realm_jax.decode.row import Row, not_finite
from realm_jax.decode.tally import summary
from realm_jax.errors import RealmError
from realm_jax.kernels.matmul import choose_impl
from realm_jax.lora.stack import AdapterLike, deltas_for
from realm_jax.model.model import Model
from realm_jax.model.params import Params

STRETCH = 16
"""Most steps between two looks at the text; what a row generates beyond a stop string is thrown away."""
STREAM_SECONDS = 0.05
"""A stream's stretches are shortened to come about this often."""
UNBOUNDED = 2**31 - 1


class _Clock:
    """Splits the time of a call into prefill, decoding and compiling."""

    def __init__(self):
        self.seconds = {"prefill": 0.0, "decode": 0.0, "compile": 0.0}

    def add(self, name: str, started: float, compiled: float) -> float:
        """Book the time since `started`; returns the part that was not compiling."""
        compiling = compile_seconds() - compiled
        running = max(time.perf_counter() - started - compiling, 1e-6)
        self.seconds[name] += running
        self.seconds["compile"] += compiling
        return running


def batch_deltas(
    model: Model, adapter: AdapterLike | None, index: Sequence[int] | None, requests: int
) -> Params | None:
    """The deltas for a batch of so many requests; index: which entry of a stack each of them takes, one a request."""
    if index is None:
        return deltas_for(model, adapter)
    return deltas_for(model, adapter, [*index, *[0] * (buckets.power_of_two(requests) - requests)])


def run_batch(
    model: Model,
    requests: Sequence[Request],
    streams: bool = False,
    deltas: Params | None = None,
    draft: PreparedDraft | None = None,
) -> Generator[tuple[int, str], None, list[Completion]]:
    """Decode `requests` together. Yields (index of the prompt, next piece of its text); returns the completions.

    streams: pieces come as they are generated, not all at the end. deltas: of an adapter, from `batch_deltas`. draft:
    for speculative decoding, where a stretch counts rounds. Raises RealmError if a row's logits are not finite.
    """
    clock = _Clock()
    rows = [Row(len(request.tokens), request.settings, model.tokenizer) for request in requests]
    device = _Device(model, deltas, draft)
    device.prefill(requests, clock)
    stretch = 1 if streams else _stretch(rows)
    while any(row.reason is None for row in rows):
        started, compiled = time.perf_counter(), compile_seconds()
        device.decode(stretch)
        tokens_BS, length_B, stop_B = jax.device_get((device.rows.tokens_BS, device.rows.length_B, device.rows.stop_B))
        took = clock.add("decode", started, compiled)
        for b, row in enumerate(rows):
            if row.reason is None and (piece := row.advance(tokens_BS[b, row.read : length_B[b]].tolist(), stop_B[b])):
                yield requests[b].index, piece
        device.end_stopped(rows, stop_B)
        stretch = _next_stretch(stretch, took) if streams else _stretch(rows)
    return _completions(model, requests, rows, device, clock)


class _Device:
    """The batch on the device: plain rows, or rows that a draft runs ahead of."""

    def __init__(self, model: Model, deltas: Params | None, draft: PreparedDraft | None):
        self._model, self._deltas, self.draft = model, deltas, draft
        self.state: DecodeState | speculative.SpeculativeState | None = None

    @property
    def rows(self) -> DecodeState:
        """The decoding state, without what speculation adds."""
        return self.state if self.draft is None else self.state.decode

    def prefill(self, requests: Sequence[Request], clock: _Clock) -> None:
        """A fresh state, padded to buckets; if there is something to generate, with every prompt in all caches."""
        model, started, compiled = self._model, time.perf_counter(), compile_seconds()
        prompt = max(len(r.tokens) for r in requests)
        budget = max(r.settings.max_new_tokens for r in requests)
        rows = buckets.power_of_two(len(requests))
        state = init_state(
            model.config,
            [r.tokens for r in requests],
            [r.settings for r in requests],
            model.tokenizer.eog_ids if model.tokenizer else (),
            rows=rows,
            size=buckets.cache_bucket(min(prompt + budget, model.config.context_length)),
        )
        chunks = buckets.prefill_chunks(prompt - 1, rows) if budget else []
        for chunk in chunks:
            state = prefill(model.params, model.config, state, chunk, self._deltas)
        self.state = state
        if self.draft is not None:
            self.state = speculative.begin(state, self.draft.draft)
            for chunk in chunks:
                self.state = speculative.prefill_draft(self.draft.draft, self.state, chunk)
        self.rows.cache.length_B.block_until_ready()
        clock.add("prefill", started, compiled)

    def decode(self, stretch: int) -> None:
        """So many steps, or rounds."""
        model = self._model
        if self.draft is None:
            self.state = decode(model.params, model.config, self.state, stretch, self._deltas)
        else:
            draft = self.draft.draft
            self.state = speculative.decode(model.params, model.config, draft, self.state, stretch, self._deltas)

    def end_stopped(self, rows: Sequence[Row], stop_B: np.ndarray) -> None:
        """Tell the device of rows that a stop string has ended."""
        ended = [b for b, row in enumerate(rows) if row.reason is Stop.STOP and stop_B[b] == Stop.RUNNING]
        if not ended:
            return
        stop_B = stop_B.copy()
        stop_B[ended] = Stop.STOP
        after = self.rows.replace(stop_B=jnp.array(stop_B))
        self.state = after if self.draft is None else self.state.replace(decode=after)


def _stretch(rows: Sequence[Row]) -> int:
    """How long the device may run before the host must look for stop strings."""
    return STRETCH if any(row.reason is None and row.settings.stop for row in rows) else UNBOUNDED


def _next_stretch(stretch: int, seconds: float) -> int:
    """The next stretch of a stream, after one of `stretch` steps that took `seconds`: about STREAM_SECONDS long."""
    return max(1, min(STRETCH, 2 * stretch, int(stretch * STREAM_SECONDS / seconds)))


def _completions(
    model: Model, requests: Sequence[Request], rows: Sequence[Row], device: _Device, clock: _Clock
) -> list[Completion]:
    for request, row in zip(requests, rows, strict=True):
        if row.reason is Stop.FAILED:
            raise RealmError(not_finite(f"prompt {request.index}", row.read))
    buffers = jax.device_get(device.rows.logprobs)
    ahead = [None] * len(rows)
    if device.draft is not None:
        tally, propose_B = jax.device_get((device.state.tally, device.state.propose_B))
        ahead = [summary(device.draft.name, tally, b, propose_B[b] == 0) for b in range(len(rows))]
    return [_completion(model, rows, b, buffers, clock, ahead[b]) for b in range(len(rows))]


def _completion(
    model: Model, rows: Sequence[Row], b: int, buffers: LogprobBuffers | None, clock: _Clock, ahead: Speculative | None
) -> Completion:
    row, tokens = rows[b], rows[b].text.tokens
    device, matmul = ran_on(model, len(rows))
    stats = Stats(
        prefill_seconds=clock.seconds["prefill"],
        decode_seconds=clock.seconds["decode"],
        compile_seconds=clock.seconds["compile"],
        tokens_per_second=len(tokens) / clock.seconds["decode"] if tokens else 0.0,
        rows=len(rows),
        device=device,
        matmul=matmul,
        speculative=ahead,
    )
    logprobs = None if buffers is None else _logprobs(buffers, b, row.prompt_tokens, tokens)
    return Completion(row.text.text, tokens, row.prompt_tokens, row.reason.name.lower(), stats, logprobs)


def _logprobs(buffers: LogprobBuffers, b: int, start: int, tokens: list[int]) -> list[TokenLogprob]:
    ids = buffers.top_ids_BSN[b].tolist()
    values = buffers.top_BSN[b].tolist()
    return [
        TokenLogprob(token, float(buffers.chosen_BS[b, i]), tuple(zip(ids[i], values[i], strict=True)))
        for i, token in enumerate(tokens, start)
    ]


def ran_on(model: Model, rows: int) -> tuple[str, str]:
    """The kind of device that holds the weights, and the matmul implementations that a step of so many rows uses."""
    layer = model.params.layers[0]
    weights = [layer.attn.q, layer.ffn.gate, layer.ffn.down]
    device = next(iter(jax.tree.leaves(model.params)[0].devices())).device_kind
    return device, "+".join(sorted({choose_impl((rows, 1, w.shape[1]), w) for w in weights}))
