"""Text at the edges of a command: what may reach a terminal, and what comes in from arguments, files and stdin.

Strings in a model file and text that a model makes are anybody's: shown raw on a terminal, an escape sequence in
them could recolour it, retitle it, or overwrite what stands there. So control characters are shown, not sent.
"""

import re
import sys
from pathlib import Path

from realm_jax.errors import RealmError

# C0 and C1 controls, bidirectional overrides and isolates, line separators, lone surrogates (bytes that are not UTF-8).
_CONTROL = "\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_UNSAFE = re.compile(f"[{_CONTROL}]")
_UNSAFE_OR_BREAK = re.compile(f"[{_CONTROL}\t\n]")


def visible(text: str) -> str:
    """The text with control characters as escapes (`\\x1b`); line breaks and tabs stay."""
    return _UNSAFE.sub(_escape, text)


def one_line(text: str, limit: int | None = None) -> str:
    """The text with control characters, line breaks and tabs as escapes, cut with `...` to `limit` characters."""
    if limit is not None and len(text) > limit:
        text = text[: limit - 3] + "..."
    return _UNSAFE_OR_BREAK.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    char = match[0]
    if char in "\n\t\r":
        return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}[char]
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape: the byte itself
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def read_stdin() -> str:
    """All of stdin, line endings as they are; bytes that are not UTF-8 stay as the surrogates that tokenizers take."""
    return sys.stdin.buffer.read().decode("utf-8", "surrogateescape")


def read_text_file(path: Path) -> str:
    """A whole file, as `read_stdin` reads. Raises RealmError, naming the file, where it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise RealmError(f"{path}: cannot be read: {error.strerror or error}") from None
