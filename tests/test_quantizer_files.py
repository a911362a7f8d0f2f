"""Whole files quantized: the same bytes as tensor by tensor, and everything around them."""

import os
import subprocess
import sys

import numpy as np
import pytest

from realm_jax.errors import RealmError
from realm_jax.gguf.reader import open_gguf
from realm_jax.gguf.types import Field, ValueType, field
from realm_jax.gguf.writer import write_gguf
from realm_jax.quant import dequantize, quantize, raw_bytes
from realm_jax.quantizer import stream
from realm_jax.quantizer.files import quantize_file
from realm_jax.quantizer.imatrix import Imatrix

FIELDS = {
    "general.architecture": field("llama"),
    "general.file_type": field(1),
    "llama.block_count": field(1),
    "llama.attention.head_count": field(4),
    "llama.expert_count": field(3),
    "general.quantization_version": field(2),
}
SHAPES = {
    "token_embd.weight": (6, 256),
    "output_norm.weight": (256,),
    "blk.0.attn_q.weight": (20, 256),
    "blk.0.ffn_gate_inp.weight": (3, 256),
    "blk.0.ffn_down_exps.weight": (3, 7, 512),
    "rope_freqs.weight": (16,),
}


def floats(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def write(path, weights, formats=None, fields=FIELDS, raw=()):
    """A file of these weights, each in its format (F32); raw: further tensors (name, format, shape, bytes)."""
    tensors = []
    for name, w in weights.items():
        kind, data = raw_bytes(quantize(w, (formats or {}).get(name, "F32")))
        tensors.append((name, kind, w.shape, lambda data=data: data))
    tensors += [(name, kind, shape, lambda data=data: data) for name, kind, shape, data in raw]
    write_gguf(path, fields, tensors)
    return path


def read(path) -> dict[str, tuple[str, np.ndarray]]:
    with open_gguf(path) as file:
        return {name: (info.format, np.array(file.raw(name))) for name, info in file.tensors.items()}


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "in.gguf", floats())


@pytest.fixture
def small_stripes(monkeypatch):
    monkeypatch.setattr(stream, "STRIPE_WEIGHTS", 3 * 512)
    monkeypatch.setattr(stream, "STRIPE_BYTES", 1000)


@pytest.mark.parametrize("format", ["Q4_K", "Q8_0", "F16"])
def test_a_file_holds_what_each_tensor_becomes_alone(tmp_path, source, small_stripes, format):
    report = quantize_file(source, tmp_path / "out.gguf", format)
    ours = read(tmp_path / "out.gguf")
    assert list(ours) == list(SHAPES)
    for name, w in floats().items():
        stays = name in ("output_norm.weight", "blk.0.ffn_gate_inp.weight", "rope_freqs.weight")
        kind, data = raw_bytes(quantize(w, "F32" if stays else format))
        assert ours[name][0] == kind
        np.testing.assert_array_equal(ours[name][1], data, err_msg=name)
    assert [t.after for t in report.tensors] == [kind for kind, _ in ours.values()]
    assert [t.bytes_after for t in report.tensors] == [data.nbytes for _, data in ours.values()]


@pytest.mark.parametrize("before", ["F16", "BF16", "Q8_0", "Q6_K"])
def test_from_other_formats(tmp_path, small_stripes, before):
    """The weights of a packed tensor are what it dequantizes to."""
    source = write(tmp_path / "in.gguf", floats(), dict.fromkeys(["blk.0.ffn_down_exps.weight"], before))
    report = quantize_file(source, tmp_path / "out.gguf", "Q4_0", keep=[("blk.*", "Q5_0")])
    kind, data = read(source)["blk.0.ffn_down_exps.weight"]
    w = dequantize(data, kind, SHAPES["blk.0.ffn_down_exps.weight"])
    ours = read(tmp_path / "out.gguf")["blk.0.ffn_down_exps.weight"]
    assert ours[0] == "Q5_0"
    np.testing.assert_array_equal(ours[1], quantize(w, "Q5_0").to_bytes())
    assert [w for w in report.warnings if "quantized already" in w] == (
        [] if before in ("F16", "BF16") else [f"1 of 6 tensors are quantized already (1 {before}): quantizing them "
                                              "again loses more than quantizing the original model"]
    )  # fmt: skip


