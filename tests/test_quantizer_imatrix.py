"""Importance matrices: our files and llama.cpp's two formats, and every way in which one can be broken."""

import struct

import numpy as np
import pytest

from realm_jax.errors import GGUFError, RealmError
from realm_jax.gguf.reader import open_gguf
from realm_jax.gguf.types import Field, ValueType, field
from realm_jax.gguf.writer import write_gguf
from realm_jax.quantizer.imatrix import Imatrix, from_sums, read_imatrix, write_imatrix

NAME = "blk.0.ffn_down.weight"


def legacy(entries, *, chunks=7, text=b"wiki.txt", count=None) -> bytes:
    """A file of `save_imatrix_legacy`: entries (name, calls, values); chunks None leaves the end out, as old files."""
    raw = struct.pack("<i", len(entries) if count is None else count)
    for name, calls, values in entries:
        values = np.asarray(values, np.float32)
        raw += struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, values.size) + values.tobytes()
    return raw if chunks is None else raw + struct.pack("<ii", chunks, len(text)) + text


def write_sums(path, tensors, keys=None) -> None:
    """A GGUF file with the keys of an importance matrix and F32 tensors name -> array, or others (format, array)."""
    fields = {
        "general.type": field("imatrix"),
        "imatrix.datasets": field(["a.txt", "b.txt"]),
        "imatrix.chunk_count": field(5),
        "imatrix.chunk_size": field(512),
    }
    fields = {k: f for k, f in (fields | (keys or {})).items() if f is not None}
    listed = []
    for name, array in tensors.items():
        array = np.asarray(array)
        kind = {"f4": "F32", "f2": "F16"}[array.dtype.str[1:]]
        listed.append((name, kind, array.shape, lambda a=array: np.frombuffer(a.tobytes(), np.uint8)))
    write_gguf(path, fields, listed)


def test_llama_cpps_gguf_format(tmp_path):
    """Sums over counts; an expert that was never chosen counts all channels alike."""
    path = tmp_path / "imatrix.gguf"
    sums = np.array([[2, 4, 6], [0, 0, 0], [3, 0, 9]], np.float32)
    write_sums(
        path,
        {
            "a.weight.in_sum2": np.array([10, 20], np.float32),
            "a.weight.counts": np.array([5], np.float32),
            "b.weight.counts": np.array([[2], [0], [3]], np.float32),
            "b.weight.in_sum2": sums,
        },
    )
    seen = read_imatrix(path)
    assert seen.values["a.weight"].tolist() == [2, 4]
    assert seen.values["b.weight"].tolist() == [[1, 2, 3], [1, 1, 1], [1, 0, 3]]
    assert {name: count.tolist() for name, count in seen.counts.items()} == {"a.weight": [5], "b.weight": [2, 0, 3]}
    assert (seen.chunks, seen.chunk_size, seen.datasets) == (5, 512, ("a.txt", "b.txt"))
    assert seen.source == str(path)


@pytest.mark.parametrize("chunks", [7, None])
def test_llama_cpps_older_format(tmp_path, chunks):
    (tmp_path / "imatrix.dat").write_bytes(legacy([(b"a.weight", 4, [8, 2]), (b"b.weight", 0, [5])], chunks=chunks))
    seen = read_imatrix(tmp_path / "imatrix.dat")
    assert seen.values["a.weight"].tolist() == [2, 0.5]
    assert seen.values["b.weight"].tolist() == [5]
    assert (seen.chunks, seen.datasets) == ((0, ()) if chunks is None else (7, ("wiki.txt",)))


def test_written_and_read_again(tmp_path):
    rng = np.random.default_rng(0)
    sums = {"b.weight": rng.random((3, 8)), "a.weight": rng.random((1, 4))}
    counts = {"b.weight": np.array([64, 0, 8]), "a.weight": np.array([2])}  # powers of two: nothing is rounded
    ours = from_sums(sums, counts, 3, 64, datasets=("text.txt",))
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, ours)
    seen = read_imatrix(path)
    assert list(seen.values) == ["a.weight", "b.weight"]  # in the order of names, as llama.cpp writes them
    for name in ours.values:
        np.testing.assert_array_equal(seen.values[name], ours.values[name])
        np.testing.assert_array_equal(seen.counts[name], ours.counts[name])
    assert (seen.chunks, seen.chunk_size, seen.datasets) == (3, 64, ("text.txt",))
    with open_gguf(path) as file:
        types = {key: (f.type, f.item_type) for key, f in file.fields.items()}
        assert file.tensors["b.weight.counts"].shape == (3, 1)
    assert types == {  # as `save_imatrix` has them
        "general.type": (ValueType.STRING, None),
        "imatrix.datasets": (ValueType.ARRAY, ValueType.STRING),
        "imatrix.chunk_count": (ValueType.UINT32, None),
        "imatrix.chunk_size": (ValueType.UINT32, None),
    }


