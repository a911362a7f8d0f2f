"""Reading GGUF files: what must load, what must be refused and how, split models, memory."""

import json
import os
import struct
import tracemalloc
from pathlib import Path

import gguf as gguf_package
import numpy as np
import pytest
from gguf_bytes import ARRAY, F32, Q4_0, Q4_K, STRING, UINT32, alignment, array, gguf, header, key, split_keys, tensor
from gguf_bytes import string as packed_string

from realm_jax.errors import GGUFError
from realm_jax.gguf.reader import open_gguf
from realm_jax.gguf.types import GGML_TYPES, TYPE_BY_NAME, ValueType

VOCABULARIES = sorted((Path(__file__).resolve().parents[2] / "shared/fixtures/vocab").glob("*.gguf"))
ONE_F32 = struct.pack("<f", 1.0)


@pytest.fixture
def opened(tmp_path):
    """Writes bytes to model.gguf and opens it; closes what it opened."""
    files = []

    def open_bytes(content: bytes, name: str = "model.gguf"):
        path = tmp_path / name
        path.write_bytes(content)
        files.append(open_gguf(path))
        return files[-1]

    yield open_bytes
    for file in files:
        file.close()


def refusal(content: bytes, tmp_path: Path, name: str = "model.gguf") -> str:
    """The message with which a file of these bytes is refused: one line that starts with the path."""
    path = tmp_path / name
    path.write_bytes(content)
    return refusal_of(path)


def refusal_of(path: Path) -> str:
    with pytest.raises(GGUFError) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000
    return message


# What loads


SCALARS = [
    (ValueType.UINT8, "B", 200),
    (ValueType.INT8, "b", -100),
    (ValueType.UINT16, "H", 60000),
    (ValueType.INT16, "h", -30000),
    (ValueType.UINT32, "I", 4_000_000_000),
    (ValueType.INT32, "i", -2_000_000_000),
    (ValueType.FLOAT32, "f", 0.5),
    (ValueType.BOOL, "B", True),
    (ValueType.UINT64, "Q", 2**64 - 1),
    (ValueType.INT64, "q", -(2**63)),
    (ValueType.FLOAT64, "d", 0.1),
]


@pytest.mark.parametrize("value_type, code, value", SCALARS, ids=[s[0].name for s in SCALARS])
def test_scalar_and_array_of_every_type(opened, value_type, code, value):
    packed = struct.pack(f"<{code}", value)
    file = opened(gguf([key("one", value_type, packed), array("many", value_type, 3, packed * 3)]))
    one, many = file.fields["one"], file.fields["many"]
    assert (one.type, one.item_type, one.value) == (value_type, None, value)
    assert type(one.value) is type(value)
    assert (many.type, many.item_type) == (ARRAY, value_type)
    assert many.value.tolist() == [value] * 3
    assert not many.value.flags.writeable
    assert file.metadata["one"] == value


def test_strings_empty_arrays_and_order(opened):
    words = ["", "a", "zwölf", "\0\n", "𝄞"]
    file = opened(
        gguf(
            [
                array("words", STRING, len(words), b"".join(map(packed_string, words))),
                key("word", STRING, packed_string("ü")),
                array("none", ValueType.FLOAT32, 0),
                array("no_words", STRING, 0),
            ]
        )
    )
    assert list(file.metadata) == ["words", "word", "none", "no_words"]
    assert file.metadata["words"] == words
    assert file.metadata["word"] == "ü"
    assert file.metadata["none"].shape == (0,) and file.metadata["none"].dtype == np.float32
    assert file.metadata["no_words"] == []


def test_values_that_are_not_utf8_keep_their_bytes(opened):
    raw = b"\xff\xc3("
    file = opened(gguf([key("odd", STRING, packed_string(raw)), array("odds", STRING, 1, packed_string(raw))]))
    assert file.metadata["odd"].encode("utf-8", "surrogateescape") == raw
    assert file.metadata["odds"] == [file.metadata["odd"]]


