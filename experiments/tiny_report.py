"""What the bundled models can do, measured on the exported files, and the results section of their card.

`train_tiny.py` calls `write_report` at its end. To make a run's models the ones that ship:

    python experiments/tiny_report.py runs/NAME
"""

from __future__ import annotations

import functools
import shutil
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import click
import jax
import jax.numpy as jnp
import optax
from rich.console import Console

from realm_jax.decode.generate import generate
from realm_jax.errors import RealmError
from realm_jax.experiment import Run, read_json
from realm_jax.model import Config, Model, Params, load, unembed
from realm_jax.model import run as run_model
from realm_jax.quant import QuantizedTensor, raw_bytes
from tiny_corpus import Corpus
from tiny_text import COUNTRIES, equation, list_task

_EQUATIONS = _LISTS = 200
_ROWS_A_BATCH = 16
_SAMPLES = (  # prompt, temperature
    ("The capital of France is", 0.0),
    ("Question: Which country has Nairobi as its capital? Answer:", 0.0),
    ("17 + 25 =", 0.0),
    ("Backwards: K A R Q E ->", 0.0),
    ("Monday, Tuesday,", 0.0),
    ("One morning, Lucy", 0.0),
    ("One morning, Lucy", 1.0),
    ("Once upon a time, there lived", 1.0),
    ("<|im_start|>user\nWhat is the capital of Japan?<|im_end|>\n<|im_start|>assistant\n", 0.0),
)
BEGIN, END = "<!-- results: written by experiments/tiny_report.py -->", "<!-- end of results -->"


def write_report(run: Run, corpus: Corpus, files: dict[str, str], console: Console) -> None:
    """Measures the exported files (role -> name in the run's folder): results.json and card.md in that folder."""
    held_out_RT = jnp.asarray(corpus.held_out_RT)
    results: dict[str, Any] = {"environment": read_json(run.folder / "environment.json"), "models": {}}
    choices = {}
    for role, file in files.items():
        model = load(run.folder / file)
        held_out_loss, choices[role] = score(model.params, model.config, held_out_RT)
        results["models"][role] = {
            "file": file,
            "bytes": (run.folder / file).stat().st_size,
            "parameters": sum(weight.size for weight in _weights(model.params)),
            "formats": Counter(raw_bytes(weight)[0] for weight in _weights(model.params)),
            "training": _training_summary(run, role, corpus),
            "held_out_loss_exported": float(held_out_loss),
            "capitals_right": f"{_count_capitals(model)} of {len(COUNTRIES)}",
            "equations_right": f"{_count_equations(model)} of {_EQUATIONS}",
            "lists_right": f"{_count_lists(model)} of {_LISTS}",
            "samples": [_sample(model, *sample) for sample in _SAMPLES],
        }
    results["draft_agreement"] = float((choices["target"] == choices["draft"]).mean())
    run.save_json("results.json", results)
    card = card_section(results)
    (run.folder / "card.md").write_text(card, encoding="utf-8")
    console.print(card, markup=False, highlight=False)


