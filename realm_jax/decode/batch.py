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
from realm_jax.decode.stop import RowText
from realm_jax.decode.tally import Tally
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


class _Row:
    """The host's view of one row: how many tokens it has read, their text, and why the row ended (None: it has not)."""

    def __init__(self, request: Request, model: Model):
        self.request = request
        self.text = RowText(model.tokenizer.stream(continues=True) if model.tokenizer else None, request.settings.stop)
        self.reason: Stop | None = None if request.settings.max_new_tokens else Stop.LENGTH
        self._read = len(request.tokens)

    def advance(self, tokens_S: np.ndarray, length: int, stop: int) -> str:
        """Read what the device has added; returns the new text."""
        pieces = [self.text.push(token) for token in tokens_S[self._read : length].tolist()]
        self._read = length
        if stop != Stop.RUNNING and not self.text.stopped:
            pieces.append(self.text.finish())
        if self.text.stopped:
            self.reason = Stop.STOP
        elif stop != Stop.RUNNING:
            self.reason = Stop(stop)
        return "".join(pieces)


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
    rows = [_Row(request, model) for request in requests]
    device = _Device(model, deltas, draft)
    device.prefill(requests, clock)
    stretch = 1 if streams else _stretch(rows)
    while any(row.reason is None for row in rows):
        started, compiled = time.perf_counter(), compile_seconds()
        device.decode(stretch)
        tokens_BS, length_B, stop_B = jax.device_get((device.rows.tokens_BS, device.rows.length_B, device.rows.stop_B))
        took = clock.add("decode", started, compiled)
        for b, row in enumerate(rows):
            if row.reason is None and (piece := row.advance(tokens_BS[b], length_B[b], stop_B[b])):
                yield row.request.index, piece
        device.end_stopped(rows, stop_B)
        stretch = _next_stretch(stretch, took) if streams else _stretch(rows)
    return _completions(model, rows, device, clock)


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

    def end_stopped(self, rows: Sequence[_Row], stop_B: np.ndarray) -> None:
        """Tell the device of rows that a stop string has ended."""
        ended = [b for b, row in enumerate(rows) if row.reason is Stop.STOP and stop_B[b] == Stop.RUNNING]
        if not ended:
            return
        stop_B = stop_B.copy()
        stop_B[ended] = Stop.STOP
        after = self.rows.replace(stop_B=jnp.array(stop_B))
        self.state = after if self.draft is None else self.state.replace(decode=after)


def _stretch(rows: Sequence[_Row]) -> int:
    """How long the device may run before the host must look for stop strings."""
    return STRETCH if any(row.reason is None and row.request.settings.stop for row in rows) else UNBOUNDED


def _next_stretch(stretch: int, seconds: float) -> int:
    """The next stretch of a stream, after one of `stretch` steps that took `seconds`: about STREAM_SECONDS long."""
    return max(1, min(STRETCH, 2 * stretch, int(stretch * STREAM_SECONDS / seconds)))


def _completions(model: Model, rows: Sequence[_Row], device: _Device, clock: _Clock) -> list[Completion]:
    buffers = jax.device_get(device.rows.logprobs)
    ahead = [None] * len(rows)
    if device.draft is not None:
        tally, propose_B = jax.device_get((device.state.tally, device.state.propose_B))
        ahead = [_speculative(device.draft.name, tally, b, propose_B[b] == 0) for b in range(len(rows))]
    return [_completion(model, rows, b, buffers, clock, ahead[b]) for b in range(len(rows))]


def _completion(
    model: Model, rows: Sequence[_Row], b: int, buffers: LogprobBuffers | None, clock: _Clock, ahead: Speculative | None
) -> Completion:
    row, tokens, prompt_tokens = rows[b], rows[b].text.tokens, len(rows[b].request.tokens)
    if row.reason is Stop.FAILED:
        where = f"prompt {row.request.index}, after {prompt_tokens + len(tokens)} tokens"
        raise RealmError(f"{where}: the model's logits are not finite; its weights are broken, or overflow")
    stats = Stats(
        prefill_seconds=clock.seconds["prefill"],
        decode_seconds=clock.seconds["decode"],
        compile_seconds=clock.seconds["compile"],
        tokens_per_second=len(tokens) / clock.seconds["decode"] if tokens else 0.0,
        rows=len(rows),
        device=next(iter(jax.tree.leaves(model.params)[0].devices())).device_kind,
        matmul=_matmul(model, len(rows)),
        speculative=ahead,
    )
    logprobs = None if buffers is None else _logprobs(buffers, b, prompt_tokens, tokens)
    return Completion(row.text.text, tokens, prompt_tokens, row.reason.name.lower(), stats, logprobs)


def _speculative(draft: str, tally: Tally, b: int, gave_up: bool) -> Speculative:
    accepted, judged = tally.accepted_BG[b].tolist(), tally.reached_BG[b].tolist()
    return Speculative(
        draft=draft,
        rounds=int(tally.rounds_B[b]),
        tokens=int(tally.tokens_B[b]),
        drafted=int(tally.drafted_BG[b].sum()),
        accepted=sum(accepted),
        by_position=tuple(yes / of if of else None for yes, of in zip(accepted, judged, strict=True)),
        judged=tuple(judged),
        histogram=tuple(tally.histogram_BJ[b].tolist()),
        gave_up=bool(gave_up),
    )


def _logprobs(buffers: LogprobBuffers, b: int, start: int, tokens: list[int]) -> list[TokenLogprob]:
    ids = buffers.top_ids_BSN[b].tolist()
    values = buffers.top_BSN[b].tolist()
    return [
        TokenLogprob(token, float(buffers.chosen_BS[b, i]), tuple(zip(ids[i], values[i], strict=True)))
        for i, token in enumerate(tokens, start)
    ]


def _matmul(model: Model, rows: int) -> str:
    """The matmul implementations that a decoding step of `rows` rows uses."""
    layer = model.params.layers[0]
    weights = [layer.attn.q, layer.ffn.gate, layer.ffn.down]
    return "+".join(sorted({choose_impl((rows, 1, w.shape[1]), w) for w in weights}))
