"""What a caller asks of a generation, checked, and packed into the arrays the device works with.

`Settings` is the host's side of a request, `sampling.SamplingParams` the device's. Called by `decode.generate`, and
meant for the engine, whose requests carry the same numbers.
"""

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.decode.sampling import SamplingParams
from realm_jax.errors import RequestError

MAX_STOPS = 64
MAX_STOP_LENGTH = 1024
MAX_TOP_LOGPROBS = 128
COLDEST = 1e-6
"""Temperatures below this are greedy: their distribution is an argmax in float32, ties aside."""
LARGEST = 1e6
"""Bound of penalties (and its inverse that of the repetition penalty), so that float32 logits stay finite."""
LARGEST_BIAS = 1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How to go on with one prompt; the defaults are greedy decoding of at most 64 tokens.

    max_new_tokens >= 0. temperature: 0 (and below 1e-6) is greedy. top_k: 0 is off. top_p in (0, 1], 1 is off. min_p
    in [0, 1], 0 is off. repetition_penalty in [1e-6, 1e6], 1 is off; presence_penalty and frequency_penalty of
    magnitude at most 1e6, 0 is off. logit_bias: token id -> value added to its logit, at
    most 1e30; -inf bans the token. stop: text ends
    before the first of these strings. seed: 0 <= seed < 2**64. logprobs: how many top tokens to report beside each
    chosen one, 0 for no log-probabilities at all. The meaning of the sampling rules is in `decode.sampling`.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    stop: str | Sequence[str] = ()
    seed: int = 0
    logprobs: int = 0

    def checked(self, vocab_size: int) -> "Settings":
        """These settings with every value in range and of its own type (stop a tuple, logit_bias a dict).

        Raises RequestError naming the first value that is not.
        """
        return Settings(
            max_new_tokens=whole_number("max_new_tokens", self.max_new_tokens, 0),
            temperature=_real("temperature", self.temperature, 0.0, float(np.finfo(np.float32).max)),
            top_k=whole_number("top_k", self.top_k, 0),
            top_p=_real("top_p", self.top_p, 0.0, 1.0, above=True),
            min_p=_real("min_p", self.min_p, 0.0, 1.0),
            repetition_penalty=_real("repetition_penalty", self.repetition_penalty, 1 / LARGEST, LARGEST),
            presence_penalty=_real("presence_penalty", self.presence_penalty, -LARGEST, LARGEST),
            frequency_penalty=_real("frequency_penalty", self.frequency_penalty, -LARGEST, LARGEST),
            logit_bias=_bias(self.logit_bias or {}, vocab_size),
            stop=_stops(self.stop),
            seed=whole_number("seed", self.seed, 0, 2**64 - 1),
            logprobs=whole_number("logprobs", self.logprobs, 0, min(MAX_TOP_LOGPROBS, vocab_size)),
        )

    @property
    def greedy(self) -> bool:
        """Whether every draw is an argmax."""
        return self.temperature < COLDEST

    @property
    def penalizes(self) -> bool:
        """Whether the tokens so far change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def pack(settings: Sequence[Settings], rows: int, vocab_size: int, *, mixed_bias: int | None = None) -> SamplingParams:
    """The sampling parameters of a batch of `rows` rows; rows beyond the settings are greedy padding.

    The static switches are those the rows need together; the width of the bias table is 0 or a power of 4 from 16, so
    that few variants are compiled. mixed_bias: of rows that come and go: all switches are on (`SamplingParams.mixed`),
    and the bias table has this width, which no row exceeds.
    """
    settings = [*settings, *[Settings()] * (rows - len(settings))]
    sampled = [s for s in settings if not s.greedy]
    mixed = mixed_bias is not None
    ids_BE, values_BE = _pack_bias(settings, vocab_size, mixed_bias)

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(s, name) for s in settings], dtype)

    packed = SamplingParams(
        temperature=np.array([0.0 if s.greedy else s.temperature for s in settings], np.float32),
        top_k=np.array([min(s.top_k, vocab_size) for s in settings], np.int32),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        repetition_penalty=column("repetition_penalty", np.float32),
        presence_penalty=column("presence_penalty", np.float32),
        frequency_penalty=column("frequency_penalty", np.float32),
        bias_ids=ids_BE,
        bias_values=values_BE,
        penalize=mixed or any(s.penalizes for s in settings),
        sample=mixed or bool(sampled),
        truncate=mixed or any(s.top_k > 0 or s.top_p < 1 for s in sampled),
        mixed=mixed,
    )
    return jax.tree.map(jnp.asarray, packed)


def row_keys(seeds: Sequence[int]) -> jax.Array:
    """One typed PRNG key a seed, shape (len(seeds),).

    All 64 bits count, whatever `jax_enable_x64` and `jax_default_prng_impl` say; for seeds below 2**32 the key is
    that of `jax.random.key(seed)` with JAX's own defaults.
    """
    words = np.array([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], np.uint32).reshape(-1, 2)
    return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")


def _pack_bias(
    settings: Sequence[Settings], vocab_size: int, width: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    if width is None:
        entries = max((len(s.logit_bias or {}) for s in settings), default=0)
        width = 0 if entries == 0 else 16
        while width < entries:
            width *= 4
    ids_BE = np.full((len(settings), width), vocab_size, np.int32)
    values_BE = np.zeros((len(settings), width), np.float32)
    for row, s in enumerate(settings):
        for i, (token, value) in enumerate((s.logit_bias or {}).items()):
            ids_BE[row, i], values_BE[row, i] = token, value
    return ids_BE, values_BE


def whole_number(name: str, value: int, low: int, high: int | None = None) -> int:
    """`value` as an int between the bounds. Raises RequestError that names it."""
    allowed = f"a whole number, {low} or more" if high is None else f"a whole number from {low} to {high}"
    try:
        number = operator.index(value)
    except TypeError:
        raise RequestError(f"{name} is {value!r}; it must be {allowed}") from None
    if isinstance(value, bool) or number < low or (high is not None and number > high):
        raise RequestError(f"{name} is {value!r}; it must be {allowed}")
    return number


def _real(name: str, value: float, low: float, high: float, above: bool = False) -> float:
    """`value` as a float between the bounds; `above`: the lower one is not allowed itself."""
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high or (above and np.float32(number) <= low):
        allowed = f"a number above {low:g}, at most {high:g}" if above else f"a number from {low:g} to {high:g}"
        raise RequestError(f"{name} is {value!r}; it must be {allowed}")
    return number


def _bias(bias: Mapping[int, float], vocab_size: int) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise RequestError(f"logit_bias is a {type(bias).__name__}; it must be a mapping of token ids to numbers")
    checked = {}
    for key, value in bias.items():
        token = whole_number("a token id of logit_bias", key, 0, vocab_size - 1)
        checked[token] = _real(f"logit_bias[{token}]", value, -math.inf, LARGEST_BIAS)
        if checked[token] < -LARGEST_BIAS:
            checked[token] = -math.inf
    if len(checked) == vocab_size and all(value == -math.inf for value in checked.values()):
        raise RequestError("logit_bias bans every token of the vocabulary; at least one must be left")
    return checked


def _stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or not all(isinstance(s, str) for s in stops):
        raise RequestError(f"stop is {stop!r}; it must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise RequestError(f"stop has {len(stops)} strings; at most {MAX_STOPS} are allowed")
    for i, s in enumerate(stops):
        if not 0 < len(s) <= MAX_STOP_LENGTH:
            raise RequestError(f"stop[{i}] has {len(s)} characters; it must have from 1 to {MAX_STOP_LENGTH}")
    return tuple(dict.fromkeys(stops))