@functools.partial(jax.jit, static_argnames="config")
def score(params: Params, config: Config, rows_RT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean loss (nats a token) of rows (R, T + 1), and the likeliest token at each place (R', T).

    Rows that do not fill a batch are left out.
    """
    batch = min(_ROWS_A_BATCH, len(rows_RT))
    count = len(rows_RT) // batch

    def one(rows_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden_BTD, _ = run_model(params, config, rows_BT[:, :-1])
        logits_BTV = unembed(params, config, hidden_BTD)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, rows_BT[:, 1:])
        return losses.mean(), logits_BTV.argmax(-1)

    losses, choices = jax.lax.map(one, rows_RT[: count * batch].reshape(count, batch, -1))
    return losses.mean(), choices.reshape(count * batch, -1)


def _weights(params: Params) -> list[Any]:
    return jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, QuantizedTensor))


def _training_summary(run: Run, role: str, corpus: Corpus) -> dict[str, float]:
    lines = [line for line in run.metrics() if line["model"] == role]
    return {
        "steps": lines[-1]["step"],
        "seconds": sum(line["seconds"] for line in lines),
        "loss": sum(line["loss"] for line in lines[-10:]) / len(lines[-10:]),
        "held_out_loss": lines[-1]["held_out_loss"],
        "corpus_tokens": int(corpus.train_RT.size),
    }


def _count_capitals(model: Model) -> int:
    prompts = [f"The capital of {country.name} is" for country in COUNTRIES]
    answers = generate(model, prompts, max_new_tokens=12)
    pairs = zip(answers, COUNTRIES, strict=True)
    return sum(answer.text.startswith(f" {country.capital}.") for answer, country in pairs)


def _count_equations(model: Model) -> int:
    rng = Random("equations")
    equations = [equation(rng) for _ in range(_EQUATIONS)]
    answers = generate(model, [f"{left} {sign} {right} =" for left, sign, _, right, _ in equations], max_new_tokens=5)
    pairs = zip(answers, equations, strict=True)
    return sum(answer.text.split("\n")[0].strip() == str(numbers[-1]) for answer, numbers in pairs)


def _count_lists(model: Model) -> int:
    rng = Random("lists")
    tasks = [list_task(rng) for _ in range(_LISTS)]
    answers = generate(model, [prompt for prompt, _ in tasks], max_new_tokens=12)
    pairs = zip(answers, tasks, strict=True)
    return sum(answer.text.split("\n")[0].strip() == result for answer, (_, result) in pairs)


def _sample(model: Model, prompt: str, temperature: float) -> dict[str, Any]:
    (completion,) = generate(model, prompt, max_new_tokens=60, temperature=temperature, seed=0, parse_special=True)
    return {"prompt": prompt, "temperature": temperature, "text": completion.text, "stop": completion.stop_reason}


# --- the card ------------------------------------------------------------------------------------------------


def card_section(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    environment, models = results["environment"], results["models"]
    packages = ", ".join(f"{name} {environment['packages'][name]}" for name in ("jax", "flax", "optax"))
    rows = {
        "file": lambda m: f"`{m['file']}`, {m['bytes']:,} bytes",
        "parameters": lambda m: f"{m['parameters']:,}",
        "tensors by format": lambda m: ", ".join(f"{count} {name}" for name, count in sorted(m["formats"].items())),
        "training steps": lambda m: f"{m['training']['steps']:,}",
        "training time": lambda m: f"{m['training']['seconds']:.0f} s",
        "loss, training text (float32)": lambda m: f"{m['training']['loss']:.4f}",
        "loss, held-out stories (float32)": lambda m: f"{m['training']['held_out_loss']:.4f}",
        "loss, held-out stories (this file)": lambda m: f"{m['held_out_loss_exported']:.4f}",
        "capitals right, greedy": lambda m: m["capitals_right"],
        "equations right, greedy": lambda m: m["equations_right"],
        "lists right, greedy": lambda m: m["lists_right"],
    }
    lines = [
        f"Trained on: {', '.join(environment['devices'])} ({environment['backend']}); Python {environment['python']}, "
        f"{packages}. Command: `{_command_line(environment['command'])}`. Losses are nats a token.",
        "",
        _table_row("", models),
        _table_row("---", ["---"] * len(models)),
        *(_table_row(label, map(show, models.values())) for label, show in rows.items()),
        "",
        f"On held-out stories, draft and target agree on the likeliest next token at {results['draft_agreement']:.1%} "
        "of the places.",
    ]
    for role, model in models.items():
        lines += ["", f"Samples of the {role}, unselected (prompt → continuation):", ""]
        lines += [_sample_line(sample) for sample in model["samples"]]
    return "\n".join(lines) + "\n"


def _command_line(words: list[str]) -> str:
    """The command without what says only where the run was kept."""
    changes = [f"--set {value}" for flag, value in pairwise(words) if flag == "--set"]
    return " ".join(["python experiments/train_tiny.py", *changes])


def _table_row(label: str, cells: Iterable[str]) -> str:
    return f"| {label} | {' | '.join(cells)} |"


def _sample_line(sample: dict[str, Any]) -> str:
    prompt, text = (f"`{sample[key]!r}`" for key in ("prompt", "text"))
    return f"- temperature {sample['temperature']:g}: {prompt} → {text}"


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("assets", type=click.Path(path_type=Path), default=Path("realm_jax/assets"))
def install(run: Path, assets: Path) -> None:
    """Copy the models of RUN to ASSETS and write the results section of the card there."""
    try:
        install_models(run, assets)
    except RealmError as error:
        raise click.ClickException(str(error)) from error


def install_models(run: Path, assets: Path) -> None:
    """Raises RealmError where the run has no results yet, or the card no place for them."""
    results = read_json(run / "results.json")
    write_section(assets / "README.md", BEGIN, END, card_section(results))
    for model in results["models"].values():
        shutil.copyfile(run / model["file"], assets / model["file"])


def write_section(card: Path, begin: str, end: str, section: str) -> None:
    """Puts a section between the two marks of a Markdown file. RealmError where it does not have them."""
    before, found, rest = card.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise RealmError(f"{card}: has no results section; want a line {begin!r} and a line {end!r}")
    card.write_text(f"{before}{begin}\n\n{section}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    install()
