"""What generation returns: plain frozen records for the host. Made by `decode.batch`."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A generated token's log-probability, and those of the most likely tokens at its place, best first.

    They are the model's own, before logit bias, penalties, truncation and temperature. top: pairs (token, logprob).
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Stats:
    """How long a completion's batch took, and what it ran on.

    prefill_seconds and decode_seconds are those of the whole batch without compile_seconds, the time spent tracing and
    compiling programs, or fetching them from the compilation cache (0 once a size has been seen).
    tokens_per_second: this completion's own tokens over decode_seconds. rows: completions in the batch, this one
    included. device: its kind, as JAX names it. matmul: the implementation of `kernels.matmul` that decoding used
    (several: joined by "+").
    """

    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    tokens_per_second: float
    rows: int
    device: str
    matmul: str


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model made of one prompt.

    text: of the generated tokens, without the prompt. tokens: generated ids, without the end-of-generation token; if
    a stop string was met, those whose text begins before it. prompt_tokens: length of the prompt. stop_reason: "eos",
    "stop" (a stop string) or "length" (the token budget or the model's context is used up). logprobs: one entry a
    token, or None if not asked for.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    stop_reason: str
    stats: Stats
    logprobs: list[TokenLogprob] | None = None
