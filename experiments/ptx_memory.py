"""Global memory of a simulated kernel: buffers, and addresses in them. Called by `ptx_machine`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray
BUFFER_BITS = 36  # of an address: where in a buffer; above them, the number of the buffer and one


class BadAddress(Exception):
    """Out of bounds or misaligned: a GPU ends the kernel there."""


class GlobalMemory:
    """Buffers (uint8 each) with names. Addresses are (n,) int64, of n threads.

    What other programs do at the same time is not modelled: programs, and the threads of an atomic, come one by one.
    """

    def __init__(self, buffers: Sequence[Array], names: Sequence[str]) -> None:
        self.buffers, self.names = buffers, names

    def pointer(self, name: str) -> int:
        """The address of the first byte of a buffer."""
        return self.names.index(name) + 1 << BUFFER_BITS

    def load(self, addresses: Array, size: int) -> Array:
        """Bytes (n, size)."""
        buffer, places = self._places(addresses, size)
        return buffer[places]

    def store(self, addresses: Array, values: Array) -> None:
        """Bytes (n, size)."""
        buffer, places = self._places(addresses, values.shape[1])
        buffer[places] = values

    def update(self, addresses: Array, values: Array, function: Callable[[Array, Array], Array]) -> Array:
        """Numbers (n,) there, before each became what the function makes of it and a value."""
        before = np.zeros_like(values)
        for i, address in enumerate(addresses[:, None]):
            before[i : i + 1] = self.load(address, values.itemsize).reshape(-1).view(values.dtype)
            after = function(before[i : i + 1], values[i : i + 1])
            self.store(address, after.view(np.uint8)[None])
        return before

    def _places(self, addresses: Array, size: int) -> tuple[Array, Array]:
        """The buffer that they are all in, and where (n, size)."""
        number, start = addresses >> BUFFER_BITS, addresses & ((1 << BUFFER_BITS) - 1)
        which = int(number[0]) - 1
        if (number != number[0]).any() or not 0 <= which < len(self.buffers):
            raise BadAddress("addresses of global memory that are not of one buffer")
        most = len(self.buffers[which])
        if (start + size > most).any():
            raise BadAddress(f"bytes {start.max()} to {start.max() + size} of {self.names[which]}, which has {most}")
        return self.buffers[which], start[:, None] + np.arange(size)
