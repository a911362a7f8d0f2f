"""Global memory of a simulated kernel: buffers, and addresses in them. Called by `ptx_machine`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ptx_races import Access, Detector, Stamps

Array = np.ndarray
BUFFER_BITS = 36  # of an address: where in a buffer; above them, the number of the buffer and one


class BadAddress(Exception):
    """Out of bounds or misaligned: a GPU ends the kernel there."""


class GlobalMemory:
    """Buffers (uint8 each) with names. Addresses are (n,) int64, of n threads.

    What other programs do at the same time is not modelled: programs, and the threads of an atomic, come one by one.
    Nor are races of a write with a read before it.
    """

    def __init__(self, races: Detector, buffers: Sequence[Array], names: Sequence[str]) -> None:
        self.races, self.buffers, self.names = races, buffers, names
        self.written: dict[int, Stamps] = {}

    def pointer(self, name: str) -> int:
        """The address of the first byte of a buffer."""
        return self.names.index(name) + 1 << BUFFER_BITS

    def load(self, threads: Array, addresses: Array, size: int, at: int) -> Array:
        """What each of the threads reads: bytes (n, size)."""
        which, places = self._places(addresses, size)
        if which in self.written:
            access = Access("reads", self.names[which], threads[:, None], places, at)
            self.races.check_written(access, self.written[which])
        return self.buffers[which][places]

    def store(self, threads: Array, addresses: Array, values: Array, at: int) -> None:
        """Each thread writes its bytes (n, size)."""
        which, places = self._places(addresses, values.shape[1])
        written = self.written.setdefault(which, Stamps(len(self.buffers[which])))
        self.races.check_written(Access("writes", self.names[which], threads[:, None], places, at), written)
        written.put(places, threads[:, None], at, self.races.phases)
        self.buffers[which][places] = values

    def update(self, addresses: Array, values: Array, function: Callable[[Array, Array], Array]) -> Array:
        """Numbers (n,) there, before each became what the function makes of it and a value."""
        before = np.zeros_like(values)
        for i, address in enumerate(addresses[:, None]):
            which, places = self._places(address, values.itemsize)
            before[i : i + 1] = self.buffers[which][places[0]].view(values.dtype)
            self.buffers[which][places[0]] = function(before[i : i + 1], values[i : i + 1]).view(np.uint8)
        return before

    def _places(self, addresses: Array, size: int) -> tuple[int, Array]:
        """The number of the buffer that they are all in, and where (n, size)."""
        number, start = addresses >> BUFFER_BITS, addresses & ((1 << BUFFER_BITS) - 1)
        which = int(number[0]) - 1
        if (number != number[0]).any() or not 0 <= which < len(self.buffers):
            raise BadAddress("addresses of global memory that are not of one buffer")
        most = len(self.buffers[which])
        if (start + size > most).any():
            raise BadAddress(f"bytes {start.max()} to {start.max() + size} of {self.names[which]}, which has {most}")
        return which, start[:, None] + np.arange(size)
