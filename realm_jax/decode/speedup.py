"""What speculation is worth: the theory of Leviathan et al. 2023 (https://arxiv.org/abs/2211.17192, section 3).

a is the probability that a draft token is accepted, given that those before it were; g draft tokens are proposed a
round; c is the time of one draft token over that of one target step.
"""

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.errors import RequestError


def expected_tokens(a: jax.Array | float, g: jax.Array | int) -> jax.Array:
    """Tokens a round gives on average: 1 + a + ... + a^g = (1 - a^(g + 1)) / (1 - a)."""
    a = jnp.clip(jnp.asarray(a, jnp.float32), 0.0, 1.0)
    safe = jnp.where(a == 1, 0.5, a)
    many = -jnp.expm1((g + 1.0) * jnp.log1p(safe - 1)) / (1 - safe)  # 1 - a^(g + 1) would lose its digits near a = 1
    return jnp.where(a == 1, g + 1.0, many)


def expected_speedup(a: jax.Array | float, g: jax.Array | int, c: jax.Array | float) -> jax.Array:
    """Tokens a second over those of plain decoding, where verifying g + 1 tokens takes no longer than one step."""
    return expected_tokens(a, g) / (1 + g * jnp.asarray(c, jnp.float32))


def best_length(a: jax.Array, c: jax.Array | float, most: int) -> jax.Array:
    """The number of draft tokens, 0 to `most`, of which the most speed is expected; int32, of the shape of a."""
    speeds = jnp.stack([expected_speedup(a, g, c) for g in range(most + 1)])
    return jnp.argmax(speeds, axis=0).astype(jnp.int32)


def break_even(g: int, c: float) -> float:
    """The acceptance above which g draft tokens a round are faster than plain decoding; above 1 where none is.

    With one draft token, or a small c, that is about c. RequestError for g below 1 or a negative c.
    """
    if g < 1 or not c >= 0:
        raise RequestError(f"break_even wants draft tokens g >= 1 and a cost ratio c >= 0; got g = {g}, c = {c}")
    # sum of a^i for i = 1..g must be g c: it rises with a, from 0 to g.
    roots = np.roots([*np.ones(g), -g * c])
    real = roots[(abs(roots.imag) < 1e-9) & (roots.real >= 0)].real
    return float(real.max()) if c <= 1 and len(real) else float("inf")
