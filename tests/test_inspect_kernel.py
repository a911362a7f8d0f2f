"""Reading machine code and launches from what the compilers wrote; the whole tool where a CUDA plugin is installed."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

import inspect_kernel
import offline_gpu
from inspect_cases import find_case, matmul, read_options
from machine_code import Launch, Resources, clocks, read_launches, read_ptxas, read_sass, short_name
from realm_jax.errors import RealmError

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'attend' for 'sm_90a'
ptxas info    : Function properties for attend
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 66 registers, used 1 barriers, 1536 bytes smem
ptxas info    : Compiling entry function 'copy' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""
SASS = """
\t.section\t.text.attend,"ax",@progbits
attend:
.text.attend:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;
        /*0020*/              @!P0 LDG.E.U8 R4, desc[UR4][R2.64+0x10] ;
.L_x_1:
        /*0030*/                   FFMA R4, R8, R9, R4 ;
        /*0040*/                   IMAD.WIDE.U32 R2, R13, R0, R6 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   NOP;
        /*0070*/               @P0 BRA `(.L_x_0) ;
        /*0080*/              @!P1 BRA `(.L_x_2) ;
        /*0090*/                   I2F.U8 R6, R2 ;
.L_x_2:
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3);
        /*00c0*/                   NOP;
.text.copy:
        /*0000*/                   EXIT ;
"""
THUNKS = """\
001: kCustomKernel  [source       | next=003 (2)] wrapped_transpose grid: [256, 1, 1] threads: [128, 1, 1]  shared_memory: 0 bytes
003: kWhile         [prev=002 (1) | next=000 (1)]
condition:
    004: kCustomKernel [source | sink] loop_and_fusion grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
  body:
    000: kCommandBuffer [source | sink]
        005: kCustomKernel [source        | next=006 (1)] attend_2 grid: [8, 16, 1] threads: [64, 1, 1]  shared_memory: 1536 bytes
        010: kCopy         [source        | next=011 (1)] kCopy
    011: kWhile         [prev=002 (1) | next=000 (1)]
    condition:
        012: kCustomKernel [source | sink] less grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
      body:
        013: kKernel [source | sink] attend_3 grid: [8, 1, 1] threads: [64, 1, 1]  shared_memory: 0 bytes
    014: kKernel [source | sink] matmul_Q4_0__12 grid: [8, 1, 1] threads: [64, 1, 1]  shared_memory: 0 bytes
000: kCommandBuffer [prev=003 (1) | sink        ]
    079: kCustomKernel [source       | sink        ] last grid: [2, 2, 1] threads: [128, 1, 1]  shared_memory: 0 bytes
"""  # noqa: E501


def test_registers_spills_and_shared_memory():
    assert read_ptxas(PTXAS) == {"attend": Resources(66, 28, 1536), "copy": Resources(8, 0, 0)}


def test_instructions_are_counted_by_the_turns_of_their_loops():
    code = read_sass(SASS)
    assert (set(code) == {"attend", "copy"} and code["copy"].body == [("EXIT", "")]) or code["copy"].body[0][
        0
    ] == "EXIT"
    attend = code["attend"]
    assert attend.loops == [(1, 7), (3, 5)]
    once, often = attend.histogram(), attend.histogram((10, 4))
    assert once == {"LDC": 1, "LDG.E.128.CONSTANT": 1, "LDG.E.U8": 1, "FFMA": 1, "IMAD.WIDE.U32": 1, "BRA": 3,
                    "I2F.U8": 1, "EXIT": 1}  # fmt: skip
    assert often["FFMA"] == 40 and often["LDG.E.U8"] == 10 and often["I2F.U8"] == 1
    assert [short_name(name) for name in ("LDG.E.128.CONSTANT", "LDG.E.U8", "LDG.E", "I2FP.F32.U32")] == [
        "LDG.128", "LDG.8", "LDG.32", "I2F",
    ]  # fmt: skip
    assert clocks(once, float_clocks=2) == {"issue": 10, "alu": 0, "imad": 2, "float": 2, "convert": 8}


def test_launches_know_their_loop_and_their_graph():
    kernel = "kCustomKernel"
    assert read_launches(THUNKS) == [
        Launch(kernel, "wrapped_transpose", 256, 128, 0, False, None, 0, ""),
        Launch(kernel, "loop_and_fusion", 1, 1, 0, False, 0, 1, "condition"),
        Launch(kernel, "attend_2", 128, 64, 1536, True, 0, 1, "body"),
        Launch("kCopy", "kCopy", 0, 0, 0, True, 0, 1, "body"),
        Launch(kernel, "less", 1, 1, 0, False, 0, 2, "body"),
        Launch("kKernel", "attend_3", 8, 64, 0, False, 0, 2, "body"),
        Launch("kKernel", "matmul_Q4_0__12", 8, 64, 0, False, 0, 1, "body"),
        Launch(kernel, "last", 4, 128, 0, True, None, 0, ""),
    ]
    found = inspect_kernel.summarize_launches(read_launches(THUNKS))
    assert found == {
        "outside": 2, "outside_in_graph": 1,
        "loops": [{
            "launches": 6, "in_graph": 2, "in_inner_loops": 2,
            "by_name": {"attend": 2, "loop_and_fusion": 1, "kCopy": 1, "less": 1, "matmul_Q4_0": 1},
        }],
    }  # fmt: skip


def test_cases_and_their_options():
    assert find_case("matmul") is matmul
    assert read_options(matmul, ["--rows", "8", "--format", "Q8_0"]) == {"rows": 8, "format": "Q8_0"}
    with pytest.raises(RealmError, match="case 'step9' is not known; take step, matmul, attention, or module:function"):
        find_case("step9")
    with pytest.raises(RealmError, match="case 'no_such_module:f': No module named"):
        find_case("no_such_module:f")
    for words in (["--row", "8"], ["--rows"], ["rows", "8"]):
        with pytest.raises(RealmError, match=r"want --name value .* --format, --outputs, --inputs, --rows, --impl"):
            read_options(matmul, words)


def test_a_product_says_what_it_reads_and_how_often_its_loop_runs():
    _, (x, w), facts = matmul("Q4_K", outputs=256, inputs=4096, rows=2)
    assert x.shape == (2, 4096) and w.shape == (256, 4096)
    assert facts["weights"] == 256 * 4096 and facts["bytes"] == 256 * 16 * 148  # 4 bytes of scales more than in a file
    assert facts["trips"]()[0] >= 1
    assert "trips" not in matmul("Q4_K", outputs=256, inputs=4096, impl="reference")[2]


def test_without_a_plugin_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(offline_gpu.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(inspect_kernel.command, ["matmul", "--out", str(tmp_path)])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "JAX's CUDA plugin is not installed here" in result.stderr and "pip install --no-deps" in result.stderr


def test_a_folder_of_other_files_is_not_emptied(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RealmError, match="holds files that this tool did not write"):
        offline_gpu.prepare(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("cuda_plugin")
def test_a_decoding_step_compiled_for_a_gpu_that_is_not_there(tmp_path):
    command = [sys.executable, inspect_kernel.__file__, "step", "--layers", "1", "--only", "^attend", "--json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["launches"]["loops"][0]["in_graph"] > 10
    assert all(kernel["registers"] > 0 and not kernel["spilled_bytes"] for kernel in found["kernels"])
