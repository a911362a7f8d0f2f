"""Formats: blocks -> planes -> blocks bit for bit, and dequantization equal to `gguf` and to the definitions."""

import doctest
import re
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm_jax.errors import RealmError
from realm_jax.gguf.types import TYPE_BY_NAME
from realm_jax.quant import (
    DENSE_FORMATS,
    FORMATS,
    Field,
    QuantizedTensor,
    check_finite,
    dequantize,
    get_format,
    quantize,
    row_bytes,
)
from realm_jax.quant import table as tables
from realm_jax.quant.words import exact_product, pack, pack_bytes, pack_halves, unpack, unpack_bytes, unpack_halves

ROOT = Path(__file__).resolve().parent.parent
every_format = pytest.mark.parametrize("name", FORMATS)
QUICK = ("Q4_0", "Q8_0", "Q3_K", "Q4_K", "IQ2_XXS", "IQ1_S", "IQ4_NL", "TQ1_0", "NVFP4")
one_of_each_kind = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FORMATS]
)
formats = st.sampled_from(list(FORMATS))


def random_blocks(name: str, *lead: int, seed: int = 0) -> np.ndarray:
    """Random bytes for `lead` rows of blocks, uint8 (*lead[:-1], lead[-1] * block_bytes)."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*lead[:-1], lead[-1] * FORMATS[name].block_bytes), dtype=np.uint8)


def scale_field(name: str) -> tuple[Field, int]:
    """The field with the floating-point scales of a format, and how many there are."""
    field = next(field for field in FORMATS[name].fields if field.floats)
    return field, 1 if field.number.gather else field.raw_bytes // field.number.special.itemsize


def put_scale(blocks: np.ndarray, name: str, index: int, bits: np.ndarray) -> None:
    """Writes the bits of one floating-point scale, unsigned (blocks,), into raw blocks uint8 (blocks, block_bytes)."""
    field, _ = scale_field(name)
    place = blocks[:, field.offset : field.offset + field.raw_bytes]
    if name == "IQ1_M":  # a nibble above each 12 bits
        nibbles = bits[:, None] >> np.array([0, 4, 8, 12], np.uint16) & 0xF
        place[:, 1::2] = place[:, 1::2] & 0xF | nibbles.astype(np.uint8) << 4
    else:
        size = field.number.special.itemsize
        place[:, index * size : (index + 1) * size] = np.ascontiguousarray(bits)[:, None].view(np.uint8)


def random_weights(name: str, *shape: int, seed: int = 0) -> QuantizedTensor:
    """Packed weights of mean square about 1: normal numbers, or random codes where the format has no encoder."""
    kind, rng = FORMATS[name], np.random.default_rng(seed)
    if kind.encode:
        return quantize(rng.standard_normal(shape, np.float32), name)
    blocks = random_blocks(name, int(np.prod(shape)) // kind.block_size, 1, seed=seed)
    ones = np.ones(len(blocks), np.float16)
    put_scale(blocks, name, 0, ones.view(np.uint16))
    scale = 1 / np.sqrt(np.square(expected(blocks, name)).mean())
    put_scale(blocks, name, 0, (ones * np.float16(scale)).view(np.uint16))
    return QuantizedTensor.from_bytes(blocks, name, shape)


def expected(raw: np.ndarray, name: str) -> np.ndarray:
    """What the format means in float32: from `gguf`, or from the definition where it has none."""
    with np.errstate(all="ignore"):
        if name in ("Q8_1", "Q8_K"):
            blocks = raw.reshape(-1, FORMATS[name].block_bytes)
            start = 4
            d = blocks[:, :2].copy().view(np.float16) if name == "Q8_1" else blocks[:, :4].copy().view(np.float32)
            codes = blocks[:, start : start + FORMATS[name].block_size].view(np.int8)
            return (d.astype(np.float32) * codes.astype(np.float32)).reshape(*raw.shape[:-1], -1)
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])


def assert_same_bits(got: jax.Array, want: np.ndarray) -> None:
    """Equal bit patterns, signs of zeros included; any NaN equals any NaN."""
    got = np.asarray(got)
    assert got.dtype == want.dtype == np.float32
    assert got.shape == want.shape
    same = (got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want))
    assert same.all(), f"{(~same).sum()} of {same.size} differ, first {got[~same][0]!r} for {want[~same][0]!r}"


@every_format
def test_sizes_are_those_of_ggml(name):
    kind = FORMATS[name]
    assert (kind.block_size, kind.block_bytes) == (TYPE_BY_NAME[name].block_size, TYPE_BY_NAME[name].block_bytes)


@every_format
def test_fields_cover_every_byte_once(name):
    kind = FORMATS[name]
    count = np.zeros(kind.block_bytes, int)
    for field in kind.fields:
        count[field.offset : field.offset + field.raw_bytes] += 1
    assert (count == 1).all()


@every_format
@pytest.mark.parametrize("lead", [(1,), (3,), (5, 1), (7, 3), (2, 3, 2)])
def test_split_and_join_are_inverse_on_any_bytes(name, lead):
    kind, raw = FORMATS[name], random_blocks(name, *lead)
    planes = kind.split(raw)
    assert set(planes) == {field.name for field in kind.fields}
    for field in kind.fields:
        assert planes[field.name].shape == (*lead[:-1], *field.tail(lead[-1]))
        assert planes[field.name].ctypes.data % 64 == 0
    np.testing.assert_array_equal(kind.join(planes), raw)


@given(formats, st.data())
def test_split_and_join_on_bytes_of_choice(name, data):
    size = FORMATS[name].block_bytes
    raw = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8)
    np.testing.assert_array_equal(FORMATS[name].join(FORMATS[name].split(raw)), raw)
    assert_same_bits(FORMATS[name].dequantize(jax.tree.map(jnp.asarray, FORMATS[name].split(raw))), expected(raw, name))


@every_format
def test_split_takes_strided_and_read_only_rows(name):
    raw = random_blocks(name, 6, 2)
    part = raw[::2]
    part.flags.writeable = False
    np.testing.assert_array_equal(FORMATS[name].join(FORMATS[name].split(part)), part)


@every_format
def test_many_stripes_give_what_one_gives(name, monkeypatch):
    raw = random_blocks(name, 9, 2)
    whole = FORMATS[name].split(raw)
    monkeypatch.setattr("realm_jax.quant.layout.STRIPE_BYTES", 1)
    for plane, again in zip(whole.values(), FORMATS[name].split(raw).values(), strict=True):
        np.testing.assert_array_equal(plane.view(np.uint8), again.view(np.uint8))
    np.testing.assert_array_equal(FORMATS[name].join(whole), raw)


@every_format
def test_dequantize_equals_gguf_bit_for_bit(name):
    raw = random_blocks(name, 64, 3)
    raw[:3] = 0
    want = expected(raw, name)
    assert_same_bits(dequantize(raw, name, want.shape), want)


@one_of_each_kind
def test_one_operation_after_the_other_gives_the_same_bits(name):
    """Where nothing is compiled as a whole, and nothing fused."""
    raw = random_blocks(name, 64, 3)
    raw[:3] = 0
    planes = jax.tree.map(jnp.asarray, FORMATS[name].split(raw))
    assert_same_bits(FORMATS[name].dequantize(planes), expected(raw, name))


@every_format
def test_every_scale_is_read_exactly(name):
    """All float16 numbers, subnormal, infinite and NaN, or all bytes, as scales (Q8_K: float32 of every exponent)."""
    field, count = scale_field(name)
    dtype = field.number.special.dtype
    bits = np.arange(256 if dtype.itemsize == 1 else 65536, dtype=dtype)
    if name == "Q8_K":
        bits = bits[::16] << 16 | bits[::16]
    raw = random_blocks(name, len(bits), 1)
    orders = [bits, bits[::-1]] * 2
    for index in range(count):
        put_scale(raw, name, index, orders[index])
    want = expected(raw, name)
    assert_same_bits(dequantize(raw, name, want.shape), want)
    scales = QuantizedTensor.from_bytes(raw, name, want.shape).block_scales()
    assert tuple(scales) == field.floats
    values = np.concatenate([np.asarray(scale).reshape(len(bits), -1) for scale in scales.values()], -1)
    assert values.shape == (len(bits), count) and values.dtype == np.float32
    for index in range(count):
        special = orders[index] & field.number.special == field.number.special
        np.testing.assert_array_equal(np.isfinite(values[:, index]), ~special)


def test_exact_product_keeps_subnormals():
    """XLA's CPU backend flushes them; the first assertion says when the detour is no longer needed."""
    scale = np.array([1, 2, 3, 1000, 0x7FFFFF, 0x800000, 0x80000001, 0x807FFFFF, 0], np.uint32).view(np.float32)
    codes = np.array([-128, -127, -3, -1, 0, 1, 2, 127], np.int32)
    want = scale[:, None] * codes.astype(np.float32)
    assert_same_bits(jax.jit(exact_product)(scale[:, None], codes), want)
    if jax.default_backend() == "cpu":
        plain = np.asarray(jax.jit(lambda a, b: a * b)(scale[:, None], codes.astype(np.float32)))
        assert (plain != want).any()


