"""How the scales of an adapter are written as alphas: one for each weight (PEFT), or one for all (GGUF).

Shape suffixes: none; scales are float32, `rank` is that of a weight.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np


def peft_alpha(scale: float, rank: int) -> int | float:
    """The alpha whose quotient by the rank is exactly this float32 scale; a whole number where one does it."""
    alpha = float(scale) * rank
    whole = round(alpha)
    return whole if whole and np.float32(whole / rank) == np.float32(scale) else alpha


def gguf_alpha(scales: Sequence[tuple[float, int]]) -> float:
    """The one alpha (float32) that gives most weights, as (scale, rank), their scale. 0 stands for the scale 1."""
    # A scale of (nearly) nothing has no say: its alpha would be 0, or leave no digits to the other weights.
    voters = [(np.float32(scale), np.float32(rank)) for scale, rank in scales if abs(scale) > 1e-30]
    served = Counter(alpha for scale, rank in voters for alpha in _exact_alphas(scale, rank))
    if served:
        return max(served, key=lambda alpha: (served[alpha], alpha != 0))
    return float(voters[0][0] * voters[0][1]) if voters else 1.0


def gguf_factor(alpha: float, scale: float, rank: int) -> float:
    """What b must be multiplied by so that a weight gets its scale from an alpha that is not its own; 1.0 for nothing.

    Where no float32 alpha gives a scale exactly, the scale moves by its last bit in place of all of b.
    """
    acts = _acts(np.float32(alpha), np.float32(rank))
    factor = float(scale) / float(acts)
    return 1.0 if abs(factor - 1) < 2.0**-22 else factor


def _exact_alphas(scale: np.float32, rank: np.float32) -> set[float]:
    near = np.float32(scale * rank)
    ways = {np.float32(round(float(near))), near, np.nextafter(near, np.float32(-np.inf))}
    ways |= {np.nextafter(near, np.float32(np.inf)), np.float32(0)}
    found = [float(alpha) for alpha in ways if _acts(alpha, rank) == scale]
    return {min(found, key=lambda alpha: (alpha == 0, len(repr(alpha))))} | ({0.0} & set(found)) if found else set()


def _acts(alpha: np.float32, rank: np.float32) -> np.float32:
    """The scale that llama.cpp computes from them."""
    return alpha / rank if alpha else np.float32(1)