def test_errors_are_those_of_the_weights(tmp_path, source, small_stripes):
    seen = []
    report = quantize_file(
        source, tmp_path / "out.gguf", "Q4_0", pure=True, on_tensor=lambda t, total: seen.append((t, total))
    )
    assert seen == [(tensor, len(SHAPES)) for tensor in report.tensors]
    squares = np.zeros(2)
    for tensor in report.tensors:
        if tensor.errors is None:
            assert tensor.before == tensor.after == "F32"
            continue
        w = floats()[tensor.name].astype(np.float64)
        error = np.asarray(quantize(w, "Q4_0").dequantize(), np.float64) - w
        squares += (error**2).sum(), (w**2).sum()
        assert tensor.errors.relative == pytest.approx((error**2).mean() / (w**2).mean(), rel=1e-5)
        assert tensor.errors.relative_weighted is None
        assert tensor.bits_per_weight == 4.5
    assert report.totals.relative_error == pytest.approx(squares[0] / squares[1], rel=1e-5)
    assert report.totals.weighted_error is None
    assert report.by_format()["F32"].relative_error is None
    assert report.totals.bytes_after == sum(data.nbytes for _, data in read(tmp_path / "out.gguf").values())


def test_importance_by_matrix(tmp_path, source, small_stripes):
    """Each expert is encoded with its own row; a tensor without an entry without."""
    name, rng = "blk.0.ffn_down_exps.weight", np.random.default_rng(1)
    importance = rng.uniform(0, 4, (3, 512)).astype(np.float32) ** 4
    imatrix = Imatrix(
        {name: importance, "blk.7.attn_q.weight": np.ones(256)}, chunks=9, datasets=("a.txt",), source="i"
    )
    report = quantize_file(source, tmp_path / "out.gguf", "Q4_0", pure=True, imatrix=imatrix)
    ours, w, plain = read(tmp_path / "out.gguf"), floats(), quantize(floats()[name], "Q4_0").to_bytes()
    wanted = [quantize(w[name][i], "Q4_0", importance=importance[i]).to_bytes() for i in range(3)]
    np.testing.assert_array_equal(ours[name][1], np.stack(wanted))
    assert (ours[name][1] != plain).any()
    np.testing.assert_array_equal(ours["blk.0.attn_q.weight"][1], quantize(w["blk.0.attn_q.weight"], "Q4_0").to_bytes())
    error = np.asarray(dequantize(ours[name][1], "Q4_0", w[name].shape), np.float64) - w[name]
    weighted = (error**2 * importance[:, None]).sum() / (w[name].astype(np.float64) ** 2 * importance[:, None]).sum()
    tensor = next(t for t in report.tensors if t.name == name)
    assert tensor.errors.relative_weighted == pytest.approx(weighted, rel=1e-5)
    assert report.totals.weighted_error == pytest.approx(weighted, rel=1e-5)
    assert report.warnings == (
        "2 tensors have no entry in the importance matrix: token_embd.weight, blk.0.attn_q.weight",
        "1 entries of the importance matrix are for no tensor: blk.7.attn_q.weight",
    )
    with open_gguf(tmp_path / "out.gguf") as file:
        assert {k: f.value for k, f in file.fields.items() if k.startswith("quantize.")} == {
            "quantize.imatrix.file": "i",
            "quantize.imatrix.dataset": "a.txt",
            "quantize.imatrix.entries_count": 2,
            "quantize.imatrix.chunks_count": 9,
        }


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"blk.0.attn_q.weight": np.ones(255)}, r"255 values for tensor 'blk\.0\.attn_q\.weight' .* must have 256"),
        ({"blk.0.ffn_down_exps.weight": np.ones(512)}, r"has 512 values .* it must have 3 x 512"),
        (
            {"other.weight": np.ones(256)},
            r"none of the 1 entries of the importance matrix is for a tensor of .*in\.gguf",
        ),
    ],
)
def test_importance_of_another_model(tmp_path, source, values, wanted):
    with pytest.raises(RealmError, match=wanted):
        quantize_file(source, tmp_path / "out.gguf", "Q4_0", imatrix=Imatrix(values))
    assert os.listdir(tmp_path) == ["in.gguf"]


