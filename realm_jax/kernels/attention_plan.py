"""How the attention kernels cut up their work, and what they cannot serve. For `attention`, `triton_attention`.

Shape suffixes as in `kernels.triton_attention`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

HALVED = 4  # parts at the beginning of a row
SHORT = 16  # the most tokens of a row that share one tile after another
WIDEST = 256  # head width


class Cut(NamedTuple):
    """What a program takes at a time.

    block: places of keys, a power of two, 16 at least; N. part: places of a part of a row, for short calls; whole
    blocks. The first HALVED parts are two each, if these are whole blocks, too: so a short row is work for more
    programs, and a long one has not many parts. stages: of Triton's pipeline of copies; of int8, one more than there
    are blocks on their way. warps: of a program.
    """

    block: int
    part: int
    stages: int
    warps: int


class Plan(NamedTuple):
    """What a kernel is compiled for; all of it static.

    tokens, heads, kv_heads, head_width: T, H, K, C. size: places of a row that are read at most. rows: M of a tile.
    tiles: of one program. groups: programs for the queries of a kv head. part, parts: places of a part, how
    many there are. halved: how many whole ones at the beginning are two each. block: N. stages, warps: as in `Cut`.
    dtype: in which keys and values are multiplied. scale, softcap, sliding_window: as in `kernels.attention`.
    """

    tokens: int
    heads: int
    kv_heads: int
    head_width: int
    size: int
    rows: int
    tiles: int
    groups: int
    part: int
    parts: int
    halved: int
    block: int
    stages: int
    warps: int
    dtype: str
    scale: float
    softcap: float | None
    sliding_window: int | None

    @property
    def width(self) -> int:
        """C, padded to a power of two that tensor cores take."""
        return padded(self.head_width)

    @property
    def apart(self) -> int:
        """W: a short call adds up weights in the end: no warp waits for another. A longer one lacks the registers."""
        return self.block if self.tokens <= SHORT else 1

    def part_of(self, place: jax.Array) -> jax.Array:
        """Which part a place is in."""
        if not self.halved:
            return place // self.part
        return jnp.where(place < self.halved * self.part, place // (self.part // 2), place // self.part + self.halved)

    def start_of(self, part: jax.Array) -> jax.Array:
        """The first place of a part."""
        return jnp.where(part < 2 * self.halved, part * (self.part // 2), (part - self.halved) * self.part)

    @property
    def sharing(self) -> int:
        """G, the query heads of one kv head."""
        return self.heads // self.kv_heads


def padded(head_width: int) -> int:
    """C, padded to a power of two that tensor cores take."""
    return max(16, 1 << (head_width - 1).bit_length())


def refuses(q: jax.Array, k: jax.Array) -> str | None:
    """Why the kernels cannot serve queries (B, T, H, C) on a cache (L, B, S, K, C) or (B, S, K, C), or None."""
    if k.dtype.name not in ("float32", "bfloat16", "float16", "int8"):
        return f"keys of {k.dtype} are not known to it"
    if q.dtype.name not in ("float32", "bfloat16", "float16"):
        return f"queries of {q.dtype} are not known to it"
    if q.shape[-1] > WIDEST:
        return f"heads may be {WIDEST} wide at most"
    if k.dtype == jnp.int8 and 2**31 < k.size <= 2**32:
        return "Pallas reaches only half of an int8 array of 2 to 4 GiB: its offsets are 32-bit and signed"
    return None


def plan(q_shape: tuple[int, ...], k_shape: tuple[int, ...], k_dtype, *, window=None, cut=None, **options) -> Plan:
    """How queries (B, T, H, C) are attended to a cache (L, B, S, K, C); options: scale, softcap, sliding_window.

    cut: a `Cut` in place of `choose_cut`'s.
    """
    _, T, H, C = q_shape
    S, K = k_shape[2:4]
    size = min(S, window or S)
    dtype = "float16" if jnp.dtype(k_dtype) == jnp.int8 else jnp.dtype(k_dtype).name
    block, part, stages, warps = cut or choose_cut(jnp.dtype(k_dtype).name, C, T)
    small = dtype == "float32" or C > 128
    rows = 16 if T <= SHORT else 32 if small else 64
    needed = -(-T * (H // K) // rows)
    tiles = min(needed, 2) if T <= SHORT and not small else 1
    part = part if T <= SHORT else size
    halved = HALVED if T <= SHORT and part % (2 * block) == 0 else 0
    parts = -(-size // part) + halved if size > halved * part else -(-size // (part // 2))
    return Plan(
        tokens=T, heads=H, kv_heads=K, head_width=C, size=size, rows=rows, tiles=tiles, groups=-(-needed // tiles),
        part=part, parts=parts, halved=halved, block=block, stages=stages, warps=warps, dtype=dtype, **options,
    )  # fmt: skip


def choose_cut(k_dtype: str, head_width: int, tokens: int) -> Cut:
    """How the work is cut for a cache of that type. The bits of a result depend on it: it asks nothing of the number of
    rows, the size of the cache, or the tokens of a short call.

    Small blocks, so that several programs share a multiprocessor and what one waits for, the others do not.
    """
    most = 64 // (2 if k_dtype == "float32" else 1) // (2 if head_width > 128 else 1)  # for shared memory of 99 KiB
    short = tokens <= SHORT
    return Cut(
        block=min(most, 32) if short else most,
        part=256,
        stages=3 if short and k_dtype != "int8" else 2,
        # With 4, float32 spills. With 2, one row of 512 takes 5.0 us and not 6.9, 64 rows 40.6 and not 41.8 (H200).
        warps={"float32": 8, "int8": 4}.get(k_dtype, 2 if short else 4),
    )
