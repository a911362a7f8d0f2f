"""What became of a draft's proposals, and how many it is to make next. Called by `decode.speculative`.

Shapes: B rows, G draft tokens a round, J = G + 1 places that are verified.
"""

import jax
import jax.numpy as jnp
from flax import struct

from realm_jax.decode.completion import Speculative
from realm_jax.decode.drafts import Draft
from realm_jax.decode.speedup import best_length, expected_speedup

MEMORY = 0.9
"""How much of the estimate of a row's acceptance each round keeps."""
FIRST_GUESS = 0.7
"""A row's acceptance before anything is known of it."""
PATIENCE = 8.0
"""Proposals that a row's estimate starts from, and that must be judged before it may end speculation."""
LOSS = 0.95
"""Speed over that of plain decoding, as expected from its acceptance, below which a row with a fixed length ends it."""


@struct.dataclass
class Tally:
    """What became of the proposals of each row; int32. Only rounds in which the row was running count.

    rounds_B: target forward passes. tokens_B: tokens that they gave, one that ended the row included: the passes of
    plain decoding. drafted_BG, reached_BG, accepted_BG: how often place j of a round was proposed; was judged, all
    before it having been accepted and the row going on; was accepted. histogram_BJ: rounds by how many proposals were
    accepted.
    """

    rounds_B: jax.Array
    tokens_B: jax.Array
    drafted_BG: jax.Array
    reached_BG: jax.Array
    accepted_BG: jax.Array
    histogram_BJ: jax.Array

    @classmethod
    def empty(cls, rows: int, draft_tokens: int) -> "Tally":
        """Nothing counted yet, for rounds of so many draft tokens."""
        by_row, by_place = (rows,), (rows, draft_tokens)
        shapes = (by_row, by_row, by_place, by_place, by_place, (rows, draft_tokens + 1))
        return cls(*(jnp.zeros(shape, jnp.int32) for shape in shapes))  # no two the same buffer: they are donated

    def add(
        self, drafted_BG: jax.Array, judged_BG: jax.Array, taken_BG: jax.Array, tokens_B: jax.Array, ready_B: jax.Array
    ) -> "Tally":
        """With one round more of the rows that are ready: what was proposed, judged and accepted, all bool."""
        accepted_BJ = taken_BG.sum(1)[:, None] == jnp.arange(self.histogram_BJ.shape[1])
        return Tally(
            rounds_B=self.rounds_B + ready_B,
            tokens_B=self.tokens_B + tokens_B,
            drafted_BG=self.drafted_BG + drafted_BG,
            reached_BG=self.reached_BG + judged_BG,
            accepted_BG=self.accepted_BG + taken_BG,
            histogram_BJ=self.histogram_BJ + (accepted_BJ & ready_B[:, None]),
        )

    def add_plain(self, ready_B: jax.Array) -> "Tally":
        """With one step more of plain decoding of the rows that are ready."""
        none_BG = jnp.zeros(self.drafted_BG.shape, bool)
        return self.add(none_BG, none_BG, none_BG, ready_B.astype(jnp.int32), ready_B)


def summary(draft: str, tally: Tally, row: int, gave_up: bool) -> Speculative:
    """What speculation did for one row; draft: its name, tally: on the host."""
    accepted, judged = tally.accepted_BG[row].tolist(), tally.reached_BG[row].tolist()
    return Speculative(
        draft=draft,
        rounds=int(tally.rounds_B[row]),
        tokens=int(tally.tokens_B[row]),
        drafted=int(tally.drafted_BG[row].sum()),
        accepted=sum(accepted),
        by_position=tuple(yes / of if of else None for yes, of in zip(accepted, judged, strict=True)),
        judged=tuple(judged),
        histogram=tuple(tally.histogram_BJ[row].tolist()),
        gave_up=bool(gave_up),
    )


def estimate(
    accepted_B: jax.Array, judged_B: jax.Array, judged_BG: jax.Array, taken_BG: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The fading sums of proposals accepted and judged, (B,) float32 each, after one round more."""
    keep_B = jnp.where(judged_BG.any(1), MEMORY, 1.0)
    return keep_B * accepted_B + taken_BG.sum(1), keep_B * judged_B + judged_BG.sum(1)


def next_length(draft: Draft, tally: Tally, acceptance_B: jax.Array, propose_B: jax.Array) -> jax.Array:
    """How many tokens to propose next, (B,) int32.

    Adaptive: as many as the row's acceptance makes worth their cost, from the fading estimate `acceptance_B`. Fixed:
    all. Either way none any more once the acceptance seen says that speculation loses: a draft that fell behind does
    not catch up.
    """
    seen_B = tally.reached_BG.sum(1)
    if draft.adaptive:
        best_B = best_length(acceptance_B, draft.cost, draft.tokens)
        next_B = jnp.where(seen_B >= PATIENCE, best_B, jnp.maximum(best_B, 1))
    else:
        overall_B = tally.accepted_BG.sum(1) / jnp.maximum(seen_B, 1)
        loses_B = expected_speedup(overall_B, draft.tokens, draft.cost) < LOSS
        next_B = jnp.where(loses_B & (seen_B >= 4 * PATIENCE), 0, draft.tokens)
    # The type is said: that of two Python numbers would be a weak one, and compile once more all that takes it.
    return jnp.where(propose_B == 0, 0, next_B).astype(jnp.int32)