def test_a_copy_is_the_same_file(tmp_path, small_stripes):
    """Whatever is in it: formats that nothing here can read, and bytes that mean nothing."""
    odd = [
        ("blk.0.odd.weight", "Q1_0", (8, 256), np.random.default_rng(0).integers(0, 256, (8, 36), np.uint8)),
        ("blk.0.ids", "I32", (3,), np.arange(12, dtype=np.uint8)),
    ]
    source = write(tmp_path / "in.gguf", floats(), {"blk.0.attn_q.weight": "Q3_K"}, raw=odd)
    report = quantize_file(source, tmp_path / "out.gguf", "COPY")
    assert (tmp_path / "out.gguf").read_bytes() == source.read_bytes()
    assert report.warnings == ()
    quantize_file(source, tmp_path / "out.gguf", "Q8_0", keep=[("*.odd.weight", "COPY")])
    ours = read(tmp_path / "out.gguf")
    assert [ours[name][0] for name, *_ in odd] == ["Q1_0", "I32"]
    np.testing.assert_array_equal(ours["blk.0.odd.weight"][1], odd[0][3])
    with pytest.raises(RealmError, match=r"tensor 'blk\.0\.odd\.weight' cannot become Q8_0 from Q1_0: .*COPY leaves"):
        quantize_file(source, tmp_path / "other.gguf", "Q8_0")
    assert not (tmp_path / "other.gguf").exists()


@pytest.mark.parametrize(
    ("format", "file_type"), [("Q2_K", 10), ("Q4_K", 15), ("Q6_K", 18), ("COPY", 1), ("Q8_K", None)]
)
def test_metadata_is_kept_but_for_what_llama_quantize_sets(tmp_path, format, file_type):
    fields = {k: f for k, f in FIELDS.items() if k != "general.quantization_version"}
    fields |= {"split.count": Field(ValueType.UINT16, 1), "odd.empty": Field(ValueType.ARRAY, [], ValueType.STRING)}
    source = write(tmp_path / "in.gguf", floats(), fields=fields)
    quantize_file(source, tmp_path / "out.gguf", format, keep=[("*", "F16")])  # whatever is in it
    with open_gguf(tmp_path / "out.gguf") as file:
        ours = {key: (f.type, f.value) for key, f in file.fields.items()}
    wanted = {key: (f.type, f.value) for key, f in fields.items() if key != "split.count"}
    wanted["general.quantization_version"] = (ValueType.UINT32, 2)
    wanted["general.file_type"] = (ValueType.UINT32, file_type)
    if file_type is None:
        del wanted["general.file_type"]
    assert ours == wanted


def split(tmp_path) -> list:
    """The weights in two files, as llama-gguf-split makes them."""
    weights, paths = floats(), []
    for number, names in enumerate((list(SHAPES)[:2], list(SHAPES)[2:])):
        keys = {"split.no": number, "split.count": 2}
        fields = (FIELDS if number == 0 else {}) | {k: Field(ValueType.UINT16, v) for k, v in keys.items()}
        fields |= {"split.tensors.count": Field(ValueType.INT32, len(SHAPES))}
        path = tmp_path / f"in-{number + 1:05d}-of-00002.gguf"
        paths.append(write(path, {name: weights[name] for name in names}, fields=fields))
    return paths


