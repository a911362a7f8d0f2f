"""What compilers say of a GPU kernel, read from their text: ptxas, nvdisasm, and XLA's list of launches.

Called by `inspect_kernel`, which has the compilers write it. Nothing here needs JAX or a GPU.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

# fmt: off
ALU = frozenset((
    "LOP3", "LOP", "SHF", "PRMT", "IADD3", "IADD", "VIADD", "LEA", "ISETP", "FSETP", "HSETP2", "SEL", "FSEL", "IMNMX",
    "VIMNMX", "FMNMX", "HMNMX2", "PLOP3", "SGXT", "BMSK", "I2FP", "P2R", "R2P", "IABS", "VIADDMNMX",
))
# fmt: on
MULTIPLY = frozenset(("IMAD", "IDP"))
FLOAT = frozenset(("FFMA", "FADD", "FMUL"))
CONVERT = frozenset(("MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO"))
CONTAINERS = frozenset(("kCommandBuffer", "kWhile", "kConditional", "kSequential"))


class Resources(NamedTuple):
    """What ptxas gave a kernel: registers a thread, bytes spilled (stores and loads), bytes of static shared memory."""

    registers: int
    spilled: int
    shared: int


class Code(NamedTuple):
    """A disassembled kernel: (instruction, operands) in order, and where its labels stand."""

    body: list[tuple[str, str]]
    labels: dict[str, int]

    @property
    def loops(self) -> list[tuple[int, int]]:
        """First and last instruction of each loop, that is of what a backward branch repeats, in code order."""
        found = {}
        for i, (name, operands) in enumerate(self.body):
            label = re.search(r"(\.L_\w+)", operands)
            if name.startswith("BRA") and label and self.labels.get(label[1], i + 1) <= i:
                found[self.labels[label[1]]] = i
        return sorted(found.items())

    def histogram(self, trips: Sequence[int] = ()) -> Counter:
        """Instruction -> how often a thread runs it; loop i runs `trips[i]` times, once where that is not said."""
        counts, loops = Counter(), self.loops
        for i, (name, _) in enumerate(self.body):
            if name != "NOP":
                counts[name] += math.prod(
                    times for (first, last), times in zip(loops, trips, strict=False) if first <= i <= last
                )
        return counts


class Launch(NamedTuple):
    """Something the device is given to do: a kernel, or a copy of a buffer.

    grid, threads: how many blocks, and threads in each; 0 where it is no kernel. shared: bytes. graph: it is part of a
    command buffer (a CUDA graph), so that the host does not launch it by itself. loop: number of the outermost loop it
    is in, or None. depth: how many loops it is in. part: "condition" or "body" of the outermost loop, or "".
    """

    kind: str
    name: str
    grid: int
    threads: int
    shared: int
    graph: bool
    loop: int | None
    depth: int
    part: str


def read_ptxas(text: str) -> dict[str, Resources]:
    """Kernel -> what `ptxas -v` reports of it."""
    found = {}
    for part in text.split("Compiling entry function")[1:]:
        shared = re.search(r"(\d+) bytes smem", part)
        found[re.search(r"'(\w+)'", part)[1]] = Resources(
            registers=int(re.search(r"Used (\d+) registers", part)[1]),
            spilled=sum(map(int, re.findall(r"(\d+) bytes spill", part))),
            shared=int(shared[1]) if shared else 0,
        )
    return found


def read_sass(text: str) -> dict[str, Code]:
    """Kernel -> its code, from `nvdisasm -c`; the endless branch and the padding at the end are left out."""
    found: dict[str, Code] = {}
    code = None
    for line in text.splitlines():
        if section := re.match(r"\.text\.(\w+):", line.strip()):
            code = found[section[1]] = Code([], {})
        elif code and (label := re.match(r"(\.L_\w+):", line.strip())):
            code.labels[label[1]] = len(code.body)
        elif code and (op := re.match(r"\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", line)):
            code.body.append((op[1], op[2]))
    for code in found.values():
        while code.body and code.body[-1][0] in ("NOP", "BRA"):
            code.body.pop()
    return found


def short_name(instruction: str) -> str:
    """An instruction without its modifiers, but loads from global memory with their width: `LDG.128`."""
    first, *rest = instruction.split(".")
    if first == "LDG":
        width = next((part for part in ("128", "64") if part in rest), None)
        small = "8" if {"U8", "S8"} & set(rest) else "16" if {"U16", "S16"} & set(rest) else "32"
        return f"LDG.{width or small}"
    return {"I2FP": "I2F"}.get(first, first)


def count(histogram: Counter, names: Collection[str]) -> int:
    return sum(times for name, times in histogram.items() if name.partition(".")[0] in names)


def clocks(histogram: Counter, float_clocks: int = 1) -> dict[str, int]:
    """Clocks that one warp keeps each unit of its quarter of a multiprocessor busy with.

    issue: one instruction a clock. alu: integer and logic instructions, two clocks. imad: integer products, two. float:
    `float_clocks` (1 on Hopper, 2 on A100). convert: conversions and special functions, eight.
    """
    return {
        "issue": sum(histogram.values()),
        "alu": 2 * count(histogram, ALU),
        "imad": 2 * count(histogram, MULTIPLY),
        "float": float_clocks * count(histogram, FLOAT),
        "convert": 8 * count(histogram, CONVERT),
    }


def read_launches(text: str) -> list[Launch]:
    """Every launch of a compiled program in order, from XLA's list of thunks, which is nested by indentation."""
    launches, stack, loops = [], [], 0
    for line in text.splitlines():
        thunk = re.match(r"( *)\d+: (k\w+) +\[[^\]]*\] *(.*)", line)
        if not thunk:
            if (label := line.strip().rstrip(":")) in ("condition", "body"):
                while stack and (stack[-1]["kind"] != "kWhile" or stack[-1]["part"] == "body"):
                    stack.pop()
                if stack:
                    stack[-1]["part"] = label
            continue
        indent, kind, rest = len(thunk[1]), thunk[2], thunk[3]
        while stack and stack[-1]["indent"] >= indent:
            stack.pop()
        inside = [one for one in stack if one["kind"] == "kWhile"]
        if kind in CONTAINERS:
            loops += kind == "kWhile" and not inside
            stack.append({"indent": indent, "kind": kind, "part": "", "number": loops - 1})
        else:
            launches.append(_launch(kind, rest, any(one["kind"] == "kCommandBuffer" for one in stack), inside))
    return launches


def _launch(kind: str, rest: str, graph: bool, inside: list[dict]) -> Launch:
    kernel = re.search(r"grid: \[([\d, ]+)\] threads: \[([\d, ]+)\].*?shared_memory: (\d+)", rest)
    grid, threads = (math.prod(map(int, kernel[i].split(","))) if kernel else 0 for i in (1, 2))
    name = rest.split(" grid:")[0].split(" (")[0].strip() or kind
    loop, part = (inside[0]["number"], inside[0]["part"]) if inside else (None, "")
    return Launch(kind, name, grid, threads, int(kernel[3]) if kernel else 0, graph, loop, len(inside), part)
