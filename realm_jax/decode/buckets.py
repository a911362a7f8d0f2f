"""The short lists of sizes that arrays are padded to, so that few variants of each function are compiled.

Called by `decode.generate`; pure arithmetic on the host.
"""

SMALLEST_CHUNK = 16
LARGEST_CHUNK = 512
"""Longer prompts are prefilled in several chunks of this size."""
LARGEST_PREFILL = 4096
"""Tokens of all rows in one chunk: wide batches get shorter chunks, so that attention scores stay of bounded size."""
SMALLEST_CACHE = 64
LINEAR_CACHE = 2048
"""Cache sizes are powers of two up to here and multiples of it beyond, so that a long row wastes little."""


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and `least` (itself a power of two)."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def cache_bucket(tokens: int) -> int:
    """Cache size S for rows of at most `tokens` tokens: 64, 128, ..., 2048, 4096, 6144, ..."""
    if tokens <= LINEAR_CACHE:
        return power_of_two(tokens, SMALLEST_CACHE)
    return -(-tokens // LINEAR_CACHE) * LINEAR_CACHE


def prefill_chunks(tokens: int, rows: int = 1) -> list[int]:
    """Chunk lengths that together cover `tokens` tokens of `rows` rows: equal ones of at most 512 tokens, and a last
    one of 16, 32, 64, ... that holds the rest. They never reach past `cache_bucket(tokens)`.

    rows: a power of two.
    """
    largest = max(SMALLEST_CHUNK, min(LARGEST_CHUNK, LARGEST_PREFILL // rows))
    full, rest = divmod(tokens, largest)
    return [largest] * full + ([power_of_two(rest, SMALLEST_CHUNK)] if rest else [])