def test_a_split_model_becomes_one_file(tmp_path, source):
    paths = split(tmp_path)
    quantize_file(source, tmp_path / "whole.gguf", "Q5_1")
    quantize_file(paths[0], tmp_path / "joined.gguf", "Q5_1")
    assert (tmp_path / "joined.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_a_file_is_never_written_over_itself(tmp_path, source):
    paths = split(tmp_path)
    os.link(source, tmp_path / "hard.gguf")
    os.symlink(source, tmp_path / "soft.gguf")
    for start, target in ((source, source), (source, tmp_path / "hard.gguf"), (tmp_path / "soft.gguf", source),
                          (source, tmp_path / "soft.gguf"), (paths[0], paths[1])):  # fmt: skip
        before = target.read_bytes()
        with pytest.raises(RealmError, match=f"{target.name}: is the file to be quantized: give the new file another"):
            quantize_file(start, target, "Q8_0")
        assert target.read_bytes() == before


def test_weights_that_are_not_finite(tmp_path, small_stripes):
    weights = floats()
    weights["blk.0.ffn_down_exps.weight"][2, 5, 100] = np.nan
    tensors = [(n, "F32", w.shape, lambda w=w: w.view(np.uint8)) for n, w in weights.items()]
    write_gguf(tmp_path / "in.gguf", FIELDS, tensors)
    (tmp_path / "out.gguf").write_bytes(b"old")
    at = (2 * 7 + 5) * 512 + 100
    for format in ("Q4_0", "COPY"):
        with pytest.raises(
            RealmError, match=rf"in\.gguf: tensor 'blk\.0\.ffn_down_exps.*value {at:,} is NaN"
        ) as caught:
            quantize_file(tmp_path / "in.gguf", tmp_path / "out.gguf", format)
        assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["in.gguf", "out.gguf"]
    assert (tmp_path / "out.gguf").read_bytes() == b"old"


def test_scales_that_are_not_finite(tmp_path, small_stripes):
    raw = quantize(floats()["blk.0.attn_q.weight"], "Q8_0").to_bytes().copy()
    raw[13, 34 * 3 : 34 * 3 + 2] = 0xFF
    source = write(tmp_path / "in.gguf", {}, raw=[("blk.0.attn_q.weight", "Q8_0", (20, 256), raw)])
    for format in ("Q4_0", "Q8_0"):
        with pytest.raises(RealmError, match=rf"tensor 'blk\.0\.attn_q\.weight' \(Q8_0\) .* block {13 * 8 + 3} holds"):
            quantize_file(source, tmp_path / "out.gguf", format, pure=True)


def test_weights_that_a_format_cannot_hold(tmp_path):
    weights = floats()
    weights["blk.0.attn_q.weight"][3, 3] = 1e6
    source = write(tmp_path / "in.gguf", weights)
    with pytest.raises(
        RealmError, match=r"in\.gguf: tensor 'blk\.0\.attn_q\.weight': cannot quantize to F16: .*too lar"
    ):
        quantize_file(source, tmp_path / "out.gguf", "F16")
    assert os.listdir(tmp_path) == ["in.gguf"]


def test_what_a_person_should_know_is_told_before_the_work(tmp_path):
    shapes = SHAPES | {"blk.0.attn_v.weight": (4, 288)}
    weights = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    source = write(tmp_path / "in.gguf", weights)
    told: list[str] = []
    report = quantize_file(
        source,
        tmp_path / "out.gguf",
        "Q2_K_S",
        on_warning=told.append,
        on_tensor=lambda *_: told.append("tensor") if "tensor" not in told else None,
    )
    assert told == [*report.warnings, "tensor"]
    assert report.warnings == (
        "1 tensors have rows that are not whole blocks: 1 Q4_0 for Q2_K",
        "2 tensors get so few bits that llama-quantize would demand an importance matrix for them: "
        "blk.0.attn_q.weight, blk.0.ffn_down_exps.weight",
    )


def test_no_more_than_a_stripe_in_float32(tmp_path):
    """Two tensors of 64 million weights: one of them takes 256 MiB in float32, and 128 MiB as it stands in the file."""
    rows, width = 16384, 4096
    nbytes = 2 * rows * width
    zeros = np.broadcast_to(np.uint8(0), (nbytes,))
    small = [("blk.0.attn_q.weight", "F16", (1024, width), lambda: np.zeros(2 * 1024 * width, np.uint8))]
    large = [(f"blk.0.{name}.weight", "F16", (rows, width), lambda: zeros) for name in ("ffn_up", "ffn_gate")]
    write_gguf(tmp_path / "small.gguf", FIELDS, small)
    write_gguf(tmp_path / "large.gguf", FIELDS, large)
    # glibc keeps what is freed, on a busy machine more; with a fixed threshold every array that goes is given back.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "small.gguf", tmp_path / "large.gguf", tmp_path / "out.gguf"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    assert grown < 96 * 2**20, f"{grown / 2**20:.0f} MiB"


PEAK = """
import sys, threading, time
from realm_jax.quantizer.files import quantize_file

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

small, large, out = sys.argv[1:]
quantize_file(small, out, "Q8_0")  # everything is compiled before memory is looked at

before = resident()
peaks, over = [], threading.Event()

def watch():
    while not over.is_set():
        peaks.append(resident())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
quantize_file(large, out, "Q8_0")
over.set()
thread.join()
print(max(peaks) - before)
"""
