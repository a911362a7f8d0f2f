"""Runs a kernel's PTX on the CPU: all threads of each program in step, one program after the other. Called by
`simulate_kernel`.

What is not modelled: time; threads of a program that take different branches (an error); what other programs do at the
same time, and fences; the order in which tensor cores add (a product is summed exactly and rounded once); that
registers of a `wgmma` on its way must not change (what it reads, it reads at once; its results are there when they are
waited for); and all that `ptx_arithmetic` and `ptx_memory` leave out. An instruction that is not known is a RealmError.

Source: NVIDIA, PTX ISA.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

from ptx import Instruction, Kernel, Operand
from ptx_arithmetic import dtype_of, operation
from ptx_memory import BadAddress, GlobalMemory
from ptx_races import Detector, Fault
from ptx_shared import Copy, SharedMemory
from ptx_warp import (
    GROUPED,
    REDUCE,
    item_addresses,
    matrix_rows,
    multiply,
    multiply_grouped,
    reduce,
    shuffle,
)
from realm_jax.errors import RealmError

Array = np.ndarray
DYNAMIC_ALIGNMENT = 1024
INTEGER, FLOAT = re.compile(r"-?(0[xX][\da-fA-F]+|\d+)U?"), re.compile(r"0[fFdD]([\da-fA-F]+)")
ADDRESS = re.compile(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\d+)\s*)?\]")


def simulate(kernel: Kernel, buffers: Sequence[Array], grid: Sequence[int], dynamic_bytes: int = 0) -> dict[Fault, str]:
    """Run all programs of a grid on buffers (uint8 each), which are changed; what went wrong, each with an example."""
    if len(buffers) != len(kernel.parameters):
        raise RealmError(f"{kernel.name}: {len(buffers)} buffers for {len(kernel.parameters)} parameters")
    races = Detector()
    memory = GlobalMemory(races, buffers, kernel.parameters)
    for index in np.ndindex(*reversed([*grid, 1, 1][:3])):
        races.begin(index[::-1])
        with np.errstate(all="ignore"):
            Program(kernel, memory, races, dynamic_bytes).run()
    return races.faults


class Program:
    """One program of a grid (PTX: a CTA). registers: arrays (threads,) of unsigned bits, or bool; of 32 bits at least
    where they hold 8."""

    def __init__(self, kernel: Kernel, memory: GlobalMemory, races: Detector, dynamic_bytes: int) -> None:
        self.kernel, self.memory, self.races = kernel, memory, races
        self.threads = np.arange(kernel.threads)
        self.dynamic = -(-kernel.shared_bytes // DYNAMIC_ALIGNMENT) * DYNAMIC_ALIGNMENT
        size = self.dynamic + dynamic_bytes if kernel.dynamic else kernel.shared_bytes
        self.shared = SharedMemory(races, size, kernel.threads)
        self.registers: dict[str, Array] = {}
        self.begun: list[Copy] = []  # since the last commit
        self.groups: list[list[Copy]] = []
        self.products: list[dict[str, Array]] = [{}]  # results on their way, by group; last, since the last commit
        self.at = 0

    def run(self) -> None:
        """To the end, or to an access that a GPU would end the kernel at, which is a fault."""
        try:
            while self.kernel.body[self.at].opcode not in ("ret", "exit"):
                self._step(self.kernel.body[self.at])
        except BadAddress as error:
            self.races.faults.setdefault(Fault("address", str(error), self.at), f"program {self.races.program} ends")

    def _step(self, one: Instruction) -> None:
        active = self._active(one)
        try:
            if one.opcode in ("bra", "bra.uni"):
                self._require_all(active | ~active.any())
                self.at = self.kernel.labels[one.operands[0]] if active.all() else self.at + 1
                return
            SPECIAL.get(one.opcode.partition(".")[0], Program._compute)(self, one, active)
        except RealmError as error:
            raise RealmError(f"{self.kernel.name}: line {one.line}: {one}: {error}") from error
        self.at += 1

    def _compute(self, one: Instruction, active: Array) -> None:
        """Arithmetic."""
        found, sources = operation(one.opcode), one.operands[1:]
        if len(sources) != len(found.sources):
            raise RealmError(f"it has {len(sources)} operands; want {len(found.sources)}")
        values = (self.value(source, kind) for source, kind in zip(sources, found.sources, strict=True))
        self._put(one.operands[0], found.compute(*values), active)

    def _active(self, one: Instruction) -> Array:
        """Which threads run it, bool (threads,)."""
        if not one.guard:
            return np.ones(len(self.threads), bool)
        return self.value(one.guard, "pred") ^ one.negated

    def _require_all(self, active: Array) -> None:
        if not active.all():
            raise RealmError("threads part ways, which is not simulated")

    # --- operands ---

    def value(self, operand: Operand, kind: str) -> Array:
        """An operand of a PTX type (threads,), or (threads, 2) of a pair ("f16x2")."""
        if isinstance(operand, tuple):
            return self._joined(operand, kind)
        bits = self._bits(operand)
        if kind == "pred":
            return bits.astype(bool)
        dtype = dtype_of(kind)
        size = dtype.itemsize * (2 if kind.endswith("x2") else 1)
        found = np.ascontiguousarray(bits.astype(f"u{size}")).view(dtype)
        return found.reshape(-1, 2) if kind.endswith("x2") else found

    def _joined(self, names: tuple[str, ...], kind: str) -> Array:
        """A vector of registers as one number, the first lowest."""
        size = 8 * dtype_of(kind).itemsize // len(names)
        parts = np.stack([self.value(name, f"b{size}") for name in names], -1)
        return parts.view(dtype_of(kind))[:, 0]

    def _bits(self, operand: str) -> Array:
        if operand in self.registers:
            return self.registers[operand]
        name, _, axis = operand.partition(".")
        everywhere = functools.partial(np.full, len(self.threads))
        if name == "%tid":
            return self.threads.astype(np.uint32) if axis == "x" else everywhere(0, np.uint32)
        if name == "%ctaid":
            return everywhere(self.races.program["xyz".index(axis)], np.uint32)
        if operand in self.kernel.shared:
            return everywhere(self.kernel.shared[operand], np.uint64)
        if operand == self.kernel.dynamic:
            return everywhere(self.dynamic, np.uint64)
        if found := FLOAT.fullmatch(operand):
            return everywhere(int(found[1], 16), np.uint64)
        if found := INTEGER.fullmatch(operand):
            return everywhere(int(operand.rstrip("U"), 0) % 2**64, np.uint64)
        raise RealmError(f"{operand} has no value")

    def _put(self, operand: Operand, value: Array, active: Array) -> None:
        """A result (threads,), or pairs (threads, 2), in a register, or cut up in several."""
        if isinstance(operand, tuple):
            parts = np.ascontiguousarray(value).view(f"u{value.dtype.itemsize // len(operand)}")
            for name, part in zip(operand, parts.reshape(-1, len(operand)).T, strict=True):
                self._put(name, part, active)
            return
        if value.dtype.itemsize == 1 and value.dtype != bool:
            value = value.astype(np.int32 if value.dtype.kind == "i" else np.uint32)
        if value.dtype != bool:
            value = np.ascontiguousarray(value)
            value = value.view(f"u{value.dtype.itemsize * (value.shape[1] if value.ndim == 2 else 1)}").reshape(-1)
        if operand != "_":
            before = self.registers.get(operand, np.zeros_like(value))
            self.registers[operand] = np.where(active, value, before).astype(value.dtype)

    # --- memory ---

    def _addresses(self, operand: Operand, active: Array, alignment: int) -> Array:
        """`[register + 16]` of the active threads, (n,)."""
        name, offset = ADDRESS.fullmatch(operand).groups()
        found = self._bits(name)[active].astype(np.int64) + int(offset or 0)
        if (found % alignment).any():
            thread = self.threads[active][found % alignment != 0][0]
            raise BadAddress(f"thread {thread}: an address that is not a multiple of {alignment}")
        return found

    def _in_shared(self, addresses: Array, size: int) -> Array:
        most = len(self.shared.bytes)
        if ((addresses < 0) | (addresses + size > most)).any():
            raise BadAddress(f"bytes {addresses.max()} to {addresses.max() + size} of shared memory, which has {most}")
        return addresses

    def _load(self, one: Instruction, active: Array) -> None:
        _, space, *_, kind = one.opcode.split(".")
        if space == "param":
            pointer = self.memory.pointer(one.operands[1].strip("[]"))
            self._put(one.operands[0], np.full(len(self.threads), pointer, np.uint64), active)
            return
        names = one.operands[0] if isinstance(one.operands[0], tuple) else (one.operands[0],)
        dtype = dtype_of(kind)
        size = dtype.itemsize * len(names)
        if not active.any():
            return
        addresses = self._addresses(one.operands[1], active, size)
        if space == "shared":
            read = self.shared.load(self.threads[active], self._in_shared(addresses, size), size, self.at)
        else:
            read = self.memory.load(self.threads[active], addresses, size, self.at)
        for name, part in zip(names, np.ascontiguousarray(read).view(dtype).T, strict=True):
            value = np.zeros(len(self.threads), dtype)
            value[active] = part
            self._put(name, value, active)

    def _store(self, one: Instruction, active: Array) -> None:
        _, space, *_, kind = one.opcode.split(".")
        names = one.operands[1] if isinstance(one.operands[1], tuple) else (one.operands[1],)
        size = dtype_of(kind).itemsize * len(names)
        if not active.any():
            return
        values = np.stack([self.value(name, kind)[active] for name in names], -1).view(np.uint8)
        addresses = self._addresses(one.operands[0], active, size)
        if space == "shared":
            self.shared.store(self.threads[active], self._in_shared(addresses, size), values, self.at)
        else:
            self.memory.store(self.threads[active], addresses, values, self.at)

    def _update(self, one: Instruction, active: Array) -> None:
        """atom: what was there before is the result."""
        *_, way, kind = one.opcode.split(".")
        if not one.opcode.startswith("atom.global.") or way not in REDUCE or kind not in ("s32", "u32"):
            raise RealmError("this atomic is not simulated")
        if active.any():
            values = self.value(one.operands[2], kind)
            addresses = self._addresses(one.operands[1], active, values.itemsize)
            values[active] = self.memory.update(addresses, values[active], REDUCE[way])
            self._put(one.operands[0], values, active)

    def _copy(self, one: Instruction, active: Array) -> None:
        """cp.async: copies arrive when their threads wait for them, and not before."""
        way = one.opcode.split(".")[2]
        if way == "commit_group":
            self.groups.append(self.begun)
            self.begun = []
        elif way == "wait_group":
            arrived = max(0, len(self.groups) - int(one.operands[0]))
            for copy in (copy for group in self.groups[:arrived] for copy in group):
                self.shared.arrive(copy)
            self.groups = self.groups[arrived:]
        elif way in ("ca", "cg") and one.opcode.endswith("shared.global"):
            self._begin_copy(one, active)
        else:
            raise RealmError("this copy is not simulated")

    def _begin_copy(self, one: Instruction, active: Array) -> None:
        """The fourth operand, if any, is how many bytes are read; zeros are copied in place of the others."""
        if not active.any():
            return
        target, source, size = *one.operands[:2], int(one.operands[2], 0)
        targets = self._in_shared(self._addresses(target, active, size), size)
        wanted = self.value(one.operands[-1], "u32")
        if not set(np.unique(wanted[active])) <= {0, size}:
            raise RealmError("copies of parts of an item are not simulated")
        values = np.zeros((len(targets), size), np.uint8)
        read = active & (wanted == size)
        if read.any():
            sources = self._addresses(source, read, size)
            values[read[active]] = self.memory.load(self.threads[read], sources, size, self.at)
        self.begun.append(self.shared.copy(self.threads[active], targets, values, self.at))

    # --- of warps ---

    def _barrier(self, one: Instruction, active: Array) -> None:
        self._require_all(active)
        if one.opcode == "bar.warp.sync" and one.operands == ("0xffffffff",):
            self.races.warp_barrier()
        elif one.opcode in ("bar.sync", "barrier.sync") and one.operands == ("0",):
            self.races.barrier()
        else:
            raise RealmError("this barrier is not simulated")

    def _multiply(self, one: Instruction, active: Array) -> None:
        self._require_all(active)
        result, *fragments = one.operands
        values = [[self.value(name, "b32") for name in fragment] for fragment in fragments]
        for name, value in zip(result, multiply(one.opcode, *values), strict=True):
            self._put(name, value, active)

    def _multiply_grouped(self, one: Instruction, active: Array) -> None:
        """wgmma: four warps together."""
        self._require_all(active)
        match one.opcode.split(".")[1]:
            case "commit_group":
                self.products.append({})
            case "wait_group":
                there = max(0, len(self.products) - 1 - int(one.operands[0]))
                for name, value in (item for results in self.products[:there] for item in results.items()):
                    self._put(name, value, active)
                self.products = self.products[there:]
            case "mma_async":
                self._begin_product(one)
            case "fence":
                pass
            case _:
                raise RealmError("this is not simulated")

    def _begin_product(self, one: Instruction) -> None:
        found, (names, left, descriptor, more, *rest) = GROUPED.fullmatch(one.opcode), one.operands
        if not found or rest != ["1", "1", "0"] or len(names) != int(found[1]) // 2 or len(self.threads) % 128:
            raise RealmError("this product is not simulated")
        columns = int(found[1])
        rows = [
            self.shared.load(self.threads, self._in_shared(addresses, 16), 16, self.at).reshape(-1, 32, 16)
            for addresses in matrix_rows(self.value(descriptor, "b64"), columns)
        ]
        right = np.concatenate(rows, 1)[:, : 2 * columns].reshape(-1, columns, 32).view(np.float16)
        again, zero = self.value(more, "pred"), np.zeros(len(self.threads), np.uint32)
        sums = [np.where(again, self._on_its_way(name), 0) if again.any() else zero for name in names]
        results = multiply_grouped([self.value(name, "b32") for name in left], right, sums)
        self.products[-1] |= dict(zip(names, results, strict=True))

    def _on_its_way(self, name: str) -> Array:
        """A register, or what it will hold."""
        found = next((results[name] for results in reversed(self.products) if name in results), None)
        return self.value(name, "b32") if found is None else found.view(np.uint32)

    def _matrices(self, one: Instruction, active: Array) -> None:
        """ldmatrix and stmatrix."""
        self._require_all(active)
        loads = one.opcode.startswith("ldmatrix")
        names, address = one.operands if loads else one.operands[::-1]
        form = re.fullmatch(r"(?:ld|st)matrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared\.b16", one.opcode)
        if not form:
            raise RealmError("this move of matrices is not simulated")
        starts = self._addresses(address, active, 16)  # of lanes that have no row, too: compilers give them one
        for number, name in enumerate(names if isinstance(names, tuple) else (names,)):
            words = np.zeros((len(self.threads), 4), np.uint8)
            if not loads:
                words = np.ascontiguousarray(self.value(name, "b32")[:, None]).view(np.uint8)
            for half in range(2):
                places, own = item_addresses(starts, number, half, bool(form[1])), slice(2 * half, 2 * half + 2)
                if loads:
                    words[:, own] = self.shared.load(self.threads, self._in_shared(places, 2), 2, self.at)
                else:
                    self.shared.store(self.threads, self._in_shared(places, 2), words[:, own], self.at)
            if loads:
                self._put(name, words.view(np.uint32)[:, 0], active)

    def _shuffle(self, one: Instruction, active: Array) -> None:
        self._require_all(active)
        _, sync, way, kind = one.opcode.split(".")
        if sync != "sync" or kind != "b32" or len(one.operands) != 5:
            raise RealmError("this shuffle is not simulated")
        values = (self.value(operand, kind) for operand in one.operands[1:4])
        names = one.operands[0].split("|")
        for name, value in zip(names, shuffle(way, *values), strict=False):
            self._put(name, value, active)

    def _reduce(self, one: Instruction, active: Array) -> None:
        self._require_all(active & (self.value(one.operands[2], "u32") == 0xFFFFFFFF))
        _, _, way, kind = one.opcode.split(".")
        if way not in REDUCE or kind not in ("s32", "u32"):
            raise RealmError("this reduction is not simulated")
        self._put(one.operands[0], reduce(way, self.value(one.operands[1], kind)), active)

    def _convert_address(self, one: Instruction, active: Array) -> None:
        """Addresses are the same in all state spaces here."""
        self._put(one.operands[0], self.value(one.operands[1], "b64"), active)

    def _nothing(self, one: Instruction, active: Array) -> None:
        """A hint."""


SPECIAL: dict[str, Callable[[Program, Instruction, Array], None]] = {
    "ld": Program._load, "st": Program._store, "cp": Program._copy, "bar": Program._barrier,
    "barrier": Program._barrier, "mma": Program._multiply, "wgmma": Program._multiply_grouped,
    "ldmatrix": Program._matrices, "stmatrix": Program._matrices, "shfl": Program._shuffle, "redux": Program._reduce,
    "atom": Program._update, "cvta": Program._convert_address, "griddepcontrol": Program._nothing,
}  # fmt: skip
