"""What generation returns: plain frozen records for the host. Made by `decode.batch`."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A generated token's log-probability, and those of the most likely tokens at its place, best first.

    They are the model's own, before logit bias, penalties, truncation and temperature. top: pairs (token, logprob).
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Speculative:
    """What speculation did for one completion.

    draft: its name. rounds: target forward passes. tokens: that these gave, one that ended the completion and those
    behind a stop string included: plain decoding takes as many passes. drafted, accepted: proposals made and kept.
    by_position: for each place of a round, the share accepted of those that were judged there, all before them having
    been accepted; None where none was. judged: how many those were. histogram: rounds by the number of proposals
    accepted, from 0. gave_up: acceptance was too low for the cost of the draft, and decoding went on without.
    """

    draft: str
    rounds: int
    tokens: int
    drafted: int
    accepted: int
    by_position: tuple[float | None, ...]
    judged: tuple[int, ...]
    histogram: tuple[int, ...]
    gave_up: bool

    @property
    def mean_accepted(self) -> float:
        """Proposals kept a round."""
        return self.accepted / self.rounds if self.rounds else 0.0

    @property
    def forwards_saved(self) -> int:
        """Target forward passes that plain decoding would have needed beyond these."""
        return self.tokens - self.rounds

    def as_dict(self) -> dict[str, Any]:
        """All of it, `mean_accepted` and `forwards_saved` too, as JSON can hold it."""
        return dataclasses.asdict(self) | {"mean_accepted": self.mean_accepted, "forwards_saved": self.forwards_saved}


@dataclasses.dataclass(frozen=True)
class Stats:
    """How long a completion's batch took, and what it ran on.

    prefill_seconds and decode_seconds are those of the whole batch without compile_seconds, the time spent tracing and
    compiling programs, or fetching them from the compilation cache (0 once a size has been seen).
    tokens_per_second: this completion's own tokens over decode_seconds. rows: completions in the batch, this one
    included. device: its kind, as JAX names it. matmul: the implementation of `kernels.matmul` that decoding used
    (several: joined by "+"). speculative: None for plain decoding.
    """

    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    tokens_per_second: float
    rows: int
    device: str
    matmul: str
    speculative: Speculative | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model made of one prompt.

    text: of the generated tokens, without the prompt. tokens: generated ids, without the end-of-generation token; if
    a stop string was met, those whose text begins before it. prompt_tokens: length of the prompt. stop_reason: "eos",
    "stop" (a stop string) or "length" (the token budget or the model's context is used up). logprobs: one entry a
    token, or None if not asked for. An engine adds "cancelled"; stats is None for what never had a slot there.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    stop_reason: str
    stats: Stats | None
    logprobs: list[TokenLogprob] | None = None
