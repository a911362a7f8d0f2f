"""How a divergence from a reference model is shown: the rows of a table, and the keys of JSON."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from realm_jax.evaluate import Divergence


def divergence_json(divergence: "Divergence") -> dict[str, Any]:
    """The numbers of a divergence as flat JSON: reference_perplexity, log_ratio, kl_mean, ..., each with its error."""
    reference = divergence.reference
    result = {"reference_perplexity": reference.perplexity, "reference_perplexity_error": reference.error}
    for name in ("log_ratio", "kl", "top1_agreement"):
        estimate = getattr(divergence, name)
        key = "kl_mean" if name == "kl" else name
        result |= {key: estimate.mean, f"{key}_error": estimate.error}
    quantiles = ("kl_median", "kl_median_error", "kl_99", "kl_99_error", "kl_max")
    return result | {name: getattr(divergence, name) for name in quantiles}


def divergence_rows(divergence: "Divergence") -> list[tuple[str, str, str]]:
    """What is measured, its value and its standard error, for a person."""
    reference, ratio, kl, top = divergence.reference, divergence.log_ratio, divergence.kl, divergence.top1_agreement
    return [
        ("perplexity of the reference", f"{reference.perplexity:.4f}", f"{reference.error:.4f}"),
        ("ln(perplexity / reference)", f"{ratio.mean:.6f}", f"{ratio.error:.6f}"),
        ("KL divergence, mean (nats)", f"{kl.mean:.4g}", f"{kl.error:.4g}"),
        ("KL divergence, median", f"{divergence.kl_median:.4g}", f"{divergence.kl_median_error:.4g}"),
        ("KL divergence, 99%", f"{divergence.kl_99:.4g}", f"{divergence.kl_99_error:.4g}"),
        ("KL divergence, maximum", f"{divergence.kl_max:.4g}", ""),
        ("same token first", f"{top.mean:.3%}", f"{top.error:.3%}"),
    ]
