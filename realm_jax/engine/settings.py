"""What can be chosen about an engine beside its model, slots, adapters and draft."""

import dataclasses

from realm_jax.decode.settings import whole_number
from realm_jax.errors import RequestError
from realm_jax.model.cache import DTYPES


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Options of an engine.

    cache_dtype: of keys and values: float32, bfloat16, float16, or int8. steps: of decoding (with a draft: rounds) in a
    call of the device; more hide the host's work better, fewer let new requests in sooner. prefill_tokens: of prompts,
    between two such calls, about: a long prompt keeps others waiting no longer. prefix_rows: prompts that are kept for
    others that begin alike; 0: none. max_logit_bias: entries of a request's logit bias at most. max_logprobs: top
    log-probabilities a request may ask for; they cost time for all.
    """

    cache_dtype: str = "float32"
    steps: int = 8
    prefill_tokens: int = 512
    prefix_rows: int = 4
    max_logit_bias: int = 64
    max_logprobs: int = 0

    def checked(self, slots: int | None, max_len: int) -> "EngineSettings":
        """These settings, if they make sense with so many slots (None: to be chosen) of so many tokens.

        Raises RequestError naming the first number that does not.
        """
        least = {"steps": 1, "prefill_tokens": 16, "prefix_rows": 0, "max_logit_bias": 0, "max_logprobs": 0}
        for name, low in least.items():
            whole_number(name, getattr(self, name), low)
        whole_number("max_len", max_len, 2)
        if slots is not None:
            whole_number("slots", slots, 1)
        if self.cache_dtype not in DTYPES:
            raise RequestError(f"cache_dtype is {self.cache_dtype!r}; it must be one of {', '.join(DTYPES)}")
        return self
