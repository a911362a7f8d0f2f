"""Records to rows: tokenized, with what is to be learned marked, cut where they are too long, set aside, laid out.

What is learned: of a text every token and the EOS behind it; of a prompt with completion the completion and the EOS; of
a chat what the assistant says, up to and with the token that ends its turn.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from realm_jax.errors import RealmError
from realm_jax.finetune.config import DataConfig
from realm_jax.finetune.records import Record, check_record, read_records
from realm_jax.finetune.rows import Example, make_rows
from realm_jax.finetune.train import Data
from realm_jax.gguf.chat import chat_text
from realm_jax.gguf.tokenizer import Tokenizer
from realm_jax.model.model import Model


def load_data(model: Model, config: DataConfig, seed: int = 0, folder: Path | None = None) -> Data:
    """The rows of a config's files. folder: where paths are looked for that the current directory does not have.

    Raises RealmError, one line with file and line, for files that cannot be read and records that cannot be learned.
    """
    paths = [find_path(path, folder) for path in (config.train, config.evaluation) if path]
    train, *evaluation = (read_records(path, config.format, config.separator) for path in paths)
    return _make_data(model, train, evaluation[0] if evaluation else None, config, seed)


def make_data(
    model: Model,
    train: Sequence[Mapping[str, Any]],
    evaluation: Sequence[Mapping[str, Any]] | None = None,
    *,
    row_tokens: int = 512,
    pack: bool = True,
    evaluation_share: float = 0.0,
    seed: int = 0,
) -> Data:
    """The same from records in memory, of the forms that a JSONL line may have (see `records`)."""
    config = DataConfig("", evaluation_share=evaluation_share, row_tokens=row_tokens, pack=pack)
    checked = [check_record(content, f"record {i}") for i, content in enumerate(train)]
    others = (
        None if evaluation is None else [check_record(c, f"evaluation record {i}") for i, c in enumerate(evaluation)]
    )
    return _make_data(model, checked, others, config, seed)


def find_path(path: str, folder: Path | None) -> Path:
    """A path from the current directory, or from `folder` where only that has it."""
    here = Path(path)
    return folder / path if folder is not None and not here.exists() and (folder / path).exists() else here


def _make_data(
    model: Model, train: Sequence[Record], evaluation: Sequence[Record] | None, config: DataConfig, seed: int
) -> Data:
    if config.row_tokens > model.config.context_length:
        raise RealmError(
            f"data.row_tokens is {config.row_tokens}; {model.origin.source} is made for a context of "
            f"{model.config.context_length} tokens: want at most that"
        )
    documents, notes = _documents(model, train, config.row_tokens, "training data")
    held_out = []
    if evaluation is not None:
        held_out, more = _documents(model, evaluation, config.row_tokens, "evaluation data")
        notes += more
    elif config.evaluation_share:
        documents, held_out = _set_aside(documents, config.evaluation_share, seed)
    rows, others = (
        make_rows([piece for pieces in group for piece in pieces], config.row_tokens, pack=config.pack)
        if group
        else None
        for group in (documents, held_out)
    )
    for name, group, made in (("train", documents, rows), ("evaluate", held_out, others)):
        if made is not None:
            full = made.count_R.sum() / made.tokens_RT.size
            notes.append(
                f"{name}: {len(group):,} documents, {made.count_R.sum():,} tokens ({made.learned_RT.sum():,} learned) "
                f"in {len(made):,} rows of {config.row_tokens}, {full:.0%} full"
            )
    if rows is None:
        raise RealmError("the training data leaves nothing to learn from in rows of this length")
    return Data(rows, others, tuple(notes))


def _documents(
    model: Model, records: Sequence[Record], row_tokens: int, name: str
) -> tuple[list[list[Example]], list[str]]:
    """The pieces of each document, none longer than a row, and what happened to those that were longer."""
    if model.tokenizer is None:
        raise RealmError(
            f"{model.origin.source}: has no tokenizer, so it cannot be trained on text: give another model"
        )
    documents, divided, cut, left_out = [], 0, 0, 0
    for record in records:
        try:
            example = encode_record(model.tokenizer, record)
        except RealmError as error:
            raise RealmError(f"{record.where}: {error}") from None
        size = len(example.tokens)
        starts = range(0, size - 1, row_tokens) if record.form == "text" else [0]
        pieces = [example.cut(start, start + row_tokens + 1) for start in starts]
        pieces = [piece for piece in pieces if any(piece.learned)]
        if pieces:
            documents.append(pieces)
        divided += len(pieces) > 1
        cut += bool(pieces) and record.form != "text" and size > row_tokens + 1
        left_out += not pieces
    notes = [
        f"{name}: {count:,} of {len(records):,} documents {what}"
        for count, what in (
            (divided, f"are longer than {row_tokens} tokens and were divided"),
            (cut, f"are longer than {row_tokens} tokens and were cut there"),
            (left_out, f"have nothing to learn in their first {row_tokens} tokens and were left out"),
        )
        if count
    ]
    return documents, notes


def _set_aside(
    documents: list[list[Example]], share: float, seed: int
) -> tuple[list[list[Example]], list[list[Example]]]:
    """Documents to train on and, chosen by the seed, that share of them to measure on; of a single one, its pieces."""
    if len(documents) == 1:
        documents = [[piece] for piece in documents[0]]
    if len(documents) < 2:
        raise RealmError(
            "the training data is one document that fits a row, of which no share can be set aside; give "
            "data.evaluation, a data.separator, or data.evaluation_share = 0"
        )
    count = min(len(documents) - 1, max(1, round(share * len(documents))))
    chosen = set(Random(f"evaluation {seed}").sample(range(len(documents)), count))
    return tuple([d for i, d in enumerate(documents) if (i in chosen) == wanted] for wanted in (False, True))


def encode_record(tokenizer: Tokenizer, record: Record) -> Example:
    """Token ids of a record, and which of them are to be learned. Raises RealmError: see `chat_text` and `encode`."""
    content = record.content
    if record.form == "messages":
        return _chat(tokenizer, content["messages"])
    if record.form == "text":
        ids = _with_eos(tokenizer, _ids(tokenizer, content["text"]))
        return Example(tuple(ids), (False, *[True] * (len(ids) - 1)))
    ids = _with_eos(tokenizer, _ids(tokenizer, content["prompt"] + content["completion"]))
    start = max(1, _common(_ids(tokenizer, content["prompt"]), ids))
    return Example(tuple(ids), tuple(i >= start for i in range(len(ids))))


def _chat(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> Example:
    """A conversation, up to the end of the assistant's last turn. The template must write on what it has written."""
    whole = chat_text(tokenizer, messages, add_generation_prompt=False)
    ids = _ids(tokenizer, whole, special=True)
    learned = [False] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = chat_text(tokenizer, messages[:i])
        after = chat_text(tokenizer, messages[: i + 1], add_generation_prompt=False)
        if not (whole.startswith(after) and after.startswith(before)):
            raise RealmError(
                f"the model's chat template renders the conversation up to message {i + 1} otherwise than within the "
                "whole, so that the answer cannot be told from the rest; give single turns, or prompt and completion"
            )
        start, stop = (_common(_ids(tokenizer, text, special=True), ids) for text in (before, after))
        for place in range(max(1, start), stop):
            learned[place] = True
            if ids[place] in tokenizer.eog_ids:
                break
    end = max((place + 1 for place, wanted in enumerate(learned) if wanted), default=0)
    return Example(tuple(ids[:end]), tuple(learned[:end]))


def _ids(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[int]:
    """Token ids with BOS by the file's rules, without EOS. special: text that looks like a special token is one."""
    ids = tokenizer.encode(text, parse_special=special)
    return ids[:-1] if tokenizer.add_eos else ids


def _with_eos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return ids if tokenizer.eos_id is None else [*ids, tokenizer.eos_id]


def _common(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two lists have in common at their beginning."""
    pairs = zip(ids, others, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(ids), len(others)))
