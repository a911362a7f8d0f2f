"""Shared memory of a simulated program. Called by `ptx_machine`.

Bytes that are copied asynchronously are rubbish until the thread that copies them has waited for it, which then counts
as its write. Source: PTX ISA, "cp.async".
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ptx_races import NOBODY, SEVERAL, UNORDERED, Access, Detector, Stamps

Array = np.ndarray
NAME = "shared memory"
RUBBISH = 0xCD  # in memory that has nothing yet: as float16 and float32 large, as an index out of bounds


class Copy(NamedTuple):
    """Bytes (threads, n) on their way to places (threads, n), begun by these threads (threads, 1) at an instruction."""

    threads: Array
    places: Array
    values: Array
    at: int


class SharedMemory:
    """`size` bytes for `threads` threads. Addresses are (n,), one for each of n threads, and in bounds."""

    def __init__(self, races: Detector, size: int, threads: int) -> None:
        self.races = races
        self.bytes = np.full(size, RUBBISH, np.uint8)
        self.written, self.read = Stamps(size), Stamps(threads // 32, size)
        self.copying = np.zeros(size, bool)

    def load(self, threads: Array, addresses: Array, size: int, at: int) -> Array:
        """What each of the threads reads: bytes (n, size)."""
        access = Access("reads", NAME, threads[:, None], addresses[:, None] + np.arange(size), at)
        self.races.note("unwritten", access, self.written.thread[access.places] == NOBODY, "what was never written")
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
        self.written.put(copy.places, copy.threads, copy.at, self.races.phases)

    def _write(self, what: str, threads: Array, addresses: Array, values: Array, at: int) -> Array:
        """The places (n, bytes). Several threads may write the same to one place at once, as reductions do."""
        access = Access(what, NAME, threads[:, None], addresses[:, None] + np.arange(values.shape[1]), at)
        self._check_written(access)
        for warp in range(len(self.read.thread)):
            index = np.full_like(access.places, warp), access.places
            found = self.read.unordered(index, access.threads, access.threads // 32 == warp, self.races.phases)
            self.races.note("race", access, found, UNORDERED.format(f"warp {warp} reads"), self.read.at[index])
        self.written.put(access.places, access.threads, at, self.races.phases)
        self.bytes[access.places] = values
        differs = self.bytes[access.places] != values
        self.races.note("race", access, differs, "where another thread writes something else")
        return access.places

    def _stamp_read(self, access: Access) -> None:
        """Of each warp, who reads a byte since its last barrier: a thread, or SEVERAL."""
        warps = np.broadcast_to(access.threads // 32, access.places.shape)
        index = warps, access.places
        several = (self.read.warp[index] >= self.races.phases.warp) & (self.read.thread[index] != access.threads)
        _, which, count = np.unique(warps * len(self.bytes) + access.places, return_inverse=True, return_counts=True)
        several |= count[which].reshape(several.shape) > 1
        self.read.put(index, np.where(several, SEVERAL, access.threads), access.at, self.races.phases)

    def _check_written(self, access: Access) -> None:
        """Against the last write of each byte, and copies that are on their way."""
        copying, at = self.copying[access.places], self.written.at[access.places]
        self.races.note("race", access, copying, "what is still on its way: no wait for the copy", at)
        self.races.check_written(access, self.written, ~copying)