@pytest.mark.parametrize("name", DENSE_FORMATS)
def test_dense_formats_equal_gguf(name):
    raw = np.random.default_rng(1).integers(0, 256, (8, 96 * DENSE_FORMATS[name].itemsize), dtype=np.uint8)
    want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    assert_same_bits(dequantize(raw, name, want.shape), want)


def test_bit_fields_are_inverse():
    words = np.random.default_rng(2).integers(0, 1 << 32, (3, 8, 5), dtype=np.uint32)
    for bits in (1, 2, 4, 8):
        np.testing.assert_array_equal(pack(unpack(words, bits), bits), words)
    for signed in (False, True):
        values = unpack_bytes(words, signed=signed)
        assert (values.min() < 0) == signed
        np.testing.assert_array_equal(pack_bytes(values), words)
    finite = words & np.uint32(0x7BFF7BFF)
    np.testing.assert_array_equal(pack_halves(*unpack_halves(finite)), finite)


@every_format
def test_check_finite_finds_the_first_bad_block(name):
    kind, special = FORMATS[name], scale_field(name)[0].number.special
    raw, rng = random_blocks(name, 50, 4), np.random.default_rng(1)
    blocks = raw.reshape(-1, kind.block_bytes)
    lowest, highest = special & ~(special - 1), special.dtype.type(1) << 8 * special.itemsize - 1
    for index in range(scale_field(name)[1]):
        bits = rng.integers(0, 1 << 8 * special.itemsize, len(blocks)).astype(special.dtype)
        put_scale(blocks, name, index, bits & ~lowest)
    assert check_finite(raw, name) is None
    for index in range(scale_field(name)[1]):
        for bits in (special, special | 1, special | highest):
            broken = blocks.copy()
            for block in (191, 137):
                put_scale(broken[block : block + 1], name, index, np.array([bits], special.dtype))
            assert check_finite(broken.reshape(raw.shape), name) == 137
            assert check_finite(broken.reshape(-1), name) == 137


