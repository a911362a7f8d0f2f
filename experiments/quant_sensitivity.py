"""Which tensors suffer from quantization, how well that can be told without trying, and what the knowledge buys.

    python experiments/quant_sensitivity.py [CONFIG] [--set subject.model=model-f16.gguf ...] [--name NAME]

First one tensor after the other goes to a low format, all else float: the KL divergence on held-out text says what each
costs. Then gradients on the calibration text estimate the same, for all tensors and formats at once (see `fisher.py`).
Then the estimates choose a format for every tensor, within the size of a model in one format or of llama.cpp's mix.
metrics.jsonl has lines of kind "swap", "estimate" and "mix"; results.md has the tables; three plots lie beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

import sensitivity_report
from fisher import Fisher, sample_fisher
from quant_setup import (
    Subject,
    SubjectConfig,
    TextConfig,
    as_float32,
    known_formats,
    make_subject,
    metrics_of,
    mixed_formats,
    pure_formats,
    replace_weights,
    score_model,
    size_of,
    with_error,
)
from realm_jax.errors import RealmError
from realm_jax.experiment import Run, experiment_command, read_json
from realm_jax.model import Model
from realm_jax.model.params import get_weight
from realm_jax.quant import METHODS, raw_bytes
from realm_jax.quantizer import quantize_model
from realm_jax.quantizer.mixes import FILE_TYPES
from size_budget import choose_within


@dataclass(frozen=True)
class QuantSensitivityConfig:
    """swap_formats: measured one tensor at a time, some of `formats`. formats: what a mix chooses from. mixes:
    llama.cpp's, to compare with. budgets: some of `formats`, or of `mixes`; a mix is chosen within the size of each.
    method, imatrix: of encoding. draws: random directions a calibration chunk. batch: chunks scored at once.
    """

    subject: SubjectConfig
    text: TextConfig
    swap_formats: tuple[str, ...]
    formats: tuple[str, ...]
    budgets: tuple[str, ...]
    mixes: tuple[str, ...] = ()
    method: str = "refine"
    imatrix: bool = True
    draws: int = 4
    batch: int | None = None

    def __post_init__(self):
        known = {
            "formats": known_formats(),
            "swap_formats": self.formats,
            "mixes": tuple(FILE_TYPES),
            "budgets": (*self.formats, *self.mixes),
        }
        for key, allowed in known.items():
            for name in getattr(self, key):
                if name not in allowed:
                    raise RealmError(f"{key}: {name!r} is none; known here: {', '.join(allowed)}")
        if self.method not in METHODS:
            raise RealmError(f"method: {self.method!r} is none; known: {', '.join(METHODS)}")
        if self.draws < 1:
            raise RealmError(f"draws is {self.draws}; want at least 1")


@dataclass(frozen=True)
class Candidates:
    """Every matrix in every format that a mix may choose. uniform: format -> the model with all matrices in it.

    sizes: tensor -> bytes in each format, in the order of `uniform`.
    """

    subject: Subject
    uniform: dict[str, Model]
    sizes: dict[str, list[int]]

    @classmethod
    def make(cls, subject: Subject, config: QuantSensitivityConfig) -> Candidates:
        uniform = {}
        for format in config.formats:
            formats = pure_formats(subject.reference, format)
            imatrix = subject.imatrix if config.imatrix else None
            uniform[format] = quantize_model(subject.reference, formats, imatrix=imatrix, method=config.method)
        sizes = {name: [bytes_at(model, path) for model in uniform.values()] for name, path in subject.matrices.items()}
        return cls(subject, uniform, sizes)

    def changes(self) -> dict[str, np.ndarray]:
        """Tensor -> what each format changes in it, float32 (formats, *shape)."""
        changes = {}
        for name, path in self.subject.matrices.items():
            weight = get_weight(self.subject.reference.params, path)
            changed = [as_float32(get_weight(model.params, path)) for model in self.uniform.values()]
            changes[name] = np.stack([np.asarray(other - weight) for other in changed])
        return changes

    def model(self, choice: Mapping[str, str]) -> Model:
        """The float model with some tensors in the formats chosen for them."""
        paths, reference = self.subject.matrices, self.subject.reference
        weights = {paths[name]: get_weight(self.uniform[format].params, paths[name]) for name, format in choice.items()}
        return reference.replace(params=replace_weights(reference.params, reference.config, weights))


class Mix(NamedTuple):
    """A format for every matrix. by: "uniform", "llama.cpp", or the estimate that chose it.

    name: of the format or mix, or of the one whose size it must keep to. model: the result.
    """

    by: str
    name: str
    choice: dict[str, str]
    model: Model


def main(config: QuantSensitivityConfig, run: Run) -> None:
    """Measure which tensors suffer, estimate it from gradients, and choose formats by the estimates."""
    console = Console(stderr=True)
    run.keep_metrics(lambda line: False)  # a resumed run starts again: it takes minutes
    subject = make_subject(config.subject, config.text)
    console.print(f"{subject.about}; run directory: {run.folder}")
    candidates = Candidates.make(subject, config)
    measure_swaps(config, run, candidates, console)
    fisher = estimate(config, run, candidates)
    others = list(rivals(config, candidates))
    for mix in (*others, *chosen(config, candidates, fisher, others)):
        line = measure_mix(candidates, fisher, mix, config.batch)
        run.log(**line)
        kl = with_error(line["kl"], line["kl_chunk_error"])
        console.print(f"{mix.by} {mix.name}: {line['bits_per_weight']:.3f} bits, {kl}", highlight=False)
    environment = read_json(run.folder / "environment.json")
    run.save_text("results.md", sensitivity_report.results(subject.about, run.metrics(), environment))
    sensitivity_report.plot_heat_map(run.folder / "sensitivity.png", run.metrics())
    sensitivity_report.plot_estimates(run.folder / "estimates.png", run.metrics())
    sensitivity_report.plot_mixes(run.folder / "mixes.png", run.metrics())


def measure_swaps(config: QuantSensitivityConfig, run: Run, candidates: Candidates, console: Console) -> None:
    """One tensor at a time in a low format: a line of kind "swap" for each."""
    for format in config.swap_formats:
        for name in candidates.subject.matrices:
            scores = score_model(candidates.subject, candidates.model({name: format}), config.batch)
            line = metrics_of(scores)
            run.log(kind="swap", tensor=name, format=format, **line)
            console.print(f"{name} {format}: {with_error(line['kl'], line['kl_chunk_error'])}", highlight=False)


def estimate(config: QuantSensitivityConfig, run: Run, candidates: Candidates) -> Fisher:
    """What gradients say about every tensor and format: a line of kind "estimate" for each."""
    changes, subject = candidates.changes(), candidates.subject
    fisher = sample_fisher(
        subject.reference, subject.calibration_NT, changes, draws=config.draws, seed=config.text.seed
    )
    for name, path in subject.matrices.items():
        weight = np.asarray(get_weight(subject.reference.params, path))
        diagonal, directional = fisher.diagonal_kl(name), fisher.directional_kl(name)
        for i, format in enumerate(candidates.uniform):
            run.log(
                kind="estimate",
                tensor=name,
                format=format,
                bytes=candidates.sizes[name][i],
                squared=np.square(changes[name][i]).sum() / np.square(weight).sum(),
                diagonal=diagonal[i],
                directional=directional[i].mean,
                directional_error=directional[i].error,
            )
    return fisher


def rivals(config: QuantSensitivityConfig, candidates: Candidates) -> Iterator[Mix]:
    """Models in one format, and llama.cpp's mixes."""
    subject = candidates.subject
    for format, model in candidates.uniform.items():
        yield Mix("uniform", format, dict.fromkeys(subject.matrices, format), model)
    imatrix = subject.imatrix if config.imatrix else None
    for name in config.mixes:
        formats = mixed_formats(subject.reference, name, has_imatrix=config.imatrix)
        model = quantize_model(subject.reference, formats, imatrix=imatrix, method=config.method)
        yield Mix("llama.cpp", name, {tensor: formats[tensor] for tensor in subject.matrices}, model)


