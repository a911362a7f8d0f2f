"""Damaged GGUF files: each loads consistently or is refused with a GGUFError, and never takes much memory."""

import random
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf_bytes import ARRAY, F32, Q4_K, STRING, UINT32, alignment, array, gguf, key, split_keys, string, tensor
from hypothesis import given
from hypothesis import strategies as st

from realm_jax.errors import GGUFError
from realm_jax.gguf.reader import GGUFFile, open_gguf
from realm_jax.gguf.types import GGML_TYPES, TYPE_BY_NAME, ValueType
from realm_jax.gguf.writer import write_gguf

VALID = gguf(
    [
        key("general.architecture", STRING, string("llama")),
        alignment(16),
        key("flag", ValueType.BOOL, b"\1"),
        key("rate", ValueType.FLOAT64, struct.pack("<d", 0.1)),
        array("tokens", STRING, 3, string("a") + string("") + string("zwölf")),
        array("scores", ValueType.FLOAT32, 3, struct.pack("<3f", 1, 2, 3)),
        array("flags", ValueType.BOOL, 2, b"\0\1"),
        array("nested", ARRAY, 2, struct.pack("<IQB", ValueType.INT8, 1, 5) + struct.pack("<IQ", STRING, 0)),
        *split_keys(0, 1, 2),
    ],
    [tensor("a", (3, 2)), tensor("b", (256, 2), Q4_K, 32), tensor("c", (1,), F32, 32 + 288)],
    random.Random(0).randbytes(32 + 288 + 16),
    pad_to=16,
)
HEADER_BYTES = VALID.index(b"c" + struct.pack("<IQIQ", 1, 1, F32, 320)) + 25
EXTREMES = [struct.pack("<Q", n) for n in (0, 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**60, 2**61 + 1, 2**63, 2**64 - 1)]
EXTREMES += [struct.pack("<I", n) for n in (0, 1, 3, 9, 14, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1)]


def check_consistent(file: GGUFFile) -> None:
    """What loaded must hold together, and come back the same when it is written and read again."""
    size = file.path.stat().st_size
    assert file.alignment & (file.alignment - 1) == 0 < file.alignment
    for name, info in file.tensors.items():
        raw = file.raw(name)
        row_bytes = TYPE_BY_NAME[info.format].row_bytes(info.shape[-1])
        assert raw.shape == (*info.shape[:-1], row_bytes) and raw.nbytes == info.nbytes
        assert info.offset + info.nbytes <= size
    again = file.path.with_name("again.gguf")
    tensors = [(t.name, t.format, t.shape, lambda name=t.name: file.raw(name)) for t in file.tensors.values()]
    write_gguf(again, file.fields, tensors)
    with open_gguf(again) as copy:
        np.testing.assert_equal(copy.metadata, file.metadata)
        assert [(k, f.type, f.item_type) for k, f in copy.fields.items()] == [
            (k, f.type, f.item_type) for k, f in file.fields.items()
        ]
        for name in file.tensors:
            np.testing.assert_array_equal(copy.raw(name), file.raw(name))


def loads(path: Path, content: bytes) -> bool:
    """Whether the file is accepted; checks what was accepted, and how it was refused if not."""
    path.write_bytes(content)
    try:
        file = open_gguf(path)
    except GGUFError as error:
        message = str(error)
        assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 1000
        return False
    with file:
        check_consistent(file)
    return True


def damaged(rng: random.Random) -> bytes:
    """The valid file after one to three flipped bits, changed bytes, extreme numbers, cuts or repeats."""
    content = bytearray(VALID)
    for _ in range(rng.randint(1, 3)):
        if not content:
            break
        at = rng.randrange(min(len(content), HEADER_BYTES))
        match rng.randrange(6):
            case 0:
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                content[at] = rng.randrange(256)
            case 2:
                extreme = rng.choice(EXTREMES)
                content[at : at + len(extreme)] = extreme
            case 3:
                del content[at : at + rng.randint(1, 40)]
            case 4:
                content[at:at] = content[at : at + rng.randint(1, 40)]
            case 5:
                del content[at:]
    return bytes(content)


def test_the_valid_file_is_valid(tmp_path):
    assert loads(tmp_path / "f.gguf", VALID)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files(tmp_path, seed):
    rng = random.Random(seed)
    tracemalloc.start()
    try:
        accepted = sum(loads(tmp_path / "f.gguf", damaged(rng)) for _ in range(500))
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
    assert 0 < accepted < 250


def test_every_byte_of_the_header_changed(tmp_path):
    for at in range(HEADER_BYTES):
        for change in (0x01, 0xFF):
            content = bytearray(VALID)
            content[at] ^= change
            loads(tmp_path / "f.gguf", bytes(content))


def test_extreme_numbers_everywhere(tmp_path):
    for at in range(4, HEADER_BYTES):
        extreme = EXTREMES[at % len(EXTREMES)]
        loads(tmp_path / "f.gguf", VALID[:at] + extreme + VALID[at + len(extreme) :])


KEYS = st.one_of(
    st.builds(lambda n, v: key(n, UINT32, struct.pack("<I", v)), st.text(max_size=4), st.integers(0, 2**32 - 1)),
    st.builds(key, st.binary(max_size=4), st.integers(0, 14), st.binary(max_size=40)),
    st.builds(array, st.text(max_size=4), st.integers(0, 14), st.integers(0, 9), st.binary(max_size=40)),
    st.builds(alignment, st.sampled_from([0, 1, 8, 24, 32, 64])),
)
DIMENSIONS = st.lists(st.sampled_from([0, 1, 2, 32, 256, 2**32, 2**63]), max_size=5).map(tuple)
TENSORS = st.builds(
    tensor,
    st.text(max_size=4),
    DIMENSIONS,
    st.one_of(st.sampled_from(sorted(GGML_TYPES)), st.integers(0, 2**32 - 1)),
    st.sampled_from([0, 32, 64, 1, 2**63]),
)


@given(st.lists(KEYS, max_size=4), st.lists(TENSORS, max_size=3), st.integers(0, 600), st.sampled_from([2, 3]))
def test_files_of_odd_parts(tmp_path_factory, keys, tensors, data_bytes, version):
    loads(tmp_path_factory.mktemp("odd") / "f.gguf", gguf(keys, tensors, bytes(data_bytes), version=version))
