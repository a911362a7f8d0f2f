"""Finding special tokens in plain text before the tokenizer proper sees it. Called by `tokenizer.py`."""

from collections.abc import Sequence

from realm_jax.gguf.special_tokens import Attribute
from realm_jax.gguf.vocabulary import Vocabulary

_SPACES = b" \t\n\v\f\r"


class SpecialTokens:
    """The tokens that are matched as whole texts: control and unknown ones on request, user-defined ones always."""

    def __init__(self, vocabulary: Vocabulary):
        wanted = Attribute.CONTROL | Attribute.USER_DEFINED | Attribute.UNKNOWN
        hidden = Attribute.CONTROL | Attribute.UNKNOWN
        found = []
        for id, attributes in enumerate(vocabulary.attributes):
            if attributes & wanted:
                text = vocabulary.tokens[id].encode("utf-8", "surrogateescape")
                found.append((id, text, attributes))
        found.sort(key=lambda item: len(item[1]), reverse=True)
        self._all = found
        self._always = [item for item in found if not item[2] & hidden]

    def partition(self, data: bytes, parse_special: bool) -> list[int | bytes]:
        """Cut a text into token ids and the stretches of text between them.

        The longest tokens (in bytes) are looked for first, the lowest id first among equals, each from left to
        right. parse_special: control and unknown tokens count too. (llama.cpp leaves the order of equals to the
        sorting routine of its C++ library. It matters only where two tokens of one length overlap in a text, or
        where one swallows the white space that the other is made of.)
        """
        pieces: list[int | bytes] = [data] if data else []
        for id, text, attributes in self._all if parse_special else self._always:
            if text in data:
                pieces = _cut_out(pieces, id, text, attributes)
        return pieces


def _cut_out(pieces: Sequence[int | bytes], id: int, text: bytes, attributes: int) -> list[int | bytes]:
    output: list[int | bytes] = []
    for piece in pieces:
        if isinstance(piece, int) or text not in piece:
            output.append(piece)
            continue
        *heads, rest = _split(piece, text, bool(attributes & Attribute.RSTRIP))
        for head in heads:
            head = head.rstrip(_SPACES) if attributes & Attribute.LSTRIP else head
            output += [head, id] if head else [id]
        if rest:
            output.append(rest)
    return output


def _split(piece: bytes, text: bytes, strip_after: bool) -> list[bytes]:
    """The stretches between occurrences of `text`; white space after each goes first where that is asked."""
    if not strip_after:
        return piece.split(text)
    parts = []
    while True:
        head, found, piece = piece.partition(text)
        parts.append(head)
        if not found:
            return parts
        piece = piece.lstrip(_SPACES)
