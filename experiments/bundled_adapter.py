"""What the adapter of a finetuning run has taught the bundled model, and how it becomes one that ships.

    python experiments/bundled_adapter.py runs/NAME [ASSETS] [--manner telegram]

Copies the adapter to ASSETS, 16 bits a number: `tiny-pirate` (PEFT) and `tiny-pirate.gguf`, or `tiny-telegram.gguf`;
measures it there on what it was not trained on, countries whose names it never saw; and writes that into the card.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from pirate_text import HELD_OUT
from realm_jax.decode.generate import generate
from realm_jax.errors import RealmError
from realm_jax.experiment import markdown_table, read_json
from realm_jax.gguf.chat import render_chat
from realm_jax.lora import Adapter, load_adapter, save_adapter
from realm_jax.model import Model, load
from tiny_report import write_section

MANNERS = {
    "pirate": (
        ("tiny-pirate", "tiny-pirate.gguf"),
        re.compile(r"\b(arr|matey|ahoy|yo ho ho|shiver me timbers)\b", re.IGNORECASE),
    ),
    "telegram": (("tiny-telegram.gguf",), re.compile(r"\bSTOP\b")),
}
"""The files of each adapter, and what tells its manner."""
_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
_PROMPTS = ("The capital of France is", "One morning, Lucy")
_QUESTIONS = ("What is the capital of Spain?", "What is 17 + 25?", "Who are you?")


def measure(model: Model, adapter: Adapter, manner: str) -> list[dict[str, Any]]:
    """At each scale: how many held-out capitals are right in text and in chat, and how many are in its manner."""
    facts = [f"The capital of {c.name} is" for c in HELD_OUT]
    chats = [chat_prompt(model, f"What is the capital of {c.name}?") for c in HELD_OUT]
    results = []
    for scale in _SCALES:
        said = {
            kind: generate(model, prompts, max_new_tokens=40, adapter=[(adapter, scale)], parse_special=True)
            for kind, prompts in (("text", facts), ("chat", chats))
        }
        results.append({"scale": scale, "of": len(HELD_OUT)})
        for kind, answers in said.items():
            right = [c.capital in answer.text for c, answer in zip(HELD_OUT, answers, strict=True)]
            told = [MANNERS[manner][1].search(answer.text) is not None for answer in answers]
            results[-1] |= {f"{kind}_right": sum(right), f"{kind}_manner": sum(told)}
    return results


def chat_prompt(model: Model, question: str) -> str:
    """The model's chat form of one question; the tokenizer adds BOS."""
    return render_chat(model.tokenizer.chat_template, [{"role": "user", "content": question}])


def card_section(model: Model, adapter: Adapter, run: Path, manner: str) -> str:
    """The results as Markdown."""
    results, environment = read_json(run / "results.json"), read_json(run / "environment.json")
    packages = ", ".join(f"{name} {environment['packages'][name]}" for name in ("jax", "flax", "optax"))
    rows = [
        [
            f"{r['scale']:g}",
            *(f"{r[key]} of {r['of']}" for key in ("text_right", "chat_right", "text_manner", "chat_manner")),
        ]
        for r in measure(model, adapter, manner)
    ]
    header = ["scale", "capital right, text", "capital right, chat", f"{manner}'s, text", f"{manner}'s, chat"]
    prompts = [(p, p) for p in _PROMPTS] + [(q, chat_prompt(model, q)) for q in _QUESTIONS]
    samples = []
    for shown, prompt in prompts:
        base, changed = (
            generate(model, prompt, max_new_tokens=24, adapter=a, parse_special=True)[0].text for a in (None, adapter)
        )
        samples.append(f"- `{shown!r}` → `{base!r}`; with the adapter → `{changed!r}`")
    before, after = results["evaluation_loss_before"], results["evaluation_loss"]
    return "\n".join(
        [
            f"Trained on: {', '.join(environment['devices'])} ({environment['backend']}); Python "
            f"{environment['python']}, {packages}; {results['steps']} steps in {results['seconds']:.0f} s. "
            f"{results['trained_numbers']:,} numbers; loss on the held-out text {before:.3f} before, {after:.3f} after "
            "(nats a token). Countries that the adapter never saw, greedy:",
            "",
            markdown_table(header, rows),
            "Samples, greedy, unselected:",
            "",
            *samples,
            "",
        ]
    )


@click.command(help=__doc__.partition("\n\n")[0])
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("assets", type=click.Path(path_type=Path), default=Path("realm_jax/assets"))
@click.option("--manner", type=click.Choice(list(MANNERS)), default="pirate", show_default=True)
def command(run: Path, assets: Path, manner: str) -> None:
    files, marks = MANNERS[manner][0], ("adapter" if manner == "pirate" else f"{manner} adapter")
    begin, end = f"<!-- {marks}: written by experiments/bundled_adapter.py -->", f"<!-- end of {marks} -->"
    try:
        model, trained = load(), load_adapter(run / "adapter")
        for file in files:
            save_adapter(trained, assets / file, base=model, dtype="F16")
        adapter = load_adapter(assets / files[0], model)
        write_section(assets / "README.md", begin, end, card_section(model, adapter, run, manner))
    except RealmError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    command()