def test_nested_arrays(opened):
    numbers = struct.pack("<IQBB", ValueType.UINT8, 2, 7, 8)
    words = struct.pack("<IQ", STRING, 1) + packed_string("x")
    file = opened(gguf([array("nested", ARRAY, 2, numbers + words)]))
    first, second = file.fields["nested"].value
    assert first.item_type is ValueType.UINT8 and second.item_type is STRING
    plain = file.metadata["nested"]
    assert plain[0].tolist() == [7, 8] and plain[1] == ["x"]


@pytest.mark.parametrize("version", [2, 3])
def test_tensors(opened, version):
    a = np.arange(6, dtype="<f4")
    b = np.arange(2 * 3 * 36, dtype=np.uint8).reshape(3, 2, 36)  # 3 x 2 rows of 64 values: two blocks of 18 bytes
    data = a.tobytes() + bytes(8) + b.tobytes()
    file = opened(gguf([], [tensor("a", (6,)), tensor("b", (64, 2, 3), Q4_0, 32)], data, version=version))
    assert file.version == version and file.alignment == 32 and list(file.tensors) == ["a", "b"]
    info = file.tensors["b"]
    assert (info.format, info.shape, info.nbytes, info.shard) == ("Q4_0", (3, 2, 64), 216, 0)
    assert info.offset % 32 == 0
    assert file.raw("a").shape == (24,) and file.raw("a").view("<f4").tolist() == a.tolist()
    np.testing.assert_array_equal(file.raw("b"), b)
    assert not file.raw("b").flags.writeable


@pytest.mark.parametrize("align", [1, 8, 64, 4096])
def test_alignment_of_the_data(opened, align):
    content = gguf([alignment(align)], [tensor("t", (1,)), tensor("u", (1,), F32, max(4, align))], b"", pad_to=align)
    file = opened(content + ONE_F32.ljust(align, b"\0") + ONE_F32)
    assert file.alignment == align
    assert file.raw("u").view("<f4").tolist() == [1.0]


def test_last_padding_may_be_missing_and_more_may_follow(opened):
    whole = gguf([], [tensor("t", (1,))], ONE_F32)
    assert opened(whole).raw("t").tobytes() == ONE_F32
    assert opened(whole + b"more" * 100).raw("t").tobytes() == ONE_F32


def test_longest_names(opened):
    file = opened(gguf([key("k" * 65535, UINT32, bytes(4))], [tensor("t" * 63, (1,))], ONE_F32))
    assert "k" * 65535 in file.fields and "t" * 63 in file.tensors


@pytest.mark.parametrize("ggml_type", GGML_TYPES.values(), ids=lambda t: t.name)
def test_every_ggml_type_has_its_size(opened, ggml_type):
    data = bytes(3 * ggml_type.block_bytes)
    file = opened(gguf([], [tensor("t", (ggml_type.block_size, 3), ggml_type.id)], data))
    assert file.tensors["t"].format == ggml_type.name
    assert file.raw("t").shape == (3, ggml_type.block_bytes)


def test_type_table_agrees_with_the_gguf_package():
    for ggml_type in gguf_package.GGMLQuantizationType:
        mine = TYPE_BY_NAME[ggml_type.name]
        assert mine.id == ggml_type
        if ggml_type.name != "Q8_1":  # the package counts d and s as float32; ggml has float16
            assert (mine.block_size, mine.block_bytes) == gguf_package.GGML_QUANT_SIZES[ggml_type]
    assert TYPE_BY_NAME["Q8_1"].block_bytes == 36


