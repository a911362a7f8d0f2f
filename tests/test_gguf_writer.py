"""Writing GGUF files: the same bytes back, nothing half written, and refusals that name what is wrong."""

import os
import signal
import stat
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import gguf as gguf_package
import numpy as np
import pytest
from gguf_bytes import ARRAY, STRING, array, gguf, key, tensor
from gguf_bytes import string as packed_string
from hypothesis import given
from hypothesis import strategies as st

from realm_jax.errors import GGUFError
from realm_jax.gguf.reader import open_gguf
from realm_jax.gguf.types import Field, ValueType, field
from realm_jax.gguf.writer import write_gguf

WORD = field("llama")
NOTHING = np.zeros(0, np.uint8)


def copy(source: Path, target: Path) -> None:
    """Reads a file and writes it again."""
    with open_gguf(source) as file:
        tensors = [(t.name, t.format, t.shape, lambda name=t.name: file.raw(name)) for t in file.tensors.values()]
        write_gguf(target, file.fields, tensors)


def refusal(path: Path, fields=None, tensors=(), **options) -> str:
    """The one-line message with which these contents are refused; nothing may be left in the folder."""
    before = sorted(os.listdir(path.parent)) if path.parent.is_dir() else None
    with pytest.raises(GGUFError) as caught:
        write_gguf(path, fields or {}, tensors, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 1000
    assert before is None or sorted(os.listdir(path.parent)) == before
    return message


# Round trips


def write_with_the_gguf_package(path: Path, align: int | None) -> None:
    """Every value type, arrays of every type, several tensor formats, through the package's own writer."""
    writer = gguf_package.GGUFWriter(path, "llama")
    if align:
        writer.add_custom_alignment(align)
    for name, value in [("uint8", 7), ("int8", -7), ("uint16", 777), ("int16", -777), ("uint32", 7 << 20)]:
        getattr(writer, f"add_{name}")(f"a.{name}", value)
    for name, value in [("int32", -7 << 20), ("uint64", 7 << 50), ("int64", -7 << 50), ("float32", 0.1)]:
        getattr(writer, f"add_{name}")(f"a.{name}", value)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.yes", True)
    writer.add_bool("a.no", False)
    writer.add_string("a.string", "zwölf\n𝄞")
    for item_type in gguf_package.GGUFValueType:
        if item_type not in (ARRAY, STRING):
            values = [True, False] if item_type is ValueType.BOOL else [1, 2, 3]
            writer.add_key_value(f"b.{item_type.name}", values, ARRAY, sub_type=item_type)
    writer.add_array("b.strings", ["", "a", "zwölf"])
    writer.add_array("b.nested", [[1, 2], [3]])
    rng = np.random.default_rng(0)
    writer.add_tensor("f32", rng.normal(size=(3, 5)).astype(np.float32))
    writer.add_tensor("f16", rng.normal(size=7).astype(np.float16))
    q4_k = rng.integers(0, 256, (2, 3, 288), dtype=np.uint8)
    writer.add_tensor("q4_k", q4_k, raw_dtype=gguf_package.GGMLQuantizationType.Q4_K)
    writer.add_tensor("int8", rng.integers(-9, 9, (1, 2, 3, 4), dtype=np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("align", [None, 8, 64, 4096])
def test_read_and_written_again_is_the_same_bytes(tmp_path, align):
    original, again = tmp_path / "original.gguf", tmp_path / "again.gguf"
    write_with_the_gguf_package(original, align)
    copy(original, again)
    assert again.read_bytes() == original.read_bytes()


def test_odd_bytes_and_nested_arrays_come_back(tmp_path):
    inner = struct.pack("<IQ", STRING, 1) + packed_string(b"\xff\xc3(")
    keys = [
        key("odd", STRING, packed_string(b"\x80\xff")),
        array("nested", ARRAY, 2, inner + struct.pack("<IQ", ARRAY, 0)),
        array("empty", ValueType.BOOL, 0),
    ]
    original, again = tmp_path / "original.gguf", tmp_path / "again.gguf"
    original.write_bytes(gguf(keys, [tensor("t", (4,))], bytes(32)))
    copy(original, again)
    assert again.read_bytes() == original.read_bytes()


def test_the_gguf_package_reads_what_was_written(tmp_path):
    path = tmp_path / "mine.gguf"
    weights = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    blocks = np.arange(4 * 34, dtype=np.uint8).reshape(2, 68)
    fields = {"general.architecture": WORD, "n": field(5), "x": field([1.5, 2.5]), "words": field(["a", "ö"])}
    write_gguf(
        path,
        fields,
        [
            ("w", "F32", weights.shape, lambda: weights.view(np.uint8)),
            ("q", "Q8_0", (2, 64), lambda: iter([blocks[:1], blocks[1:]])),
        ],
        alignment=128,
    )
    theirs = gguf_package.GGUFReader(path)
    assert theirs.alignment == 128
    assert {n: theirs.fields[n].contents() for n in fields} == {
        "general.architecture": "llama",
        "n": 5,
        "x": [1.5, 2.5],
        "words": ["a", "ö"],
    }
    first, second = theirs.tensors
    np.testing.assert_array_equal(first.data, weights)
    np.testing.assert_array_equal(second.data, blocks)
    assert (second.name, second.tensor_type.name, list(second.shape)) == ("q", "Q8_0", [64, 2])
    assert second.data_offset % 128 == 0


VALUES = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.floats(width=32, allow_nan=False),
    st.booleans(),
    st.text(),
    st.lists(st.text(), min_size=1, max_size=5),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=5),
    st.lists(st.booleans(), min_size=1, max_size=5),
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=3),
)


