"""How a GPU thread reads the codes of each format from its planes: the table of readers. Called by `triton_matmul` and
`triton_int8`.

What the bits mean is said in `quant.blocks_*`, in the same order; here they are read for the four weights of a lane
alone (`lanes`).
"""

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.kernels import fragments
from realm_jax.kernels.codes_iq import (
    grid,
    read_iq1_m,
    read_iq1_s,
    read_iq2_s,
    read_iq2_xs,
    read_iq2_xxs,
    read_iq3_s,
    read_iq3_xxs,
)
from realm_jax.kernels.lanes import (
    BITS,
    EVEN,
    NIBBLES,
    PAIRS,
    SIGNS,
    Codes,
    Lane,
    Reader,
    byte,
    eight_scale_bytes,
    halves,
    high,
    low,
    scale,
    spread,
    times_bytes,
)
from realm_jax.quant.codebooks import codebook
from realm_jax.quant.formats import FORMATS
from realm_jax.quant.layout import Format
from realm_jax.quant.small_floats import e8m0, ue4m3


def four_bits(lane: Lane) -> list[jax.Array]:
    word = lane.read("qs", lane.t)
    return [low(word), high(word)]


def five_bits(lane: Lane) -> list[jax.Array]:
    bits = lane.read("qh") >> (lane.t * 4).astype(jnp.uint32)
    fifth = (spread(bits) << np.uint32(4), spread(bits >> np.uint32(16)) << np.uint32(4))
    return [word | bit for word, bit in zip(four_bits(lane), fifth, strict=True)]


def eight_bits(lane: Lane) -> list[jax.Array]:
    return [lane.read("qs", lane.t, further=4 * k) ^ SIGNS for k in range(2)]


def read_q4_0(lane: Lane) -> Codes:
    word = lane.read("qs", lane.t)
    return Codes([word & NIBBLES, word & ~NIBBLES], [scale(lane)], raised=(0, 4))


def read_q4_1(lane: Lane) -> Codes:
    d, m = halves(lane)
    return Codes(four_bits(lane), [d], [m])


def read_q5_0(lane: Lane) -> Codes:
    return Codes(five_bits(lane), [scale(lane)])


def read_q5_1(lane: Lane) -> Codes:
    d, m = halves(lane)
    return Codes(five_bits(lane), [d], [m])


def read_q8_0(lane: Lane) -> Codes:
    return Codes(eight_bits(lane), [scale(lane)])


def read_q8_1(lane: Lane) -> Codes:
    return Codes(eight_bits(lane), [halves(lane)[0]])


def two_bits(lane: Lane) -> list[jax.Array]:
    words = [lane.read("qs", lane.t, further=4 * k) for k in range(2)]
    return [word >> np.uint32(2 * part) & PAIRS for part in range(4) for word in words]


def read_q2_k(lane: Lane) -> Codes:
    d, dmin = halves(lane)
    words = eight_scale_bytes(lane)
    scales, mins = [low(word) for word in words], [high(word) for word in words]
    return Codes(two_bits(lane), times_bytes(d, scales, range(8)), times_bytes(-dmin, mins, range(8)))


