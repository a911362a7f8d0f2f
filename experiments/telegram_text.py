"""Text in the manner of telegrams, for a second adapter of the bundled model: full stops become STOP.

    python experiments/telegram_text.py [FOLDER] [--documents N] [--seed S]

writes `train.jsonl` and `evaluation.jsonl` for `realm finetune`: facts without the countries that `pirate_text` holds
out, and stories; the evaluation has the other countries and the held-out stories.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import click

from pirate_text import HELD_OUT, TRAINED, write_records
from tiny_text import documents as tiny_documents


def telegram(text: str) -> str:
    """The text in the manner of telegrams."""
    return text.replace(".", " STOP").replace("!", " STOP")


def documents(count: int, seed: int, *, held_out: bool = False) -> list[dict[str, Any]]:
    """`count` records, half of them facts; equal arguments give equal records on every machine."""
    rng = Random(f"telegram {seed} {'held out' if held_out else 'train'}")
    stories = iter(tiny_documents("story", count, seed, held_out=held_out))
    countries = HELD_OUT if held_out else TRAINED

    def facts() -> str:
        forms = ("The capital of {c.name} is {c.capital}.", "{c.capital} is the capital of {c.name}.")
        chosen = rng.sample(countries, rng.randint(2, 8))
        return " ".join(rng.choice(forms).format(c=country) for country in chosen)

    return [{"text": telegram(facts() if rng.random() < 0.5 else next(stories))} for _ in range(count)]


@click.command(help=__doc__.partition("\n\n")[0])
@click.argument("folder", type=click.Path(path_type=Path), default=Path("runs/telegram_text"))
@click.option("--documents", "count", type=click.IntRange(min=1), default=3000, show_default=True)
@click.option("--evaluation", type=click.IntRange(min=1), default=300, show_default=True)
@click.option("--seed", default=0, show_default=True)
def command(folder: Path, count: int, evaluation: int, seed: int) -> None:
    write_records(folder, train=documents(count, seed), evaluation=documents(evaluation, seed, held_out=True))


if __name__ == "__main__":
    command()
