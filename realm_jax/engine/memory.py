"""How much memory slots take, and how many fit. Called by the engine when it starts."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp

from realm_jax.decode.drafts import Draft
from realm_jax.errors import RealmError
from realm_jax.model.cache import DTYPES
from realm_jax.model.config import Config

SHARE = 0.8
"""Of the free memory, for slots whose number is left to the engine; the rest is for what a call computes."""
MOST_SLOTS = 256


def row_bytes(config: Config, size: int, dtype: str) -> int:
    """Bytes of one row of a cache: keys and values of `size` tokens, int8 with its scales."""
    heads = 2 * config.layers * size * config.kv_heads
    return heads * (config.head_width * jnp.dtype(DTYPES[dtype]).itemsize + (4 if dtype == "int8" else 0))


def slot_bytes(config: Config, draft: Draft | None, size: int, dtype: str) -> int:
    """Bytes of a slot, with the draft's cache and the tokens."""
    ahead = 0 if draft is None or draft.config is None else row_bytes(draft.config, size, dtype)
    return row_bytes(config, size, dtype) + ahead + 4 * size


def free_bytes(device: jax.Device) -> int | None:
    """Memory that the device still has for us; None if it does not say."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform != "cpu":
        return None
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def choose_slots(wanted: int | None, prefix_rows: int, each: int, free: int | None) -> int:
    """The number of slots: `wanted`, or as many as fit in SHARE of the free memory, at most MOST_SLOTS.

    each: bytes of a slot, and about those of a prefix row. Raises RealmError if they do not fit.
    """
    if free is None:
        return wanted or 32
    fit = (free if wanted else int(SHARE * free)) // each - prefix_rows
    if (wanted or 1) > fit:
        raise RealmError(
            f"{wanted or 1} slots and {prefix_rows} rows for prefixes take {each / 1e9:.3g} GB each, and "
            f"{free / 1e9:.3g} GB are free: give fewer slots, a smaller max_len, or cache_dtype int8"
        )
    return wanted or min(fit, MOST_SLOTS)