def test_values_alone_are_enough(tmp_path):
    """What an experiment makes up can be saved, whatever is unknown about it."""
    write_imatrix(tmp_path / "made_up.gguf", Imatrix({"a.weight": np.array([0.5, 3.0])}))
    assert read_imatrix(tmp_path / "made_up.gguf").values["a.weight"].tolist() == [0.5, 3.0]


def test_importance_of_a_tensor():
    imatrix = Imatrix({NAME: np.arange(6.0), "token_embd.weight": np.arange(6.0)}, source="some.gguf")
    assert imatrix.importance(NAME, (9, 6)).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert imatrix.importance(NAME, (2, 9, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]  # older files are flat
    assert imatrix.importance("other.weight", (9, 6)) is None
    assert imatrix.importance("token_embd.weight", (9, 8)) is None  # llama.cpp passes over it too
    with pytest.raises(RealmError, match=r"some\.gguf: .* has 6 values for tensor 'blk.*it must have 8"):
        imatrix.importance(NAME, (9, 8))
    with pytest.raises(RealmError, match="it must have 4 x 6"):
        imatrix.importance(NAME, (4, 9, 6))


GOOD = {NAME + ".in_sum2": np.ones(4, np.float32), NAME + ".counts": np.ones(1, np.float32)}


@pytest.mark.parametrize(
    ("tensors", "keys", "wanted"),
    [
        ({NAME + ".in_sum2": np.array([1, np.nan], np.float32)}, {}, r"value 1 of 'blk.*in_sum2' is nan"),
        ({NAME + ".in_sum2": np.array([1, -2], np.float32)}, {}, r"value 1 of 'blk.*in_sum2' is -2"),
        ({NAME + ".counts": np.array([np.inf], np.float32)}, {}, r"value 0 of 'blk.*counts' is inf"),
        ({NAME + ".counts": np.ones(3, np.float32)}, {}, r"4 values for 3 counts"),
        ({NAME + ".in_sum2": np.ones(4, np.float16)}, {}, r"in_sum2' is F16: .* holds F32"),
        ({NAME + ".counts": None}, {}, r"has no 'blk.*counts'"),
        ({NAME + ".in_sum2": None}, {"general.type": field("model")}, r"GGUF file of type 'model'"),
        ({}, {"imatrix.chunk_count": None}, r"'imatrix.chunk_count' is missing"),
        ({}, {"imatrix.chunk_size": Field(ValueType.INT32, -1)}, r"'imatrix.chunk_size' is '-1'"),
    ],
)
def test_broken_gguf_files(tmp_path, tensors, keys, wanted):
    path = tmp_path / "broken.gguf"
    write_sums(path, {k: a for k, a in (GOOD | tensors).items() if a is not None}, keys)
    with pytest.raises(GGUFError, match=wanted) as caught:
        read_imatrix(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        (b"", "the number of entries needs 4 bytes"),
        (b"just some text\n" * 9, "no importance matrix"),
        (legacy([], count=0), "the number of entries is 0"),
        (legacy([(b"", 1, [1])]), "the length of name 0 is 0"),
        (legacy([(b"a", -1, [1])]), "the number of calls of 'a' is -1"),
        (legacy([(b"a", 1, [])]), "the number of values of 'a' is 0"),
        (legacy([(b"a", 1, [1, np.nan])]), "value 1 of 'a' is nan"),
        (legacy([(b"a", 1, [-1])]), "value 0 of 'a' is -1"),
        (legacy([(b"a", 1, [1])])[:-3], "cut short"),
        (legacy([(b"a", 1, np.ones(9))], chunks=None)[:-3], "cut short"),
    ],
)
def test_broken_older_files(tmp_path, raw, wanted):
    path = tmp_path / "broken.dat"
    path.write_bytes(raw)
    with pytest.raises(GGUFError, match=wanted) as caught:
        read_imatrix(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_every_cut_is_noticed(tmp_path):
    """A legacy file that ends anywhere but after its entries is refused."""
    entries = [(b"a.weight", 1, [1, 2]), (b"b.weight", 1, [3])]
    whole, end = legacy(entries), len(legacy(entries, chunks=None))
    for length in set(range(len(whole))) - {end}:
        (tmp_path / "cut.dat").write_bytes(whole[:length])
        with pytest.raises(GGUFError):
            read_imatrix(tmp_path / "cut.dat")


def test_missing_files(tmp_path):
    with pytest.raises(GGUFError, match=r"none\.gguf: cannot be read: No such file"):
        read_imatrix(tmp_path / "none.gguf")
    with pytest.raises(GGUFError, match="Is a directory"):
        read_imatrix(tmp_path)
