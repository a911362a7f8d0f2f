"""Bytes, characters and character classes as llama.cpp sees them. Called by the tokenizers of this package.

A text travels as `str`. Bytes that are not UTF-8 travel inside it as lone surrogates U+DC80..U+DCFF
(Python's `surrogateescape`, which is also how command line arguments arrive).
"""

import json
from functools import cache
from importlib.resources import files

import numpy as np

from realm_jax.errors import RequestError

# One character stands for a whole class where a regular expression says \p{...}; ASCII stands for itself.
_OTHER, _NUMBER, _LETTER, _PUNCTUATION, _MARK, _SYMBOL, _HAN_LETTER, _HAN_OTHER = range(0xD0, 0xD8)
_SPACE = 0x0B
CLASS_CHARACTERS = {
    "N": "0-9\xd1",
    "L": "A-Za-z\xd2\xd6",
    "P": "!-#%-*,-/:;?@\\[-\\]_{}\xd3",
    "M": "\xd4",
    "S": "$+<->\\^`|~\xd5",
    "Han": "\xd6\xd7",
}
_NON_ASCII_SPACES = (0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
_HAN_RANGES = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2EBEF),
    (0x2F800, 0x2FA1F),
)
_SPACE_TO_VT = dict.fromkeys(_NON_ASCII_SPACES, "\x0b")


def text_to_bytes(text: str) -> bytes:
    """UTF-8 of a text; U+DC80..U+DCFF become the single bytes that they stand for.

    Raises RequestError for any other lone surrogate: UTF-8 has no bytes for it.
    """
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which UTF-8 "
            "cannot hold: replace it before tokenizing (for example by U+FFFD)"
        ) from None


def bytes_to_text(data: bytes) -> str:
    """Characters of UTF-8 bytes, read as leniently as llama.cpp reads them.

    Over-long forms and encoded surrogates count as the number they spell; a byte that begins no complete
    sequence becomes U+FFFD. Raises RequestError for a sequence that spells more than U+10FFFF.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        pass
    characters, position = [], 0
    while position < len(data):
        code_point, width = _read_code_point(data, position)
        if code_point > 0x10FFFF:
            raise RequestError(f"the text spells the code point {code_point:#x} at byte {position}: not a character")
        characters.append(chr(code_point))
        position += width
    return "".join(characters)


def _read_code_point(data: bytes, position: int) -> tuple[int, int]:
    """The number that the bytes at `position` spell and how many bytes it takes; (0xFFFD, 1) if none."""
    lead = data[position]
    if lead < 0x80:
        return lead, 1
    for width, mark, mask in ((2, 0xC0, 0x1F), (3, 0xE0, 0x0F), (4, 0xF0, 0x07)):
        rest = data[position + 1 : position + width]
        if lead & ~mask & 0xFF == mark and len(rest) == width - 1 and all(byte & 0xC0 == 0x80 for byte in rest):
            value = lead & mask
            for byte in rest:
                value = value << 6 | byte & 0x3F
            return value, width
    return 0xFFFD, 1


def collapse(text: str) -> str:
    """A text of the same length with every character above ASCII replaced by the character of its class."""
    if text.isascii():
        return text
    code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return _class_table()[code_points].tobytes().decode("latin-1")


def ascii_spaces(text: str) -> str:
    """The text with every white space above ASCII replaced by U+000B, one of the six that `\\s` means."""
    return text if text.isascii() else text.translate(_SPACE_TO_VT)


@cache
def _class_table() -> np.ndarray:
    """uint8 (0x110000,): class character of every code point."""
    table = np.full(0x110000, _OTHER, np.uint8)
    ranges = json.loads((files(__package__) / "unicode_classes.json").read_text("utf-8"))
    marks = {"N": _NUMBER, "L": _LETTER, "P": _PUNCTUATION, "M": _MARK, "S": _SYMBOL}
    for name, mark in marks.items():
        for item in " ".join(ranges[name]).split():
            first, _, last = item.partition("-")
            table[int(first, 16) : int(last or first, 16) + 1] = mark
    for first, last in _HAN_RANGES:
        han = table[first : last + 1]
        han[:] = np.where(han == _LETTER, _HAN_LETTER, np.where(han == _OTHER, _HAN_OTHER, han))
    table[list(_NON_ASCII_SPACES)] = _SPACE
    table[:128] = np.arange(128)
    return table


@cache
def byte_characters() -> str:
    """The 256 printable characters that byte-level BPE writes for the bytes 0..255 (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(256, 512))
    return "".join(chr(byte if byte in printable else next(spare)) for byte in range(256))


@cache
def _byte_translation() -> dict[int, str]:
    return dict(enumerate(byte_characters()))


@cache
def character_bytes() -> dict[str, int]:
    """The inverse of `byte_characters`."""
    return {character: byte for byte, character in enumerate(byte_characters())}


def to_byte_characters(text: str) -> str:
    """UTF-8 of a text, one byte-level character a byte."""
    return text.encode("utf-8", "surrogatepass").decode("latin-1").translate(_byte_translation())
