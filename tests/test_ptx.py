"""A GPU kernel's PTX, simulated: right results, and a report of each way to break it; the whole tool where a CUDA
plugin is installed."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

import offline_gpu
import simulate_kernel
from ptx import read_kernel
from ptx_arithmetic import operation
from ptx_machine import simulate
from realm_jax.errors import RealmError
from realm_jax.kernels import pallas

# Two warps copy a tile of A (16, 16) and of B^T (8, 16), float16, and both multiply them; then they do the next tile.
PTX = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry product(
    .param .u64 .ptr .global .align 16 product_param_0,
    .param .u64 .ptr .global .align 16 product_param_1
)
.reqntid 64, 1, 1
{
    .reg .pred %p<3>;
    .reg .b32 %r<24>;
    .reg .b64 %rd<8>;
    ld.param.b64 %rd1, [product_param_0];
    cvta.to.global.u64 %rd2, %rd1;
    ld.param.b64 %rd3, [product_param_1];
    mov.u32 %r1, %tid.x;
    setp.lt.u32 %p1, %r1, 48;
    mul.wide.u32 %rd4, %r1, 16;
    add.s64 %rd5, %rd2, %rd4;
    and.b32 %r2, %r1, 31;
    mov.b32 %r10, 0f00000000; mov.b32 %r11, %r10; mov.b32 %r12, %r10; mov.b32 %r13, %r10;
    mov.b32 %r3, 0;
$L__BB0_1:
    {
        .reg .b32 at, to;
        .shared .align 16 .b8 tile[1024];
        mov.u32 at, tile;
        shl.b32 to, %r1, 4;
        add.u32 to, at, to;
        @%p1 cp.async.cg.shared.global [to], [%rd5], 16;
        cp.async.commit_group;
        cp.async.wait_group 0;
        bar.sync 0;  // here
        and.b32 to, %r2, 15;
        shl.b32 to, to, 5;
        add.u32 %r4, at, to;
        and.b32 to, %r2, 16;
        add.u32 %r4, %r4, to;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r14, %r15, %r16, %r17}, [%r4];
        and.b32 to, %r2, 7;
        shl.b32 to, to, 5;
        add.u32 %r5, at, to;
        and.b32 to, %r2, 8;
        mad.lo.s32 %r5, to, 2, %r5;
        ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r18, %r19}, [%r5+512];
    }
    mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
        {%r10, %r11, %r12, %r13}, {%r14, %r15, %r16, %r17}, {%r18, %r19}, {%r10, %r11, %r12, %r13};
    bar.sync 0;  // there
    add.s64 %rd5, %rd5, 768;
    add.s32 %r3, %r3, 1;
    setp.ne.b32 %p2, %r3, 2;
    @%p2 bra $L__BB0_1;
    shr.u32 %r6, %r1, 5;
    shl.b32 %r6, %r6, 9;
    shl.b32 %r7, %r2, 3;
    add.s32 %r6, %r6, %r7;
    cvt.u64.u32 %rd6, %r6;
    add.s64 %rd7, %rd3, %rd6;
    st.global.v2.b32 [%rd7], {%r10, %r11};
    st.global.v2.b32 [%rd7+256], {%r12, %r13};
    ret;
}
"""
RACE = "with no barrier between"
MUTATIONS = {  # what of the text becomes what, and what is said of it
    "no barrier before a read": ("bar.sync 0;  // here", "", f"race: reads what another thread writes, {RACE}"),
    "no barrier after a read": ("bar.sync 0;  // there", "", f"race: copies over what warp 1 reads, {RACE}"),
    "a warp is no program": ("bar.sync 0;  // here", "bar.warp.sync 0xffffffff;", RACE),
    "a copy is not waited for": ("wait_group 0", "wait_group 1", "race: reads what is still on its way"),
    "a copy past the end": ("[%rd5], 16", "[%rd5+16], 16", "address: bytes 1536 to 1552 of product_param_0"),
    "an address of 4 bytes": ("[%rd7+256]", "[%rd7+260]", "address: thread 0: an address that is not a multiple of 8"),
    "too far": ("[%r5+512]", "[%r5+768]", "unwritten: reads what was never written"),
    "no barrier for a result": (
        "ret;",
        "ld.global.b32 %r20, [%rd3+512]; ret;",
        f"race: reads what another thread writes, {RACE}",
    ),
    "beyond the tile": ("[%r5+512]", "[%r5+1024]", "of shared memory, which has 1024"),
}