def as_lists(value):
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [as_lists(v) for v in value] if isinstance(value, list) else value


@given(st.dictionaries(st.text("abc._09", min_size=1).map(lambda k: f"k.{k}"), VALUES, max_size=5))
def test_inferred_fields_come_back(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("fields") / "f.gguf"
    write_gguf(path, {k: field(v) for k, v in values.items()}, [])
    with open_gguf(path) as file:
        assert {k: as_lists(v) for k, v in file.metadata.items()} == values


def test_alignment_is_taken_from_the_fields_or_added(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, {"general.alignment": field(64)}, [("t", "F32", (1,), lambda: np.zeros(4, np.uint8))])
    with open_gguf(path) as file:
        assert file.alignment == 64 and file.tensors["t"].offset % 64 == 0
    assert path.stat().st_size % 64 == 0
    write_gguf(path, {}, [], alignment=16)
    with open_gguf(path) as file:
        assert file.alignment == 16 and file.metadata == {"general.alignment": 16}


# `field`


@pytest.mark.parametrize(
    "value, value_type, item_type",
    [
        (0, ValueType.UINT32, None),
        (-1, ValueType.INT32, None),
        (2**32, ValueType.UINT64, None),
        (-(2**31) - 1, ValueType.INT64, None),
        (np.int64(3), ValueType.UINT32, None),
        (1.0, ValueType.FLOAT32, None),
        (np.float64(1), ValueType.FLOAT32, None),
        (True, ValueType.BOOL, None),
        ("x", STRING, None),
        (["x"], ARRAY, STRING),
        ([1, -2], ARRAY, ValueType.INT32),
        ([2**31], ARRAY, ValueType.UINT32),
        ([-1, 2**31], ARRAY, ValueType.INT64),
        ((1, 2.5), ARRAY, ValueType.FLOAT32),
        ([True], ARRAY, ValueType.BOOL),
        (np.zeros(0, np.uint16), ARRAY, ValueType.UINT16),
        (np.zeros(1, ">f8"), ARRAY, ValueType.FLOAT64),
        ([[1], ["x"]], ARRAY, ARRAY),
    ],
)
def test_type_of_an_inferred_field(value, value_type, item_type):
    made = field(value)
    assert (made.type, made.item_type) == (value_type, item_type)
    assert field(made) is made


@pytest.mark.parametrize(
    "value, expected",
    [
        ([], "an empty list says no item type"),
        ([1, "x"], "a list of int, str cannot be GGUF metadata"),
        ([True, 1], "a list of bool, int cannot"),
        (2**64, "do not fit into 64 bits"),
        ([-1, 2**63], "do not fit into 64 bits"),
        (None, "a value of type NoneType cannot"),
        ({}, "a value of type dict cannot"),
        (np.zeros((2, 2)), "an array of float64 with 2 dimensions cannot"),
        (np.zeros(2, complex), "an array of complex128 with 1 dimensions cannot"),
    ],
)
def test_values_that_are_no_metadata(value, expected):
    with pytest.raises(GGUFError, match=expected):
        field(value)


# What is refused


BAD_FIELDS = [
    ("", WORD, "key '' has a name of 0 bytes: 1 to 65,535 are allowed"),
    ("k" * 65536, WORD, "has a name of 65,536 bytes"),
    ("a\nb", WORD, "key 'a\\nb' has control characters in its name"),
    ("\udc80", WORD, "key '\\udc80' has control characters in its name"),
    ("k", Field(STRING, 5), "key 'k' holds '5': a STRING value must be a str"),
    ("k", Field(STRING, "\ud800"), "key 'k' holds '\\ud800', which UTF-8 cannot express"),
    ("k", Field(ValueType.UINT8, 256), "key 'k' holds '256', which is no UINT8 value"),
    ("k", Field(ValueType.UINT32, -1), "key 'k' holds '-1', which is no UINT32 value"),
    ("k", Field(ValueType.INT32, 1.5), "key 'k' holds '1.5', which is no INT32 value"),
    ("k", Field(ValueType.FLOAT32, 1e300), "which is no FLOAT32 value"),
    ("k", Field(ValueType.FLOAT32, "x"), "which is no FLOAT32 value"),
    ("k", Field(ValueType.BOOL, 2), "key 'k' holds '2': a BOOL value must be True or False"),
    ("k", Field(ValueType.UINT32, 1, ValueType.UINT32), "key 'k' is a UINT32 with an item type"),
    ("k", Field(ARRAY, [1]), "key 'k' is an ARRAY without an item type"),
    ("k", Field(ARRAY, ["x", 5], STRING), "key 'k' holds '5': a STRING value must be a str"),
    ("k", Field(ARRAY, [[1]], ARRAY), "its items must be Fields of type ARRAY"),
    ("k", Field(ARRAY, [256], ValueType.UINT8), "int64 values that an array of UINT8 cannot hold"),
    ("k", Field(ARRAY, [0.5], ValueType.INT32), "float64 values that an array of INT32 cannot hold"),
    ("k", Field(ARRAY, [2], ValueType.BOOL), "int64 values that an array of BOOL cannot hold"),
    ("k", Field(ARRAY, np.zeros((2, 2)), ValueType.FLOAT32), "an array of FLOAT32 cannot hold"),
    ("k", field([[[[[1]]]]]), "key 'k' nests arrays more than 4 deep"),
    ("general.alignment", field(24), "key 'general.alignment' is 24: it must be a power of two"),
    ("general.alignment", field("x"), "key 'general.alignment' is of type STRING: it must be UINT32"),
]


@pytest.mark.parametrize("name, value, expected", BAD_FIELDS)
def test_bad_fields(tmp_path, name, value, expected):
    assert expected in refusal(tmp_path / "x.gguf", {"first": WORD, name: value})


def give(*chunks):
    return lambda: chunks


BAD_TENSORS = [
    ("", "F32", (1,), "tensor '' has a name of 0 bytes: 1 to 63 are allowed"),
    ("t" * 64, "F32", (1,), "has a name of 64 bytes: 1 to 63 are allowed"),
    ("ü" * 32, "F32", (1,), "has a name of 64 bytes"),
    ("a\0", "F32", (1,), "tensor 'a\\x00' has control characters in its name"),
    ("t", "Q9", (1,), "tensor 't' has the unknown format 'Q9': use one of F32, F16"),
    ("t", "F32", (), "tensor 't' has 0 dimensions"),
    ("t", "F32", (1,) * 5, "tensor 't' has 5 dimensions"),
    ("t", "F32", (0, 4), "tensor 't' has shape (0, 4): every dimension must be at least 1"),
    ("t", "Q4_K", (256, 128), "tensor 't' has rows of 128 values, which blocks of Q4_K do not divide"),
]


@pytest.mark.parametrize("name, format_name, shape, expected", BAD_TENSORS)
def test_bad_tensors(tmp_path, name, format_name, shape, expected):
    tensors = [("fine", "F32", (1,), give()), (name, format_name, shape, give())]
    assert expected in refusal(tmp_path / "x.gguf", {}, tensors)


def test_duplicate_tensor(tmp_path):
    tensors = [("t", "F32", (1,), give())] * 2
    assert "tensor 't' is given twice" in refusal(tmp_path / "x.gguf", {}, tensors)


FOUR = np.arange(4, dtype=np.uint8)


@pytest.mark.parametrize(
    "produce, expected",
    [
        (give(), "tensor 't' came with 0 of the 8 bytes that shape (2,) in F32 takes"),
        (give(FOUR), "came with 4 of the 8 bytes"),
        (give(FOUR, FOUR, FOUR), "came with more than the 8 bytes"),
        (lambda: np.zeros(2, np.float32), "tensor 't' came as float32: its bytes must come as uint8"),
    ],
)
def test_wrong_amount_of_bytes(tmp_path, produce, expected):
    assert expected in refusal(tmp_path / "x.gguf", {}, [("t", "F32", (2,), produce)])


def test_alignment_that_contradicts_the_fields(tmp_path):
    message = refusal(tmp_path / "x.gguf", {"general.alignment": field(64)}, alignment=32)
    assert "key 'general.alignment' is 64, but alignment 32 is asked for" in message
    assert "is 3: it must be a power of two" in refusal(tmp_path / "x.gguf", alignment=3)


def test_more_than_a_reader_takes(tmp_path):
    assert "65,537 keys are too many: at most 65,536" in refusal(
        tmp_path / "x.gguf", {f"k{i}": WORD for i in range(65537)}
    )
    large = field("x" * 2**27)
    assert "bytes of metadata and tensor list are too many" in refusal(tmp_path / "x.gguf", {"large": large})


def test_places_that_cannot_be_written(tmp_path):
    assert "is a folder" in refusal(tmp_path)
    assert "none does not exist: make it first" in refusal(tmp_path / "none" / "x.gguf")
    assert "cannot be written: File name too long" in refusal(tmp_path / ("x" * 300))
    assert "is not a regular file" in refusal(Path("/dev/null"))
    (tmp_path / "file").touch()
    assert "cannot be written: Not a directory" in refusal(tmp_path / "file" / "x.gguf")
    with pytest.raises(GGUFError, match="cannot be written: embedded null byte"):
        write_gguf(tmp_path / "a\0b", {}, [])


# Nothing half written


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("existing", [None, b"precious"])
def test_failure_leaves_the_folder_as_it_was(tmp_path, error, existing):
    path = tmp_path / "x.gguf"
    if existing:
        path.write_bytes(existing)

    def produce():
        yield np.zeros(4, np.uint8)
        assert len(os.listdir(tmp_path)) == (2 if existing else 1)
        raise error

    with pytest.raises(error):
        write_gguf(path, {}, [("t", "F32", (2,), produce)])
    assert os.listdir(tmp_path) == (["x.gguf"] if existing else [])
    assert not existing or path.read_bytes() == existing


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits on file size")
def test_full_disk(tmp_path):
    """A file size limit stands for the full disk: one line, and the old file is still there."""
    path = tmp_path / "x.gguf"
    path.write_bytes(b"precious")
    script = textwrap.dedent(
        """
        import resource, signal, sys
        import numpy as np
        from realm_jax.errors import GGUFError
        from realm_jax.gguf.writer import write_gguf
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
        try:
            write_gguf(sys.argv[1], {}, [("t", "F32", (2**15,), lambda: np.zeros(2**17, np.uint8))])
        except GGUFError as error:
            print(error)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{path}: could not be written: ") and len(done.stdout.splitlines()) == 1
    assert os.listdir(tmp_path) == ["x.gguf"] and path.read_bytes() == b"precious"


def test_a_file_may_be_written_over_itself(tmp_path):
    path = tmp_path / "x.gguf"
    write_with_the_gguf_package(path, None)
    before = path.read_bytes()
    copy(path, path)
    assert path.read_bytes() == before


def test_permissions_follow_the_umask(tmp_path):
    path = tmp_path / "x.gguf"
    mask = os.umask(0o027)
    try:
        write_gguf(path, {}, [])
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_pieces_are_asked_for_in_turn(tmp_path):
    asked = []

    def produce(name):
        asked.append(name)
        yield from (FOUR, FOUR[::-1], NOTHING)

    path = tmp_path / "x.gguf"
    write_gguf(path, {}, [(n, "F32", (2,), lambda n=n: produce(n)) for n in "ab"])
    assert asked == ["a", "b"]
    with open_gguf(path) as file:
        assert file.raw("b").tolist() == [0, 1, 2, 3, 3, 2, 1, 0]