def chosen(config: QuantSensitivityConfig, candidates: Candidates, fisher: Fisher, others: list[Mix]) -> Iterator[Mix]:
    """For each budget and estimate the mix that should diverge least, if the tensors' divergences just add up."""
    matrices, formats = candidates.subject.matrices, list(candidates.uniform)
    costs = {
        "diagonal": {name: fisher.diagonal_kl(name) for name in matrices},
        "directional": {name: [one.mean for one in fisher.directional_kl(name)] for name in matrices},
    }
    for budget in config.budgets:
        rival = next(mix for mix in others if mix.name == budget)
        size = sum(bytes_at(rival.model, path) for path in matrices.values())
        for by, cost in costs.items():
            picked = choose_within(size, candidates.sizes, cost)
            choice = {name: formats[index] for name, index in picked.items()}
            yield Mix(by, budget, choice, candidates.model(choice))


def measure_mix(candidates: Candidates, fisher: Fisher, mix: Mix, batch: int | None) -> dict[str, Any]:
    """A line of kind "mix". predicted: by the directional estimate for all tensors at once, where it can say."""
    scores = score_model(candidates.subject, mix.model, batch)
    line = {"kind": "mix", "by": mix.by, "name": mix.name, "formats": mix.choice, **size_of(mix.model)}
    line |= metrics_of(scores) | {"kl_chunks": scores.kl.mean(axis=1, dtype=np.float64)}
    formats = list(candidates.uniform)
    if set(mix.choice.values()) <= set(formats):  # llama.cpp's mixes may use others
        joint = fisher.joint_kl({name: formats.index(format) for name, format in mix.choice.items()})
        line |= {"predicted": joint.mean, "predicted_error": joint.error}
    return line


def bytes_at(model: Model, path: tuple[str | int, ...]) -> int:
    return raw_bytes(get_weight(model.params, path))[1].nbytes


command = experiment_command(
    main, QuantSensitivityConfig, Path(__file__).parents[1] / "configs" / "quant_sensitivity.toml"
)

if __name__ == "__main__":
    command()