def read_q3_k(lane: Lane) -> Codes:
    first = lane.place(2) * np.uint32(4)
    masks = [lane.read("hmask", lane.t, further=4 * k) >> first for k in range(2)]
    third = [(mask >> np.uint32(part) & BITS) << np.uint32(2) for part in range(4) for mask in masks]
    d, words = scale(lane), eight_scale_bytes(lane)
    codes = [code | bit for code, bit in zip(two_bits(lane), third, strict=True)]
    return Codes(codes, [d * (byte(words[i // 4], i % 4) - 32) for i in range(8)])


def with_scales_and_mins(lane: Lane, words: list[jax.Array], mask: int, raised: int = 0) -> Codes:
    """Codes of five bits at most: times a scale of six they are below 2048. raised: of sub-block 1."""
    d, dmin = halves(lane)
    both = lane.read("scales")
    return Codes(
        words,
        times_bytes(d, [both], range(2)),
        mins=(both, -dmin),
        raised=(0, 0, raised, raised),
        mask=mask,
        whole=d,
        factors=fragments.factors(both, (0, raised), lane.t),
    )


def read_q4_k(lane: Lane) -> Codes:
    words = [lane.read("qs", lane.t, further=4 * k) for k in range(2)]
    return with_scales_and_mins(lane, 2 * words, mask=0x0F, raised=4)


def read_q5_k(lane: Lane) -> Codes:
    """Fifth bits of sub-block 0 are moved to bit 4 of their bytes; those of sub-block 1 are above them."""
    first = lane.place(4) * np.uint32(2)
    words, bits = ([lane.read(name, lane.t, further=4 * k) for k in range(2)] for name in ("qs", "qh"))
    fifth = [jnp.where(first > 4, bit >> first - np.uint32(4), bit << np.uint32(4) - first) for bit in bits]
    codes = [
        fragments.merge(NIBBLES << np.uint32(up), word >> np.uint32(down), bit)
        for up, down in ((0, 0), (1, 3))
        for word, bit in zip(words, fifth, strict=True)
    ]
    return with_scales_and_mins(lane, codes, mask=0x1F, raised=1)


def read_q6_k(lane: Lane) -> Codes:
    lows = [lane.read("ql", lane.t, further=4 * k) for k in range(4)]
    highs = [lane.read("qh", lane.t, further=4 * k) for k in range(2)]
    codes = []
    for part in range(4):
        for k in range(2):
            four = (low, low, high, high)[part](lows[2 * (part % 2) + k])
            codes.append(four | (highs[k] >> np.uint32(2 * part) & PAIRS) << np.uint32(4))
    d, words = scale(lane), eight_scale_bytes(lane)
    return Codes(codes, [d * byte(words[i // 4], i % 4, signed=True) for i in range(8)])


def values(book: str, signed: bool) -> np.ndarray:
    """Of a codebook, as bytes: plus 128, unless they are to have a sign."""
    found = codebook(book).values.astype(np.int16)
    return (np.concatenate([found, np.zeros(16 - len(found), np.int16)]) + (0 if signed else 128)).astype(np.uint8)


def named(lane: Lane, book: str) -> list[jax.Array]:
    word = lane.read("qs", lane.t)
    return fragments.look_up(values(book, lane.signed), word)


def read_iq4_nl(lane: Lane) -> Codes:
    return Codes(named(lane, "IQ4_NL"), [scale(lane)], signed=lane.signed)


def read_iq4_xs(lane: Lane) -> Codes:
    place = lane.place(8)
    word = lane.read("scales", (place // 4).astype(jnp.int32))
    return Codes(named(lane, "IQ4_NL"), [scale(lane) * (byte(word, place % 4) - 32)], signed=lane.signed)


def read_mxfp4(lane: Lane) -> Codes:
    return Codes(named(lane, "MXFP4"), [e8m0(lane.read("e"))], signed=lane.signed)


def read_nvfp4(lane: Lane) -> Codes:
    word = lane.read("qs", lane.t % 2)
    parts = fragments.look_up(values("MXFP4", lane.signed), word)
    bits = lane.read("d") >> (lane.place(4) * np.uint32(8)) & np.uint32(0xFF)
    return Codes([jnp.where(lane.t < 2, *parts)], [ue4m3(bits)], signed=lane.signed)


def digit(word: jax.Array, power: jax.Array | int) -> jax.Array:
    """A digit in base 3 of each byte; power: 3 to the number of digits before it."""
    halves = [word & EVEN, word >> np.uint32(8) & EVEN]
    even, odd = (((half * power) & EVEN) * np.uint32(3) >> np.uint32(8) & EVEN for half in halves)
    return even | odd << np.uint32(8)


def read_tq1_0(lane: Lane) -> Codes:
    first, second, third = (lane.read("qs", lane.t, further=4 * k) for k in range(3))
    powers = [np.uint32(3**i) for i in range(5)]
    codes = [digit(word, power) for power in powers for word in (first, second)]
    codes += [digit(third, power) for power in powers]
    own = jnp.where(
        lane.t < 2, jnp.where(lane.t < 1, powers[0], powers[1]), jnp.where(lane.t < 3, powers[2], powers[3])
    )
    return Codes([*codes, digit(lane.read("qh"), own)], [scale(lane)] * 8)


def read_tq2_0(lane: Lane) -> Codes:
    words = [lane.read("qs", lane.t, further=4 * k) for k in range(2)]
    raised = tuple(2 * part for part in range(4) for _ in words)
    return Codes(
        [word & PAIRS << np.uint32(up) for up, word in zip(raised, 4 * words, strict=True)],
        [scale(lane)] * 4,
        raised=raised,
    )


READERS: dict[str, Reader] = {
    "Q4_0": Reader(read_q4_0, 32, 32, 8),
    "Q4_1": Reader(read_q4_1, 32, 32, 0, True),
    "Q5_0": Reader(read_q5_0, 32, 32, 16),
    "Q5_1": Reader(read_q5_1, 32, 32, 0, True),
    "Q8_0": Reader(read_q8_0, 32, 32, 128),
    "Q8_1": Reader(read_q8_1, 32, 32, 128),
    "Q2_K": Reader(read_q2_k, 128, 16, 0, True),
    "Q3_K": Reader(read_q3_k, 128, 16, 4),
    "Q4_K": Reader(read_q4_k, 64, 32, 0, mins=True, factors=True),
    "Q5_K": Reader(read_q5_k, 64, 32, 0, mins=True, factors=True),
    "Q6_K": Reader(read_q6_k, 128, 16, 32),
    "Q8_K": Reader(read_q8_0, 32, 32, 128),
    "IQ4_NL": Reader(read_iq4_nl, 32, 32, 128),
    "IQ4_XS": Reader(read_iq4_xs, 32, 32, 128),
    "MXFP4": Reader(read_mxfp4, 32, 32, 128),
    "NVFP4": Reader(read_nvfp4, 16, 16, 128),
    "TQ1_0": Reader(read_tq1_0, 256, 32, 1),
    "TQ2_0": Reader(read_tq2_0, 128, 32, 1),
    "IQ1_S": Reader(read_iq1_s, 32, 32, 128, copied=False, grid=grid("IQ1_S", 8, 128)),
    "IQ1_M": Reader(read_iq1_m, 32, 16, 128, copied=False, grid=grid("IQ1_S", 8, 128)),
    "IQ2_XXS": Reader(read_iq2_xxs, 32, 32, 128, grid=grid("IQ2_XXS")),
    "IQ2_XS": Reader(read_iq2_xs, 32, 16, 128, grid=grid("IQ2_XS")),
    "IQ2_S": Reader(read_iq2_s, 32, 16, 128, grid=grid("IQ2_S")),
    "IQ3_XXS": Reader(read_iq3_xxs, 32, 32, 128, grid=grid("IQ3_XXS")),
    "IQ3_S": Reader(read_iq3_s, 32, 32, 128, grid=grid("IQ3_S")),
}


def fields(name: str) -> list[str]:
    """The planes that a reader wants: all but sums that are no part of the weights."""
    kind: Format = FORMATS[name]
    return [field.name for field in kind.fields if field.name != "bsums"]
