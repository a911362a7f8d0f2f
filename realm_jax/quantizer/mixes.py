"""Which tensor gets which format: llama.cpp's mixes (Q4_K_M, ...), uniform formats, and rules of one's own.

A *mix* is a file type of llama.cpp and gives every tensor what `llama-quantize` would give it. The source of every
choice here is llama.cpp's src/llama-quant.cpp (`llama_tensor_get_type_impl`, `tensor_allows_quantization`,
`tensor_type_fallback`); `tests/golden/mixes.json` holds what llama.cpp itself chose. Pure Python; `files` and `models`
call `plan_formats`.
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from realm_jax.errors import RealmError
from realm_jax.gguf.types import TYPE_BY_NAME, shown
from realm_jax.quantizer.mix_rules import CATEGORIES, Sizes, Tensor, mixed_format

COPY = "COPY"  # in the place of a format: leave a tensor as it is
DENSE = ("F32", "F16", "BF16")


class FileType(NamedTuple):
    """A file type of llama.cpp: its number in `general.file_type`, and the format that most tensors get."""

    id: int
    format: str


FILE_TYPES = {
    "F32": FileType(0, "F32"),
    "F16": FileType(1, "F16"),
    "BF16": FileType(32, "BF16"),
    "Q4_0": FileType(2, "Q4_0"),
    "Q4_1": FileType(3, "Q4_1"),
    "Q5_0": FileType(8, "Q5_0"),
    "Q5_1": FileType(9, "Q5_1"),
    "Q8_0": FileType(7, "Q8_0"),
    "Q2_K": FileType(10, "Q2_K"),
    "Q2_K_S": FileType(21, "Q2_K"),
    "Q3_K_S": FileType(11, "Q3_K"),
    "Q3_K_M": FileType(12, "Q3_K"),
    "Q3_K_L": FileType(13, "Q3_K"),
    "Q4_K_S": FileType(14, "Q4_K"),
    "Q4_K_M": FileType(15, "Q4_K"),
    "Q5_K_S": FileType(16, "Q5_K"),
    "Q5_K_M": FileType(17, "Q5_K"),
    "Q6_K": FileType(18, "Q6_K"),
    "IQ1_S": FileType(24, "IQ1_S"),
    "IQ1_M": FileType(31, "IQ1_M"),
    "IQ2_XXS": FileType(19, "IQ2_XXS"),
    "IQ2_XS": FileType(20, "IQ2_XS"),
    "IQ2_S": FileType(28, "IQ2_XS"),
    "IQ2_M": FileType(29, "IQ2_S"),
    "IQ3_XXS": FileType(23, "IQ3_XXS"),
    "IQ3_XS": FileType(22, "IQ3_S"),
    "IQ3_S": FileType(26, "IQ3_S"),
    "IQ3_M": FileType(27, "IQ3_S"),
    "IQ4_NL": FileType(25, "IQ4_NL"),
    "IQ4_XS": FileType(30, "IQ4_XS"),
    "TQ1_0": FileType(36, "TQ1_0"),
    "TQ2_0": FileType(37, "TQ2_0"),
}
# Formats that are no file type of their own; llama-quantize takes the first three as other names of the _M mixes.
UNIFORM_IDS = {"Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "MXFP4": 38, "NVFP4": 39}
UNIFORM = (*UNIFORM_IDS, "Q8_1", "Q8_K")

# What takes the place of a format whose blocks do not divide the rows; where that does not fit either, F16.
FALLBACKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    **{"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
    **{name: name for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "IQ4_NL", "MXFP4")},
}
WANT_IMATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")  # llama.cpp refuses to go without

# A name with one of these in it stays as it is: small tensors, routers, tables of positions, codebooks.
NEVER = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    *(
        f"time_mix_{part}.weight"
        for part in ("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")
    ),
    *(f"time_mix_{part}.weight" for part in ("decay_w1", "decay_w2", "lerp_fused")),
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
)
NEVER_NAMES = ("position_embd.weight", "token_types.weight")
NEVER_IN = {
    "glm5-next": (
        *("hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate"),
        *("indexer_compressor_ape", "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight"),
        *("ssm_beta.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight"),
    )
}


class Choice(NamedTuple):
    """The format that a tensor gets. instead_of: what it would have got if its rows were whole blocks of that."""

    format: str
    instead_of: str | None = None


Rules = Sequence[tuple[str, str]]  # (pattern, format): the first pattern that fits a name wins
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> (format, row-major shape)


def format_names() -> list[str]:
    """Every name that may stand for a file as a whole: mixes, then formats that are only uniform, then COPY."""
    return [*FILE_TYPES, *UNIFORM, COPY]


def resolve_name(name: str) -> str:
    """The name as it stands in `format_names()`, whatever its case. RealmError for any other."""
    if name.upper() in format_names():
        return name.upper()
    raise RealmError(
        f"{shown(name)} is not a format that a file can be quantized to; mixes: {', '.join(FILE_TYPES)}; "
        f"one format for all matrices: {', '.join(UNIFORM)}; as it is: {COPY}"
    )


def file_type_id(name: str) -> int | None:
    """The number that llama.cpp gives to a file of that (resolved) name; None where it has none."""
    return FILE_TYPES[name].id if name in FILE_TYPES else UNIFORM_IDS.get(name)


def choose_formats(
    name: str,
    metadata: Mapping[str, Any],
    tensors: Tensors,
    *,
    keep: Rules = (),
    has_imatrix: bool = False,
    pure: bool = False,
) -> dict[str, str]:
    """Tensor name -> format, in the order of `tensors`, for a file quantized to the mix or format `name`.

    metadata: of the file, plain values; architecture, head counts, experts and layers matter. keep: rules of one's
    own, for tensors that may be quantized at all. has_imatrix: some mixes choose otherwise with an importance matrix.
    pure: one format for all matrices in place of a mix. Raises RealmError for an unknown name, for a rule that fits
    no tensor, and for rows that neither a format nor a substitute fits.
    """
    plan = plan_formats(name, metadata, tensors, keep=keep, has_imatrix=has_imatrix, pure=pure)
    return {tensor: choice.format for tensor, choice in plan.items()}


def plan_formats(
    name: str,
    metadata: Mapping[str, Any],
    tensors: Tensors,
    *,
    keep: Rules = (),
    has_imatrix: bool = False,
    pure: bool = False,
) -> dict[str, Choice]:
    """As `choose_formats`, but also says where a format gave way to another because of the rows."""
    name = resolve_name(name)
    keep = [(pattern, _resolve_kept(pattern, format)) for pattern, format in keep]
    default = FILE_TYPES[name].format if name in FILE_TYPES else name
    by_mix = name in FILE_TYPES and default not in DENSE and not pure
    sizes = Sizes.of(metadata, list(tensors), has_imatrix) if by_mix else None
    architecture = str(metadata.get("general.architecture", ""))
    counts = dict.fromkeys(CATEGORIES, 0)
    plan, unused = {}, dict.fromkeys(range(len(keep)))
    for tensor in sorted(tensors, key=_layer_order):
        current, shape = tensors[tensor]
        if not may_quantize(tensor, shape, architecture):
            plan[tensor] = Choice(current)
            continue
        rule = next((i for i, (pattern, _) in enumerate(keep) if fnmatchcase(tensor, pattern)), None)
        if rule is not None:
            unused.pop(rule, None)
            wanted = keep[rule][1]
        elif sizes is not None:
            wanted = mixed_format(name, default, Tensor(tensor, shape), sizes, counts)
        else:
            wanted = default
        plan[tensor] = Choice(current) if wanted == COPY else _fitting(tensor, wanted, shape)
    if unused:
        _refuse_unused(keep, next(iter(unused)), tensors, plan)
    return {tensor: plan[tensor] for tensor in tensors}


def wants_imatrix(file_type: str, tensor: str, format: str) -> bool:
    """Whether llama.cpp would refuse to quantize this tensor without importance."""
    if tensor in ("token_embd.weight", "per_layer_token_embd.weight", "output.weight"):
        return False
    return format in WANT_IMATRIX or (format == "Q2_K" and file_type == "Q2_K_S")


def may_quantize(name: str, shape: tuple[int, ...], architecture: str = "") -> bool:
    """Whether llama.cpp would quantize a tensor of that name and shape: weights of two dimensions, with exceptions."""
    dimensions = next((len(shape) - i for i, size in enumerate(shape) if size > 1), 1)
    never = (*NEVER, *NEVER_IN.get(architecture, ()))
    return (
        dimensions >= 2
        and name.endswith("weight")
        and name not in NEVER_NAMES
        and not any(part in name for part in never)
    )


def _layer_order(name: str) -> tuple[int, bytes]:
    """llama.cpp goes through the tensors in this order, and some choices count those before."""
    layer = re.match(r"blk\.(\d+)\.", name)
    return (int(layer[1]) if layer else -1, name.encode("utf-8", "surrogateescape"))


def _resolve_kept(pattern: str, format: str) -> str:
    name = format.upper()
    if name == COPY or name in DENSE or name in FALLBACKS or name in UNIFORM:
        return name
    known = [*DENSE, *(n for n in TYPE_BY_NAME if n in FALLBACKS or n in UNIFORM), COPY]
    mix = f" ({name} is a mix: give a format)" if name in FILE_TYPES else ""
    raise RealmError(f"{shown(format)} is not a format for tensors {shown(pattern)}{mix}; formats: {', '.join(known)}")


def _fitting(tensor: str, wanted: str, shape: tuple[int, ...]) -> Choice:
    """`wanted`, or what takes its place where its blocks do not divide the rows."""
    width = shape[-1]
    if width % TYPE_BY_NAME[wanted].block_size == 0:
        return Choice(wanted)
    if wanted not in FALLBACKS:
        raise RealmError(
            f"tensor {shown(tensor)} has rows of {width:,} weights, which blocks of {wanted} "
            f"({TYPE_BY_NAME[wanted].block_size}) do not divide, and {wanted} has no substitute: give the tensor "
            "another format"
        )
    other = FALLBACKS[wanted]
    return Choice(other if width % TYPE_BY_NAME[other].block_size == 0 else "F16", instead_of=wanted)


def _refuse_unused(keep: Rules, index: int, tensors: Tensors, plan: Mapping[str, Choice]) -> None:
    """A rule that changed nothing is a slip of the pen; says whether it fits nothing, or comes too late."""
    pattern, format = keep[index]
    fitting = [name for name in tensors if fnmatchcase(name, pattern)]
    if not fitting:
        reason = "no tensor has such a name"
    elif any(fnmatchcase(fitting[0], earlier) for earlier, _ in keep[:index]):
        reason = "rules before it take all the tensors that it fits"
    else:
        reason = f"{shown(fitting[0])} and the like are never quantized (vectors, norms, routers, ...)"
    raise RealmError(f"the rule {shown(f'{pattern}={format}')} changes nothing: {reason}")
