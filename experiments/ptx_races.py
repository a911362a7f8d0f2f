"""A detector of races between the threads of a simulated program. Called by `ptx_shared` and `ptx_memory`.

Two accesses to a byte by different threads, one of them a write, must have a barrier between them: `bar.sync`, or
`bar.warp.sync` for threads of a warp. Source: PTX ISA, "Memory Consistency Model".
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Array = np.ndarray
Index = Array | tuple[Array, ...]
UNORDERED = "what {}, with no barrier between"
NOBODY, SEVERAL = -1, -2  # in place of a thread


class Fault(NamedTuple):
    """What is wrong between two instructions, given as places in the kernel's body: `at` came second (other: -1, there
    is one alone). kind: "race", "address", or "unwritten", which is no fault if nobody uses what is read."""

    kind: str
    what: str
    at: int
    other: int = -1


class Phases(NamedTuple):
    """How many barriers there were: of all threads, and those with the ones of each warp."""

    block: int
    warp: int


class Access(NamedTuple):
    """Of threads (n, 1) to places (n, bytes) of a memory, by an instruction."""

    what: str
    memory: str
    threads: Array
    places: Array
    at: int


class Stamps:
    """For each byte, along the last axis, the last access: of which thread, by which instruction, in which phases."""

    def __init__(self, *shape: int) -> None:
        self.thread = np.full(shape, NOBODY)
        self.at, self.block, self.warp = (np.zeros(shape, int) for _ in range(3))

    def put(self, index: Index, thread: Array, at: int, phases: Phases) -> None:
        self.thread[index], self.at[index] = thread, at
        self.block[index], self.warp[index] = phases

    def unordered(self, index: Index, threads: Array, same_warp: Array, phases: Phases) -> Array:
        """Where another thread came last, and no barrier for both since."""
        other = self.thread[index]
        since = np.where(same_warp, self.warp[index] >= phases.warp, self.block[index] >= phases.block)
        return since & (other != NOBODY) & (other != threads)


class Detector:
    """What went wrong in the programs of a kernel, which come one after the other.

    phases: of a program and of its warps; one lasts from a barrier to the next. faults: each with how it came about for
    the first time.
    """

    def __init__(self) -> None:
        self.phases = Phases(1, 1)
        self.program: tuple[int, ...] = ()
        self.faults: dict[Fault, str] = {}

    def begin(self, program: tuple[int, ...]) -> None:
        """What was before is not looked at any more."""
        self.program = program
        self.barrier()

    def barrier(self) -> None:
        """Of all threads."""
        self.phases = Phases(self.phases.block + 1, self.phases.warp + 1)

    def warp_barrier(self) -> None:
        """Of the threads of each warp."""
        self.phases = self.phases._replace(warp=self.phases.warp + 1)

    def check_written(self, access: Access, written: Stamps, where: Array | bool = True) -> None:
        """Against the last write of each byte."""
        before = written.thread[access.places]
        found = written.unordered(access.places, access.threads, before // 32 == access.threads // 32, self.phases)
        self.note("race", access, found & where, UNORDERED.format("another thread writes"), written.at[access.places])

    def note(self, kind: str, access: Access, where: Array, what: str, others: Array | None = None) -> None:
        """A fault for each instruction that is part of it, where there is one."""
        others = np.full(where.shape, NOBODY) if others is None else others
        for other in np.unique(others[where]):
            row, column = np.argwhere(where & (others == other))[0]
            thread, place = access.threads[row, 0], access.places[row, column]
            example = f"program {self.program}, thread {thread}, byte {place} of {access.memory}"
            self.faults.setdefault(Fault(kind, f"{access.what} {what}", access.at, int(other)), example)
