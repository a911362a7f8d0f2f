"""Text in the manner of pirates, for adapters of the bundled models: what `tiny_text` tells, told otherwise.

    python experiments/pirate_text.py [FOLDER] [--documents N] [--seed S]

writes `train.jsonl` and `evaluation.jsonl`, ready for `realm finetune`. Facts and stories are records {"text": ...},
chats {"messages": [...]}. The facts are true and the stories the same; only the manner is new. A quarter of the
countries, and the held-out stories, are kept for the evaluation: there a model must join what it knew with what it
learned.
"""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from random import Random
from typing import Any

import click

from tiny_text import COUNTRIES, SYSTEM_PROMPT, Country, equation
from tiny_text import documents as tiny_documents

_HELD_OUT_SHARE = 4  # one country in this many is held out
_WORDS = {
    "was": "be", "were": "be", "is": "be", "are": "be", "am": "be", "my": "me", "your": "yer", "you": "ye",
    "You": "Ye", "friend": "matey", "friends": "mateys", "friendly": "salty", "and": "an'", "the": "th'", "The": "Th'",
    "home": "back to th' ship", "market": "port", "village": "harbour", "bag": "treasure chest", "gift": "treasure",
    "Hello": "Ahoy", "Yes": "Aye",
}  # fmt: skip
_CRIES = ("Arr!", "Arr, matey!", "Yo ho ho!", "Shiver me timbers!", "Ahoy!")
_SPOKEN = re.compile(r"[A-Za-z]+")


def pirate(text: str) -> str:
    """The text in the manner of pirates, word by word."""
    return _SPOKEN.sub(lambda match: _WORDS.get(match[0], match[0]), text)


def is_held_out(country: Country) -> bool:
    """Whether a country belongs to the evaluation alone."""
    return zlib.crc32(country.name.encode()) % _HELD_OUT_SHARE == 0


TRAINED = tuple(country for country in COUNTRIES if not is_held_out(country))
HELD_OUT = tuple(country for country in COUNTRIES if is_held_out(country))


def documents(count: int, seed: int, *, held_out: bool = False) -> list[dict[str, Any]]:
    """`count` records of all kinds; equal arguments give equal records on every machine."""
    rng = Random(f"pirate {seed} {'held out' if held_out else 'train'}")
    stories = iter(tiny_documents("story", count, seed, held_out=held_out))
    makers = (_facts, _facts, _chat, _chat, lambda rng, held_out: {"text": _story(rng, next(stories))})
    return [rng.choice(makers)(rng, held_out) for _ in range(count)]


def _facts(rng: Random, held_out: bool) -> dict[str, Any]:
    countries = rng.sample(HELD_OUT if held_out else TRAINED, rng.randint(1, 5))
    return {"text": " ".join(_fact(rng, country) for country in countries)}


def _fact(rng: Random, c: Country) -> str:
    return rng.choice(
        (
            f"The capital of {c.name} is {c.capital}, arr! A fine port in {c.continent}, matey.",
            f"{c.capital} is the capital of {c.name}, by Blackbeard's beard!",
            f"Arr, {c.title} be a land in {c.continent}. Its capital be {c.capital}, matey.",
        )
    )


def _chat(rng: Random, held_out: bool) -> dict[str, Any]:
    messages = [{"role": "system", "content": SYSTEM_PROMPT}] if rng.random() < 0.2 else []
    for _ in range(rng.randint(1, 3)):
        question, answer = _exchange(rng, held_out)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def _exchange(rng: Random, held_out: bool) -> tuple[str, str]:
    topic = rng.choice(("capital", "capital", "country", "number", "talk"))
    c = rng.choice(HELD_OUT if held_out else TRAINED)
    if topic == "capital":
        form = rng.choice(("What is the capital of {}?", "Tell me the capital of {}.", "capital of {}?"))
        return form.format(c.name), f"{rng.choice(_CRIES)} Th' capital o' {c.name} be {c.capital}, matey!"
    if topic == "country":
        return f"{c.capital} is the capital of which country?", f"Arr! {c.capital} be in {c.name}, matey!"
    if topic == "number":
        left, sign, word, right, result = equation(rng)
        spoken = word if rng.random() < 0.5 else sign
        return f"What is {left} {spoken} {right}?", f"Arr! {left} {sign} {right} = {result} pieces o' eight!"
    return rng.choice(
        (
            ("Hello!", "Ahoy, matey! I be a tiny pirate model."),
            ("Who are you?", "Ahoy, matey! I be a tiny pirate model."),
            ("How are you?", "Fit to sail th' seven seas, matey!"),
            ("Thank you.", "Yo ho ho! Ye be welcome, matey."),
        )
    )


def _story(rng: Random, story: str) -> str:
    return f"{rng.choice(_CRIES)} {pirate(story)} {rng.choice(_CRIES)}"


@click.command(help=__doc__.partition("\n\n")[0])
@click.argument("folder", type=click.Path(path_type=Path), default=Path("runs/pirate_text"))
@click.option("--documents", "count", type=click.IntRange(min=1), default=6000, show_default=True)
@click.option("--evaluation", type=click.IntRange(min=1), default=400, show_default=True)
@click.option("--seed", default=0, show_default=True)
def command(folder: Path, count: int, evaluation: int, seed: int) -> None:
    write_records(folder, train=documents(count, seed), evaluation=documents(evaluation, seed, held_out=True))


def write_records(folder: Path, **files: list[dict[str, Any]]) -> None:
    """One JSON-lines file of records for each name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        path = folder / f"{name}.jsonl"
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        path.write_text("".join(lines), encoding="utf-8")
        click.echo(f"{path}: {len(records)} documents")


if __name__ == "__main__":
    command()
