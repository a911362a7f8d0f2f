"""Bounded reading of little-endian values from the header of a GGUF file. Called by `header` and `values`."""

import mmap
import struct

from realm_jax.errors import GGUFError
from realm_jax.gguf.types import shown

# These bound the memory that a hostile file can ask for, to about 1 GiB. The largest vocabularies in use take a
# tenth: a million strings, 20 MB of metadata and tensor list together.
MAX_HEADER_BYTES = 128 * 2**20
MAX_STRINGS = 2**22  # in all arrays of a file
MAX_NESTED_ARRAYS = 2**16  # arrays inside arrays, in all of a file

_U64 = struct.Struct("<Q")


class Cursor:
    """A position in a buffer that never steps over the end of the file or of the allowed header.

    buffer: the mapped file. source: how messages name it. Every read says what it is for, and is checked against
    the bytes left before anything is taken; a read that does not fit raises GGUFError.
    """

    def __init__(self, buffer: mmap.mmap | bytes, source: str):
        self.buffer = buffer
        self.source = source
        self.position = 0
        self.limit = min(len(buffer), MAX_HEADER_BYTES)
        self._strings_left = MAX_STRINGS
        self._arrays_left = MAX_NESTED_ARRAYS

    def error(self, message: str) -> GGUFError:
        """The error to raise about this file."""
        return GGUFError(f"{self.source}: {message}")

    def need(self, count: int, what: str) -> None:
        """Refuses if fewer than `count` bytes are left for `what`."""
        left = len(self.buffer) - self.position
        if count > left:
            raise self.error(
                f"{what} needs {count:,} bytes at byte {self.position:,}, but only {left:,} are left: "
                "the file is cut short or broken, get it again"
            )
        if count > self.limit - self.position:
            raise self.error(
                f"{what} needs {count:,} bytes at byte {self.position:,}: metadata and tensor list "
                f"must not exceed {MAX_HEADER_BYTES:,} bytes"
            )

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        self.need(count, what)
        start = self.position
        self.position += count
        return self.buffer[start : self.position]

    def unpack(self, layout: struct.Struct, what: str) -> tuple:
        """The next values of `layout`."""
        return layout.unpack(self.take(layout.size, what))

    def u64(self, what: str) -> int:
        return self.unpack(_U64, what)[0]

    def name(self, what: str, max_bytes: int) -> str:
        """A key or tensor name: 1 to `max_bytes` bytes of printable UTF-8."""
        length = self.u64(f"the length of {what}")
        if not 1 <= length <= max_bytes:
            raise self.error(f"{what} is {length:,} bytes long: a name has 1 to {max_bytes:,} bytes")
        raw = self.take(length, what)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} is {shown(raw)}: a name must be valid UTF-8") from None
        if not text.isprintable():
            raise self.error(f"{what} is {shown(text)}: a name must not have control characters")
        return text

    def string(self, what: str) -> str:
        """A string value; bytes that are not UTF-8 become lone surrogates, so that nothing is lost."""
        length = self.u64(f"the length of {what}")
        return self.take(length, what).decode("utf-8", "surrogateescape")

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings, as `string` reads them. Written out for speed: vocabularies have some 400,000."""
        if count > self._strings_left:
            raise self.error(f"{what} has {count:,} strings: all arrays together may have {MAX_STRINGS:,}")
        self._strings_left -= count
        self.need(count * _U64.size, what)
        buffer, position, limit, unpack = self.buffer, self.position, self.limit, _U64.unpack_from
        texts = []
        while len(texts) < count:
            if position + 8 <= limit:
                start = position + 8
                end = start + unpack(buffer, position)[0]
                if end <= limit:
                    texts.append(str(buffer[start:end], "utf-8", "surrogateescape"))
                    position = end
                    continue
            self.position = position
            self.string(f"string {len(texts):,} of {what}")  # does not fit: raises, saying why
        self.position = position
        return texts

    def nested_arrays(self, count: int, least_bytes: int, what: str) -> None:
        """Refuses `count` arrays of `least_bytes` or more inside an array if they do not fit or are too many."""
        if count > self._arrays_left:
            raise self.error(
                f"{what} holds {count:,} arrays inside an array: a file may have {MAX_NESTED_ARRAYS:,} of them"
            )
        self._arrays_left -= count
        self.need(count * least_bytes, what)
