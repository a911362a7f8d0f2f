"""Decoding: from prompts to text, on the device from token to token."""

from realm_jax.decode.completion import Completion, Stats, TokenLogprob
from realm_jax.decode.generate import TextStream, generate, stream
from realm_jax.decode.loop import DecodeState, Stop
from realm_jax.decode.sampling import SamplingParams
from realm_jax.decode.settings import Settings

__all__ = [
    "Completion",
    "DecodeState",
    "SamplingParams",
    "Settings",
    "Stats",
    "Stop",
    "TextStream",
    "TokenLogprob",
    "generate",
    "stream",
]