def run_product(text: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """What both warps find (2, 16, 8), what is right (16, 8), and what is wrong."""
    tiles = np.random.default_rng(0).standard_normal((2, 24, 16)).astype(np.float16)
    found = np.zeros((2, 16, 8), np.float32)
    kernel = read_kernel(text)
    faults = simulate(kernel, [tiles.reshape(-1).view(np.uint8), found.reshape(-1).view(np.uint8)], (1,))
    right = sum(tile[:16].astype(np.float64) @ tile[16:].astype(np.float64).T for tile in tiles)
    return found, right, [f"{fault.kind}: {fault.what}" for fault in faults]


def test_a_product_of_two_warps():
    found, right, faults = run_product(PTX)
    np.testing.assert_allclose(found, np.stack([right, right]), rtol=1e-5, atol=1e-6)
    assert faults == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_way_to_break_it_is_reported(name):
    before, after, said = MUTATIONS[name]
    assert PTX.count(before) == 1
    _, _, faults = run_product(PTX.replace(before, after))
    assert any(said in fault for fault in faults), faults


def test_a_fault_names_both_instructions():
    kernel = read_kernel(PTX.replace("wait_group 0", "wait_group 1"))
    (fault, example), *_ = simulate(kernel, [np.zeros(1536, np.uint8), np.zeros(1024, np.uint8)], (1,)).items()
    assert str(kernel.body[fault.at]).startswith("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r14, %r15, %r16, %r17}")
    assert str(kernel.body[fault.other]) == "@%p1 cp.async.cg.shared.global [to@1], [%rd5], 16"
    assert PTX.splitlines()[kernel.body[fault.other].line - 1].strip().startswith("@%p1 cp.async.cg")
    assert example == "program (0, 0, 0), thread 0, byte 0 of shared memory"


def test_what_is_not_simulated_is_an_error_in_one_line():
    for before, after, said in [
        ("mul.wide.u32", "mul24.lo.u32", r"line 19: mul24.lo.u32 %rd4, %r1, 16: mul24.lo.u32 is not simulated$"),
        ("@%p2 bra", "@%p1 bra", r"@%p1 bra \$L__BB0_1@0: threads part ways, which is not simulated$"),
        (".shared .align", ".shared .b8", r"\.shared \.b8 16 \.b8 tile\[1024\]: not understood$"),
    ]:
        with pytest.raises(RealmError, match=said):
            run_product(PTX.replace(before, after))


# Four warps multiply A (64, 16) by B, given as B^T (8, 16), float16, twice.
GROUPED = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry product(
    .param .u64 .ptr .global .align 16 product_param_0,
    .param .u64 .ptr .global .align 16 product_param_1,
    .param .u64 .ptr .global .align 16 product_param_2
)
.reqntid 128, 1, 1
{
    .reg .pred %p<3>;
    .reg .b32 %r<24>;
    .reg .b64 %rd<16>;
    ld.param.b64 %rd1, [product_param_0];
    ld.param.b64 %rd2, [product_param_1];
    ld.param.b64 %rd3, [product_param_2];
    mov.u32 %r1, %tid.x;
    shr.u32 %r2, %r1, 5;
    and.b32 %r3, %r1, 31;
    shr.u32 %r4, %r3, 2;
    and.b32 %r5, %r3, 3;
    mad.lo.s32 %r6, %r2, 16, %r4;
    shl.b32 %r7, %r6, 5;
    mad.lo.s32 %r7, %r5, 4, %r7;
    cvt.u64.u32 %rd4, %r7;
    add.s64 %rd4, %rd1, %rd4;
    ld.global.b32 %r10, [%rd4];
    ld.global.b32 %r11, [%rd4+256];
    ld.global.b32 %r12, [%rd4+16];
    ld.global.b32 %r13, [%rd4+272];
    setp.lt.u32 %p1, %r1, 16;
    mul.wide.u32 %rd5, %r1, 16;
    add.s64 %rd5, %rd2, %rd5;
    {
        .reg .b32 at, to;
        .shared .align 16 .b8 matrix[256];
        mov.u32 at, matrix;
        and.b32 to, %r1, 1;
        shl.b32 to, to, 7;
        add.u32 at, at, to;
        shr.u32 to, %r1, 1;
        shl.b32 to, to, 4;
        add.u32 to, at, to;
        @%p1 cp.async.cg.shared.global [to], [%rd5], 16;
        cp.async.commit_group;
        cp.async.wait_group 0;
        bar.sync 0;
        mov.u32 at, matrix;
        shr.u32 at, at, 4;
        cvt.u64.u32 %rd6, at;
        add.s64 %rd6, %rd6, 524288;  // matrices of eight inputs: 128 bytes apart
    }
    setp.ne.b32 %p2, %r1, %r1;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
        {%r14, %r15, %r16, %r17}, {%r10, %r11, %r12, %r13}, %rd6, %p2, 1, 1, 0;
    setp.eq.b32 %p2, %r1, %r1;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
        {%r14, %r15, %r16, %r17}, {%r10, %r11, %r12, %r13}, %rd6, %p2, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    shl.b32 %r8, %r6, 5;
    mad.lo.s32 %r8, %r5, 8, %r8;
    cvt.u64.u32 %rd7, %r8;
    add.s64 %rd7, %rd3, %rd7;
    st.global.v2.b32 [%rd7], {%r14, %r15};
    st.global.v2.b32 [%rd7+256], {%r16, %r17};
    ret;
}
"""


def run_grouped(text: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """What four warps find (64, 8), what is right, and what is wrong."""
    a, b = (np.random.default_rng(i).standard_normal((rows, 16)).astype(np.float16) for i, rows in enumerate((64, 8)))
    found = np.zeros((64, 8), np.float32)
    buffers = [x.reshape(-1).view(np.uint8) for x in (a, b, found)]
    faults = simulate(read_kernel(text), buffers, (1,))
    return (
        found,
        2 * (a.astype(np.float64) @ b.astype(np.float64).T),
        [f"{fault.kind}: {fault.what}" for fault in faults],
    )


def test_a_product_of_four_warps_together():
    found, right, faults = run_grouped(GROUPED)
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5)
    assert faults == []


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("        bar.sync 0;", "", f"race: reads what another thread writes, {RACE}"),
        ("cp.async.wait_group 0", "cp.async.wait_group 1", "race: reads what is still on its way"),
        ("524288", "1048576", "of shared memory, which has 256"),
    ],
)
def test_a_matrix_that_four_warps_read_must_be_there(before, after, said):
    assert GROUPED.count(before) == 1
    _, _, faults = run_grouped(GROUPED.replace(before, after))
    assert any(said in fault for fault in faults), faults


def test_results_of_four_warps_are_there_once_they_are_waited_for():
    with pytest.raises(RealmError, match="%r14 has no value"):
        run_grouped(GROUPED.replace("wgmma.wait_group.sync.aligned 0", "wgmma.wait_group.sync.aligned 1"))
    with pytest.raises(RealmError, match="this descriptor of a matrix is not simulated"):  # swizzled
        run_grouped(GROUPED.replace("524288", "4611686018427912192"))


def test_arithmetic():
    a, b = np.array([0x12345678, 0xFFFFFF80], np.uint32), np.array([0x9ABCDEF0, 3], np.uint32)
    halves = np.array([[1.5, -2.0], [0.1, np.inf]], np.float16)

    def one(opcode: str, *values: object) -> list:
        return operation(opcode).compute(*(np.broadcast_to(value, (2,)) for value in values)).tolist()

    word = np.uint32
    assert one("prmt.b32", a, b, word(0x7041)) == [0x9A78F056, 0x008003FF]
    assert one("prmt.b32", a, b, word(0x8888)) == [0, 0xFFFFFFFF]
    assert one("lop3.b32", a, b, word(0xFF), word(0xEA)) == [0x12345678 & 0x9ABCDEF0 | 0xFF, 0xFF]  # a & b | c
    assert one("bfe.s32", a.view(np.int32), word(4), word(4)) == [7, -8]
    assert one("bfi.b32", a, b, word(8), word(8)) == [0x9ABC78F0, 0x8003]
    assert one("shf.l.wrap.b32", a, b, word(36)) == [0xABCDEF01, 0x3F]
    assert one("shr.s32", a.view(np.int32), word(40)) == [0, -1] and one("shl.b32", a, word(32)) == [0, 0]
    assert one("mul.hi.u32", a, b) == [0x12345678 * 0x9ABCDEF0 >> 32, 2]
    assert one("setp.lt.and.s32", a.view(np.int32), b.view(np.int32), np.array([True, False])) == [False, False]
    assert one("setp.ltu.f32", np.array([1, np.nan], np.float32), np.float32(0)) == [False, True]
    assert one("cvt.rzi.s32.f32", np.array([-1.7, np.nan], np.float32)) == [-1, 0]
    assert operation("cvt.rn.f16x2.f32").compute(*np.float32([[1, 2], [3, 4]])).tolist() == [[3, 1], [4, 2]]
    assert operation("fma.rn.f16x2").compute(halves, halves, halves).tolist()[0] == [3.75, 2.0]
    subnormal, factors = np.array([[31, 15 << 4], [1, 0]], np.uint16), np.array([[63, 63 / 16], [1, 63]], np.float16)
    product = operation("mul.rn.f16x2").compute(subnormal.view(np.float16), factors)
    assert product.view(np.uint16).tolist() == [[31 * 63, 15 * 63], [1, 0]]


def test_without_a_plugin_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(offline_gpu.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(simulate_kernel.command, ["matmul", "--out", str(tmp_path)])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and "pip install --no-deps" in result.stderr


def test_kernels_of_a_traced_function_are_simulated_and_the_rest_is_computed(monkeypatch, tmp_path):
    simulator = simulate_kernel.Simulator(offline_gpu.TARGETS["h200"], tmp_path)
    monkeypatch.setattr(simulator, "_compile", lambda equation, operands: (read_kernel(PTX), 0))
    tiles = jnp.asarray(np.random.default_rng(0).standard_normal((2, 24, 16)), jnp.float16)

    def body(tiles_ref, y_ref):  # what the PTX is instead of
        pallas.store(y_ref.at[0, 0, 0], 0.0)

    @jax.jit
    def product(x):
        return pallas.call(body, [-x], pallas.Shape((2, 16, 8), jnp.float32), grid=(1,), name="product").sum(0) + 1

    (found,) = simulator.evaluate(jax.make_jaxpr(product)(tiles), [tiles])
    right = sum(np.float64(tile[:16]) @ np.float64(tile[16:]).T for tile in tiles)
    np.testing.assert_allclose(found, 2 * right + 1, rtol=1e-5, atol=1e-5)
    assert [(run.kernel.name, run.grid, run.faults) for run in simulator.runs] == [("product", (1,), {})]


@pytest.mark.slow
@pytest.mark.usefixtures("cuda_plugin")
def test_a_product_compiled_for_a_gpu_that_is_not_there(tmp_path):
    sizes = ["--rows", "12", "--outputs", "40", "--inputs", "512", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, simulate_kernel.__file__, "matmul", *sizes]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": no faults") == 2
    assert float(done.stdout.split("interpreter:")[1]) < 1e-12