@pytest.mark.parametrize("name", DENSE_FORMATS)
def test_check_finite_on_dense_values_past_the_first_stripe(name):
    values = np.ones((3, 100_000), DENSE_FORMATS[name])
    assert check_finite(values.view(np.uint8), name) is None
    values[2, 17] = np.inf
    values[2, 99] = np.nan
    assert check_finite(values.view(np.uint8), name) == 200_017


@pytest.mark.parametrize("name", ["Q1_0", "Q2_0", "I8", "F64"])
def test_known_formats_are_refused_by_name(name):
    with pytest.raises(
        RealmError, match=f"format {name} is a ggml format that is not supported; supported: F32, .*NVFP4"
    ):
        get_format(name)


def test_other_names_are_refused():
    with pytest.raises(RealmError, match="format q4k is not a ggml format; supported"):
        get_format("q4k")
    with pytest.raises(RealmError, match="F16 is a dense format"):
        get_format("F16")


def test_row_bytes():
    assert row_bytes("Q4_K", 512) == 288
    assert row_bytes("BF16", 10) == 20
    with pytest.raises(RealmError, match=r"Q4_K: a row of 300 weights .* multiple of 256"):
        row_bytes("Q4_K", 300)


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "docs" / "formats.md"], ids=lambda p: p.name)
def test_tables_in_the_docs_are_those_of_the_code(path):
    text = path.read_text(encoding="utf-8")
    assert re.search("<!-- (formats|planes):begin -->", text)
    assert tables.renew(text) == text, f"run: python -m realm_jax.quant.table {path.relative_to(ROOT)}"


def test_examples_in_the_docs_run():
    failed, tried = doctest.testfile(str(ROOT / "docs" / "formats.md"), module_relative=False)
    assert (failed, tried > 10) == (0, True)