def test_files_written_by_the_gguf_package(tmp_path):
    path = tmp_path / "package.gguf"
    writer = gguf_package.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokens", ["a", "bc"])
    writer.add_tensor("w", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor(
        "q", np.arange(68, dtype=np.uint8).reshape(2, 34), raw_dtype=gguf_package.GGMLQuantizationType.Q8_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(path) as file:
        assert file.metadata == {"general.architecture": "llama", "llama.block_count": 2, "tokens": ["a", "bc"]}
        assert file.raw("w").view(np.float32).tolist() == np.arange(12).reshape(3, 4).tolist()
        assert file.tensors["q"].shape == (2, 32)
        assert file.raw("q").tobytes() == bytes(range(68))


def slow_if_large(path: Path):
    """The package's reader takes 20 seconds for a large vocabulary."""
    return pytest.mark.slow if path.stat().st_size > 2**21 else ()


@pytest.mark.skipif(not VOCABULARIES, reason="the vocabulary fixtures are not here")
@pytest.mark.parametrize("path", [pytest.param(p, marks=slow_if_large(p), id=p.stem) for p in VOCABULARIES])
def test_vocabularies_as_the_gguf_package_reads_them(path):
    theirs = gguf_package.GGUFReader(path)
    with open_gguf(path) as file:
        expected = {name: f.contents() for name, f in theirs.fields.items() if not name.startswith("GGUF.")}
        assert list(file.metadata) == list(expected)
        for name, value in file.metadata.items():
            np.testing.assert_equal(value.tolist() if isinstance(value, np.ndarray) else value, expected[name])


# What is refused: the header


def test_missing_folder_and_special_files(tmp_path):
    assert refusal_of(tmp_path / "none.gguf") == f"{tmp_path}/none.gguf: no such file: give the path of a GGUF file"
    assert "is a folder" in refusal_of(tmp_path)
    assert "not a regular file" in refusal_of(Path("/dev/null"))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert "not a regular file" in refusal_of(fifo)
    assert "cannot be read" in refusal_of(Path("null\0byte"))
    assert "cannot be read: File name too long" in refusal_of(tmp_path / ("x" * 300))
    assert "is empty" in refusal(b"", tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    path = tmp_path / "secret.gguf"
    path.write_bytes(gguf())
    path.chmod(0)
    assert "secret.gguf: cannot be read: Permission denied" in refusal_of(path)


def test_path_that_would_break_the_line(tmp_path):
    assert "two\\nlines.gguf" in refusal(b"", tmp_path, "two\nlines.gguf")


OTHER_FILES = [
    (b"PK\x03\x04rest", "PyTorch"),
    (struct.pack("<Q", 40) + b'{"a":' + bytes(40), "safetensors"),
    (b"lmgg" + bytes(60), "GGML file"),
    (b"tjgg" + bytes(60), "GGJT file"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    (b"<!DOCTYPE html>", "web page"),
    (b"\x1b[31mred", "b'\\x1b[31'"),
    (b"G", "b'G'"),
    (b"FUGG", "b'FUGG'"),
]


@pytest.mark.parametrize("content, expected", OTHER_FILES)
def test_other_kinds_of_file(tmp_path, content, expected):
    message = refusal(content, tmp_path)
    assert message.startswith(f"{tmp_path}/model.gguf: is not a GGUF file") and expected in message
    assert "'GGUF'" in message


@pytest.mark.parametrize(
    "version, expected", [(0, "version 0"), (1, "convert"), (4, "versions 2 and 3"), (2**31, "big")]
)
def test_versions(tmp_path, version, expected):
    assert expected in refusal(gguf(version=version), tmp_path)


def test_big_endian(tmp_path):
    content = b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(100)
    assert "big-endian" in refusal(content, tmp_path)


def test_truncated_anywhere(tmp_path):
    """Every proper beginning of a file up to the end of its last tensor is refused."""
    words = array("words", STRING, 2, packed_string("ab") + packed_string("c"))
    numbers = array("numbers", ValueType.INT16, 2, bytes(4))
    nested = array("nested", ARRAY, 1, struct.pack("<IQB", ValueType.UINT8, 1, 5))
    whole = gguf([words, numbers, nested, key("x", UINT32, bytes(4))], [tensor("t", (2,))], bytes(8))
    for length in range(len(whole)):
        message = refusal(whole[:length], tmp_path)
        assert message.startswith(f"{tmp_path}/model.gguf: ")
        assert any(word in message for word in ("is empty", "not a GGUF file", "cut short"))


@pytest.mark.parametrize("count", [2**16 + 1, 2**32, 2**63, 2**64 - 1])
def test_absurd_counts(tmp_path, count):
    assert f"claims {count:,} metadata keys: at most 65,536" in refusal(gguf(n_keys=count), tmp_path)
    if count > 2**18:
        assert f"claims {count:,} tensors: at most 262,144" in refusal(gguf(n_tensors=count), tmp_path)


def test_counts_beyond_the_file(tmp_path):
    assert "a list of 60,000 metadata keys needs" in refusal(gguf(n_keys=60_000), tmp_path)
    assert "a list of 200,000 tensors needs" in refusal(gguf(n_tensors=200_000), tmp_path)


# What is refused: metadata


REST = bytes(64)
BAD_KEYS = [
    ("empty name", key("", UINT32, bytes(4)), "the name of metadata key 0 is 0 bytes long"),
    ("long name", key("k" * 65536, UINT32, bytes(4)), "the name of metadata key 0 is 65,536 bytes long"),
    ("endless name", struct.pack("<Q", 2**63) + REST, "9,223,372,036,854,775,808 bytes long: a name has 1 to 65,535"),
    ("name not UTF-8", key(b"\xff\xfe", UINT32, bytes(4)), "is b'\\xff\\xfe': a name must be valid UTF-8"),
    ("control in name", key("a\x1b[2J\n", UINT32, bytes(4)), "'a\\x1b[2J\\n': a name must not have control characters"),
    ("value type", key("k", 13, REST), "key 'k' has value type 13: GGUF knows 0 (UINT8) to 12 (FLOAT64)"),
    ("value type", key("k", 2**32 - 1, REST), "key 'k' has value type 4294967295"),
    ("item type", array("k", 99, 1, REST), "key 'k' has value type 99"),
    ("bool", key("k", ValueType.BOOL, b"\2" + REST), "key 'k' is a bool of value 2: a bool is 0 or 1"),
    ("bools", array("k", ValueType.BOOL, 3, b"\0\xff\1" + REST), "array of bools with the value 255"),
    ("string", key("k", STRING, struct.pack("<Q", 2**60) + REST), "key 'k' needs 1,152,921,504,606,846,976 bytes"),
    ("string", key("k", STRING, struct.pack("<Q", 2**64 - 1) + REST), "key 'k' needs 18,446,744,073,709,551,615"),
    ("array", array("k", ValueType.UINT8, 2**40, REST), "the array of key 'k' needs 1,099,511,627,776 bytes"),
    ("array overflow", array("k", ValueType.UINT64, 2**61 + 1, REST), "key 'k' needs 18,446,744,073,709,551,624 bytes"),
    (
        "strings",
        array("k", STRING, 2**61, REST),
        "key 'k' has 2,305,843,009,213,693,952 strings: all arrays together may have 4,194,304",
    ),
    ("strings", array("k", STRING, 4_000_000, REST), "key 'k' needs 32,000,000 bytes"),
    (
        "string in array",
        array("k", STRING, 2, packed_string("ab") + struct.pack("<Q", 2**50) + REST),
        "string 1 of key 'k' needs 1,125,899,906,842,624 bytes",
    ),
    (
        "arrays",
        array("k", ARRAY, 2**62, REST),
        "key 'k' holds 4,611,686,018,427,387,904 arrays inside an array: a file may have 65,536",
    ),
    ("arrays", array("k", ARRAY, 60_000, REST), "key 'k' needs 720,000 bytes"),
    ("deep", array("k", ARRAY, 1, struct.pack("<IQ", ARRAY, 1) * 1000), "key 'k' nests arrays more than 4 deep"),
    ("long name shown", key("k" * 300, 77, REST), "'... (300 long) has value type 77"),
]


@pytest.mark.parametrize("bad, expected", [case[1:] for case in BAD_KEYS], ids=[case[0] for case in BAD_KEYS])
def test_bad_metadata(tmp_path, bad, expected):
    good = key("before", UINT32, bytes(4))
    for keys in ([bad], [good, bad]):
        message = refusal(gguf(keys), tmp_path)
        assert message.startswith(f"{tmp_path}/model.gguf: ")
        assert expected.replace("key 0", f"key {len(keys) - 1}") in message


def test_duplicate_key(tmp_path):
    message = refusal(gguf([key("k", UINT32, bytes(4)), key("k", STRING, packed_string("x"))]), tmp_path)
    assert "key 'k' stands twice in the metadata: each key must stand once" in message


@pytest.mark.parametrize("value", [0, 3, 48, 2**25, 2**31, 2**32 - 1])
def test_bad_alignment(tmp_path, value):
    message = refusal(gguf([alignment(value)], [tensor("t", (1,))], ONE_F32), tmp_path)
    assert f"key 'general.alignment' is {value}: it must be a power of two from 1 to 16,777,216" in message


@pytest.mark.parametrize("value_type, payload", [(ValueType.INT32, bytes(4)), (ValueType.UINT64, bytes(8))])
def test_alignment_of_another_type(tmp_path, value_type, payload):
    message = refusal(gguf([key("general.alignment", value_type, payload)]), tmp_path)
    assert f"key 'general.alignment' is of type {value_type.name}: it must be UINT32" in message


# What is refused: tensors


BAD_TENSORS = [
    ("empty name", tensor("", (1,)), "the name of tensor 0 is 0 bytes long: a name has 1 to 63 bytes"),
    ("long name", tensor("t" * 64, (1,)), "the name of tensor 0 is 64 bytes long: a name has 1 to 63 bytes"),
    ("name not UTF-8", tensor(b"\xc3(", (1,)), "the name of tensor 0 is b'\\xc3(': a name must be valid UTF-8"),
    ("null in name", tensor("a\0b", (1,)), "'a\\x00b': a name must not have control characters"),
    ("no dimensions", tensor("t", ()), "tensor 't' has 0 dimensions: 1 to 4 are allowed"),
    ("five dimensions", tensor("t", (1, 1, 1, 1, 1)), "tensor 't' has 5 dimensions: 1 to 4 are allowed"),
    ("many dimensions", packed_string("t") + b"\xff" * 4 + bytes(64), "tensor 't' has 4,294,967,295 dimensions"),
    ("zero dimension", tensor("t", (4, 0)), "tensor 't' has shape (0, 4): every dimension must be at least 1"),
    ("negative dimension", tensor("t", (2**64 - 1,)), "tensor 't' of shape (18446744073709551615,) in F32 takes"),
    ("overflow", tensor("t", (2**62, 2**62, 4)), "tensor 't' of shape (4, 4611686018427387904, 4611686018427387904)"),
    ("overflow to 0", tensor("t", (2**32, 2**32)), "takes 73,786,976,294,838,206,464 bytes, more than the whole file"),
    ("unknown type", tensor("t", (256,), 77), "tensor 't' has ggml type 77, which is unknown"),
    ("negative type", tensor("t", (256,), 2**32 - 1), "tensor 't' has ggml type 4294967295, which is unknown"),
    ("removed type", tensor("t", (256,), 31), "tensor 't' has ggml type 31 (Q4_0_4_4), which GGUF no longer has"),
    ("broken row", tensor("t", (128,), Q4_K), "tensor 't' has rows of 128 values, which blocks of Q4_K do not divide"),
    ("broken row", tensor("t", (33, 32), Q4_0), "a row must be a multiple of 32"),
    ("offset", tensor("t", (1,), F32, 4), "tensor 't' has data offset 4, but 0 is due"),
    ("offset far off", tensor("t", (1,), F32, 2**64 - 32), "data offset 18,446,744,073,709,551,584, but 0 is due"),
]


@pytest.mark.parametrize("bad, expected", [case[1:] for case in BAD_TENSORS], ids=[case[0] for case in BAD_TENSORS])
def test_bad_tensors(tmp_path, bad, expected):
    message = refusal(gguf([], [bad], bytes(1024)), tmp_path)
    assert message.startswith(f"{tmp_path}/model.gguf: ") and expected in message


@pytest.mark.parametrize("second", [0, 16, 33, 64, 2**40], ids=["overlap", "overlap", "unaligned", "gap", "far"])
def test_second_tensor_elsewhere(tmp_path, second):
    message = refusal(gguf([], [tensor("a", (5,)), tensor("b", (5,), F32, second)], bytes(256)), tmp_path)
    assert f"tensor 'b' has data offset {second:,}, but 32 is due: tensors must follow each other" in message


def test_duplicate_tensor(tmp_path):
    message = refusal(gguf([], [tensor("a", (1,)), tensor("a", (1,), F32, 32)], bytes(64)), tmp_path)
    assert "tensor 'a' stands twice in the tensor list: each name must stand once" in message


def test_data_cut_short(tmp_path):
    message = refusal(gguf([], [tensor("a", (8,)), tensor("b", (8,), F32, 32)], bytes(63)), tmp_path)
    assert "the data of tensor 'b' ends at byte" in message and "cut short" in message


# Memory


def test_huge_sparse_file_opens_with_little_memory(tmp_path):
    """8 GB of tensors, 128,000 tokens, 280,000 merges: nothing but the header is touched."""
    tokens = array("tokens", STRING, 128_000, b"".join(packed_string(f"token{i}") for i in range(128_000)))
    merges = array("merges", STRING, 280_000, b"".join(packed_string(f"to {i}") for i in range(280_000)))
    scores = array("scores", ValueType.FLOAT32, 128_000, bytes(4 * 128_000))
    size = 2**31
    tensors = [tensor(f"t{i}", (2**20, 2**9), F32, i * size) for i in range(4)]
    path = tmp_path / "huge.gguf"
    head = gguf([tokens, merges, scores], tensors)
    path.write_bytes(head)
    os.truncate(path, len(head) + 4 * size)
    tracemalloc.start()
    try:
        with open_gguf(path) as file:
            assert len(file.metadata["merges"]) == 280_000
            assert file.raw("t3").shape == (2**9, 2**22)
            assert file.raw("t3")[-1, -1] == 0
            file.release("t3")
        assert tracemalloc.get_traced_memory()[1] < 80 * 2**20
    finally:
        tracemalloc.stop()


HOSTILE = [
    ("string", key("k", STRING, struct.pack("<Q", 2**32))),
    ("numbers", array("k", ValueType.FLOAT64, 2**29)),
    ("strings", array("k", STRING, 2**28)),
    ("arrays", array("k", ARRAY, 2**27)),
]


@pytest.mark.parametrize("bad", [case[1] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_claims_backed_by_a_huge_file_take_no_memory(tmp_path, bad):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(header([bad]))
    os.truncate(path, 2**33)
    tracemalloc.start()
    try:
        message = refusal_of(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert "key 'k'" in message


def test_strings_are_counted_over_all_keys(tmp_path):
    strings = [array(f"k{i}", STRING, 2**21, bytes(2**24)) for i in range(3)]
    assert "key 'k2' has 2,097,152 strings: all arrays together may have 4,194,304" in refusal(
        header(strings), tmp_path
    )


def test_many_large_strings_are_bounded_together(tmp_path):
    """Each fits, all together do not: the header as a whole is bounded."""
    path = tmp_path / "hostile.gguf"
    with path.open("wb") as file:
        file.write(header(n_keys=200))
        for i in range(200):
            file.write(key(f"k{i}", STRING, struct.pack("<Q", 2**25)))
            file.seek(2**25, os.SEEK_CUR)
        file.write(b"\0")
    assert "metadata and tensor list must not exceed 134,217,728 bytes" in refusal_of(path)


def test_release_and_close(opened):
    data = np.arange(2**16, dtype="<u4").tobytes()
    file = opened(gguf([], [tensor("t", (2**16,))], data))
    view = file.raw("t")
    assert view.tobytes() == data
    file.release("t")
    assert view.tobytes() == data
    file.close()
    file.close()
    assert view.tobytes() == data
    for look in (file.raw, file.release):
        with pytest.raises(GGUFError, match=r"model.gguf: is closed, so tensor 't' cannot be read"):
            look("t")
        with pytest.raises(GGUFError, match=r"model.gguf: has no tensor 'u'"):
            look("u")


def test_broken_files_leave_nothing_open(tmp_path):
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else None
    for _ in range(5):
        refusal(b"GGUF" + bytes(100), tmp_path)
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before


# Split models


def write_split(folder: Path, count: int = 3, prefix: str = "m") -> Path:
    """A model of `count` tensors, one a file; returns the first path."""
    folder.mkdir(exist_ok=True, parents=True)
    for i in range(count):
        keys = split_keys(i, count, count)
        if i == 0:
            keys.insert(0, key("name", STRING, packed_string("whole")))
        content = gguf(keys, [tensor(f"t{i}", (1,))], struct.pack("<f", i))
        (folder / f"{prefix}-{i + 1:05d}-of-{count:05d}.gguf").write_bytes(content)
    return folder / f"{prefix}-00001-of-{count:05d}.gguf"


def rewrite(path: Path, number: int, keys: list[bytes], tensors=None) -> Path:
    other = path.with_name(path.name.replace("-00001-", f"-{number:05d}-"))
    other.write_bytes(gguf(keys, [tensor(f"t{number - 1}", (1,))] if tensors is None else tensors, bytes(64)))
    return other


def test_split_model_loads_as_one(tmp_path):
    first = write_split(tmp_path)
    with open_gguf(first) as file:
        assert file.metadata == {"name": "whole"}
        assert [p.name for p in file.paths] == [f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
        assert [(t.name, t.shard) for t in file.tensors.values()] == [("t0", 0), ("t1", 1), ("t2", 2)]
        assert [file.raw(n).view("<f4")[0] for n in file.tensors] == [0.0, 1.0, 2.0]
        file.release("t2")


def test_split_model_written_by_the_gguf_package(tmp_path):
    writer = gguf_package.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"t{i}", np.full((2, 3), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(tmp_path / "m-00001-of-00003.gguf") as file:
        assert file.metadata == {"general.architecture": "llama"}
        assert [t.shard for t in file.tensors.values()] == [0, 0, 1, 1, 2]
        assert [file.raw(f"t{i}").view(np.float32)[0, 0] for i in range(5)] == [0, 1, 2, 3, 4]


def test_split_model_whose_first_file_has_no_tensors(tmp_path):
    first = write_split(tmp_path)
    rewrite(first, 1, split_keys(0, 3, 2), tensors=[])
    with open_gguf(first) as file:
        assert list(file.tensors) == ["t1", "t2"]


@pytest.mark.parametrize("count", [0, 1])
def test_a_model_in_one_file_needs_no_split_name(opened, count):
    file = opened(gguf(split_keys(0, count, 5), [tensor("t", (1,))], ONE_F32))
    assert file.metadata["split.count"] == count


def test_other_file_than_the_first(tmp_path):
    first = write_split(tmp_path)
    message = refusal_of(first.with_name("m-00002-of-00003.gguf"))
    assert "m-00002-of-00003.gguf: is file 2 of 3 of a split model: open the first" in message
    assert message.endswith(str(first))


def test_missing_file(tmp_path):
    first = write_split(tmp_path)
    first.with_name("m-00003-of-00003.gguf").unlink()
    assert "m-00003-of-00003.gguf: is missing" in refusal_of(first)


def test_renamed_first_file(tmp_path):
    first = write_split(tmp_path)
    other = first.rename(first.with_name("renamed.gguf"))
    assert "its name must end in '-00001-of-00003.gguf'" in refusal_of(other)


def test_contradictory_files(tmp_path):
    first = write_split(tmp_path)
    rewrite(first, 2, split_keys(2, 3, 3))
    assert "m-00002-of-00003.gguf: key 'split.no' is 2: file 2 of 3 must say 1" in refusal_of(first)
    rewrite(first, 2, split_keys(1, 4, 3))
    assert "m-00002-of-00003.gguf: key 'split.count' is 4, but 3 in the first file" in refusal_of(first)
    rewrite(first, 2, [])
    assert "m-00002-of-00003.gguf: key 'split.no' is missing" in refusal_of(first)
    rewrite(first, 2, split_keys(1, 3, 3), tensors=[tensor("t0", (1,))])
    assert "tensor 't0' stands in m-00001-of-00003.gguf too" in refusal_of(first)
    rewrite(first, 2, split_keys(1, 3, 3), tensors=[])
    assert "key 'split.tensors.count' is 3, but the files hold 2 tensors" in refusal_of(first)
    first.with_name("m-00002-of-00003.gguf").write_bytes(b"PK\3\4")
    assert "m-00002-of-00003.gguf: is not a GGUF file" in refusal_of(first)


def test_contradictory_first_file(tmp_path):
    first = write_split(tmp_path)
    keys = split_keys(0, 3, 3)
    rewrite(first, 1, keys[:2])
    assert "key 'split.tensors.count' is missing" in refusal_of(first)
    rewrite(first, 1, keys[1:])
    assert "key 'split.no' is missing" in refusal_of(first)
    rewrite(first, 1, split_keys(7, 3, 3))
    assert "key 'split.no' is 7: of 3 files it must be 0 to 2" in refusal_of(first)
    rewrite(first, 1, [keys[0], key("split.count", STRING, packed_string("3\n")), keys[2]])
    assert "key 'split.count' is \"'3\\\\n'\": it must be an integer" in refusal_of(first)
    rewrite(first, 1, [keys[0], key("split.count", ValueType.UINT64, struct.pack("<Q", 2**63)), keys[2]])
    assert "key 'split.count' is 9,223,372,036,854,775,808: a model has at most 65,535 files" in refusal_of(first)


def test_no_file_is_followed_out_of_its_folder(tmp_path):
    first = write_split(tmp_path / "here")
    elsewhere = write_split(tmp_path / "elsewhere")
    second = first.with_name("m-00002-of-00003.gguf")
    second.unlink()
    second.symlink_to(elsewhere.with_name(second.name))
    assert f"{second}: is a link into another folder" in refusal_of(first)
    second.unlink()
    second.symlink_to(second.name)
    assert f"{second}: cannot be followed" in refusal_of(first)


def test_links_into_one_folder_of_blobs(tmp_path):
    """The Hugging Face cache: every file is a link to `../blobs/<hash>`."""
    first = write_split(tmp_path / "blobs", prefix="x")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for i in (1, 2, 3):
        blob = first.with_name(f"x-{i:05d}-of-00003.gguf").rename(first.with_name(f"hash{i}"))
        (snapshot / f"m-{i:05d}-of-00003.gguf").symlink_to(Path("../blobs") / blob.name)
    with open_gguf(snapshot / "m-00001-of-00003.gguf") as file:
        assert len(file.tensors) == 3
    whole_folder = tmp_path / "link"
    whole_folder.symlink_to(snapshot)
    with open_gguf(str(whole_folder / "m-00001-of-00003.gguf")) as file:
        assert len(file.tensors) == 3


def test_metadata_survives_json(opened):
    file = opened(gguf([key("odd", STRING, packed_string(b"\xff"))]))
    assert json.loads(json.dumps(file.metadata)) == file.metadata
