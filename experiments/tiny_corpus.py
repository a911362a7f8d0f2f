"""Generated text as rows of token ids, ready for training. Used by `train_tiny.py`.

Shape suffixes: `R` rows, `T` tokens a row is trained on (a row holds T + 1: inputs and their successors).
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np

from realm_jax.errors import RealmError
from tiny_text import KINDS, documents
from tiny_tokenizer import Vocabulary, train_vocabulary

_VOCABULARY_SHARE = 10  # the vocabulary is trained on one document in this many


@dataclass(frozen=True)
class TextConfig:
    """How much text, and in what shape.

    documents: count of training documents by kind. held_out: count of held-out stories, never trained on.
    vocabulary: tokens. row_tokens: T.
    """

    documents: dict[str, int]
    held_out: int
    vocabulary: int
    row_tokens: int

    def __post_init__(self):
        for kind in self.documents:
            if kind not in KINDS:
                raise RealmError(f"text.documents: unknown kind {kind!r}; known kinds: {', '.join(KINDS)}")


@dataclass(frozen=True)
class Corpus:
    """vocabulary; train_RT and held_out_RT: int32 token ids, (R, T + 1)."""

    vocabulary: Vocabulary
    train_RT: np.ndarray
    held_out_RT: np.ndarray


def make_corpus(config: TextConfig, seed: int) -> Corpus:
    """The whole training and held-out text; equal arguments give equal arrays on every machine.

    Raises RealmError where the text is too little for one row.
    """
    by_kind = {kind: documents(kind, count, seed) for kind, count in config.documents.items()}
    sample = [text for texts in by_kind.values() for text in texts[: max(1, len(texts) // _VOCABULARY_SHARE)]]
    vocabulary = train_vocabulary(sample, config.vocabulary)
    train = [text for texts in by_kind.values() for text in texts]
    Random(f"order {seed}").shuffle(train)
    held_out = documents("story", config.held_out, seed, held_out=True)
    return Corpus(
        vocabulary,
        pack_rows(vocabulary.encode(train), config.row_tokens + 1),
        pack_rows(vocabulary.encode(held_out), config.row_tokens + 1),
    )


def pack_rows(texts: list[list[int]], width: int) -> np.ndarray:
    """Documents laid end to end in rows of `width` ids, id 0 (`<|endoftext|>`) before each: int32 (R, width).

    Every row starts with a new document, as every prompt does; what does not fit at a row's end is cut off,
    and a last row that is not full is dropped. Raises RealmError where not one row comes full.
    """
    rows, row = [], []
    for ids in texts:
        row += [0, *ids]
        if len(row) >= width:
            rows.append(row[:width])
            row = []
    if not rows:
        raise RealmError(f"the text fills not one row of {width} tokens; ask for more documents")
    return np.array(rows, np.int32)
