"""Shared memory of a simulated program, with a detector of races. Called by `ptx_machine`.

Two accesses to a byte by different threads, one of them a write, must have a barrier between them: `bar.sync`, or
`bar.warp.sync` for threads of a warp. Bytes that are copied asynchronously are rubbish until the thread that copies
them has waited for it, which then counts as its write. Sources: PTX ISA, "Memory Consistency Model" and "cp.async".
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Array = np.ndarray
Index = Array | tuple[Array, ...]
UNORDERED = "what {}, with no barrier between"
NOBODY, SEVERAL = -1, -2  # in place of a thread
RUBBISH = 0xCD  # in memory that has nothing yet: as float16 and float32 large, as an index out of bounds


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
    """Of threads (n, 1) to places (n, bytes), by an instruction."""

    what: str
    threads: Array
    places: Array
    at: int


class Copy(NamedTuple):
    """Bytes (threads, n) on their way to places (threads, n), begun by these threads (threads, 1) at an instruction."""

    threads: Array
    places: Array
    values: Array
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


class SharedMemory:
    """`size` bytes for `threads` threads. Addresses are (n,), one for each of n threads, and in bounds.

    phases: of a program and of its warps; one lasts from a barrier to the next. faults: each with how it came about for
    the first time.
    """

    def __init__(self, size: int, threads: int) -> None:
        self.bytes = np.full(size, RUBBISH, np.uint8)
        self.written, self.read = Stamps(size), Stamps(threads // 32, size)
        self.copying = np.zeros(size, bool)
        self.phases = Phases(1, 1)
        self.faults: dict[Fault, str] = {}

    def barrier(self) -> None:
        """Of all threads."""
        self.phases = Phases(self.phases.block + 1, self.phases.warp + 1)

    def warp_barrier(self) -> None:
        """Of the threads of each warp."""
        self.phases = self.phases._replace(warp=self.phases.warp + 1)

    def load(self, threads: Array, addresses: Array, size: int, at: int) -> Array:
        """What each of the threads reads: bytes (n, size)."""
        access = Access("reads", threads[:, None], addresses[:, None] + np.arange(size), at)
        self._note("unwritten", access, self.written.thread[access.places] == NOBODY, "what was never written")
        self._check_written(access)
        self._stamp_read(access)
        return self.bytes[access.places]

    def store(self, threads: Array, addresses: Array, values: Array, at: int) -> None:
        """Each thread writes its bytes (n, size)."""
        self._write("writes", threads, addresses, values, at)

    def copy(self, threads: Array, addresses: Array, values: Array, at: int) -> Copy:
        """Begin to copy; nothing is there before `arrive`."""
        places = self._write("copies over", threads, addresses, values, at)
        self.bytes[places], self.copying[places] = RUBBISH, True
        return Copy(threads[:, None], places, values, at)

    def arrive(self, copy: Copy) -> None:
        """The threads that began a copy have waited for it."""
        self.bytes[copy.places], self.copying[copy.places] = copy.values, False
        self.written.put(copy.places, copy.threads, copy.at, self.phases)

    def _write(self, what: str, threads: Array, addresses: Array, values: Array, at: int) -> Array:
        """The places (n, bytes). Several threads may write the same to one place at once, as reductions do."""
        access = Access(what, threads[:, None], addresses[:, None] + np.arange(values.shape[1]), at)
        self._check_written(access)
        for warp in range(len(self.read.thread)):
            index = np.full_like(access.places, warp), access.places
            found = self.read.unordered(index, access.threads, access.threads // 32 == warp, self.phases)
            self._note("race", access, found, UNORDERED.format(f"warp {warp} reads"), self.read.at[index])
        self.written.put(access.places, access.threads, at, self.phases)
        self.bytes[access.places] = values
        self._note("race", access, self.bytes[access.places] != values, "where another thread writes something else")
        return access.places

    def _stamp_read(self, access: Access) -> None:
        """Of each warp, who reads a byte since its last barrier: a thread, or SEVERAL."""
        warps = np.broadcast_to(access.threads // 32, access.places.shape)
        index = warps, access.places
        several = (self.read.warp[index] >= self.phases.warp) & (self.read.thread[index] != access.threads)
        _, which, count = np.unique(warps * len(self.bytes) + access.places, return_inverse=True, return_counts=True)
        several |= count[which].reshape(several.shape) > 1
        self.read.put(index, np.where(several, SEVERAL, access.threads), access.at, self.phases)

    def _check_written(self, access: Access) -> None:
        """Against the last write of each byte, and copies that are on their way."""
        before, at = self.written.thread[access.places], self.written.at[access.places]
        copying = self.copying[access.places]
        self._note("race", access, copying, "what is still on its way: no wait for the copy", at)
        found = self.written.unordered(access.places, access.threads, before // 32 == access.threads // 32, self.phases)
        self._note("race", access, found & ~copying, UNORDERED.format("another thread writes"), at)

    def _note(self, kind: str, access: Access, where: Array, what: str, others: Array | None = None) -> None:
        """A fault for each instruction that is part of it, where there is one."""
        others = np.full(where.shape, NOBODY) if others is None else others
        for other in np.unique(others[where]):
            row, column = np.argwhere(where & (others == other))[0]
            example = f"thread {access.threads[row, 0]}, byte {access.places[row, column]} of shared memory"
            self.faults.setdefault(Fault(kind, f"{access.what} {what}", access.at, int(other)), example)
