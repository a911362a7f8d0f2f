"""llama.cpp's choice for one tensor in a mix, transcribed: `llama_tensor_get_type_impl` of src/llama-quant.cpp.

Called by `mixes` for one tensor after another, in llama.cpp's order, because some choices count the tensors before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

from realm_jax.errors import RealmError
from realm_jax.gguf.types import TYPE_BY_NAME, shown

# category -> what stands in the name; the first that fits is the tensor's.
CATEGORIES = {
    "attn_qkv": "attn_qkv.weight",
    "attn_kv_b": "attn_kv_b.weight",
    "attn_v": "attn_v.weight",
    "attn_k": "attn_k.weight",
    "attn_q": "attn_q.weight",
    "attn_output": "attn_output.weight",
    "ffn_up": "ffn_up",
    "ffn_gate": "ffn_gate",
    "ffn_down": "ffn_down",
}
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
LIKE_ATTN_V = ("attn_v", "attn_qkv", "attn_kv_b")
SMALLEST = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")  # mixes with rules of their own
LAYERS_70B = {"llama": 80, "llama-embed": 80, "qwen2": 80, "olmo": 80, "deci": 80, "jais2": 68}


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """What the choices depend on beside the names.

    gqa: query heads for each kv head. experts: 0 for a dense model. layers: blocks of the model. tied: there is no
    output matrix but the embedding. attn_v: how many tensors count as values of attention. big: a "70B" model, with
    few kv heads among many. has_imatrix: an importance matrix is at hand.
    """

    architecture: str
    gqa: int
    experts: int
    layers: int
    tied: bool
    attn_v: int
    big: bool
    has_imatrix: bool

    @classmethod
    def of(cls, metadata: Mapping[str, Any], names: Sequence[str], has_imatrix: bool) -> "Sizes":
        """From the metadata of a file and the names of its tensors. Keys that are missing count as 0.

        Raises RealmError for a key that is no integer.
        """
        architecture = str(metadata.get("general.architecture", ""))

        def number(key: str, default: int = 0) -> int:
            value = metadata.get(f"{architecture}.{key}", default)
            if hasattr(value, "__len__") and not isinstance(value, str) and len(value):
                value = value[0]  # one a layer
            if not isinstance(value, Integral):
                raise RealmError(f"key '{architecture}.{key}' is {shown(repr(value))}: it must be an integer")
            return int(value)

        heads, layers, experts = (number(k) for k in ("attention.head_count", "block_count", "expert_count"))
        kv_heads = number("attention.head_count_kv", heads)
        grouped = not architecture.startswith("llama") or (kv_heads != heads and experts != 8)
        return cls(
            architecture=architecture,
            gqa=heads // kv_heads if kv_heads else 0,
            experts=experts,
            layers=layers,
            tied="output.weight" not in names,
            attn_v=sum(_category(name) in LIKE_ATTN_V for name in names),
            big=LAYERS_70B.get(architecture) == layers and grouped,
            has_imatrix=has_imatrix,
        )


def mixed_format(mix: str, default: str, tensor: Tensor, sizes: Sizes, counts: dict[str, int]) -> str:
    """The format of a tensor in a mix, before anything is said about whether its rows fit.

    default: what most tensors of the mix get. counts: tensors seen so far by category, counted up here.
    """
    name = tensor.name
    if sizes.architecture == "glm5-next" and any(part in name for part in ("attn_q_a", "attn_q_b", "nextn.eh_proj")):
        return "Q8_0"
    if name == "output.weight" or (sizes.tied and name in EMBEDDINGS):
        return _output(mix, default, tensor, sizes)
    if name in EMBEDDINGS:
        return _embedding(mix, default)
    category = _category(name)
    if category is None:
        return default
    if mix in SMALLEST:
        return _smallest(mix, default, category, sizes, counts)
    if category in LIKE_ATTN_V:
        counts["attn_v"] += 1
        return _attn_v(mix, default, counts["attn_v"] - 1, sizes)
    if category.startswith("ffn"):
        counts[category] += 1
        layer = _layer(name, counts[category] - 1, sizes)
        if category == "ffn_down":
            return _ffn_down(mix, default, layer, sizes)
        thin = mix == "IQ3_XS" and sizes.layers // 8 <= layer < 7 * sizes.layers // 8
        return "IQ3_XXS" if thin else default
    return _attention(mix, default, category, sizes)


def _category(name: str) -> str | None:
    if name == "output.weight" or name in EMBEDDINGS:
        return None
    return next((category for category, part in CATEGORIES.items() if part in name), None)


def _more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _layer(name: str, seen: int, sizes: Sizes) -> int:
    """The layer of a feed-forward tensor: the number seen before; where experts make several a layer, by name."""
    if sizes.experts <= 1:
        return seen
    number = name.removeprefix("blk.").partition(".")[0]
    if not name.startswith("blk.") or not number.isdigit() or int(number) >= sizes.layers:
        raise RealmError(
            f"tensor {shown(name)} is not in one of the {sizes.layers} layers: a mix needs to know its layer; "
            "use one format for all"
        )
    return int(number)


def _output(mix: str, default: str, tensor: Tensor, sizes: Sizes) -> str:
    if sizes.architecture == "falcon" or tensor.shape[-1] % TYPE_BY_NAME[default].block_size:
        return "Q8_0"
    if mix in (*SMALLEST, "IQ3_XXS"):
        return "Q5_K"
    return default if default == "Q8_0" else "Q6_K"


def _embedding(mix: str, default: str) -> str:
    if mix in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"):
        return "Q2_K"
    if mix in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
        return "IQ3_S"
    return "Q4_K" if mix in ("TQ1_0", "TQ2_0") else default


def _smallest(mix: str, default: str, category: str, sizes: Sizes, counts: dict[str, int]) -> str:
    richer = "IQ3_S" if mix in ("IQ2_S", "IQ2_M") else "Q2_K"
    if category in LIKE_ATTN_V:
        return "Q4_K" if sizes.gqa >= 4 or sizes.experts >= 4 else richer
    if category == "attn_k" and sizes.experts == 8:
        return "Q4_K"
    if category == "ffn_down":
        counts["ffn_down"] += 1
        return richer if counts["ffn_down"] <= sizes.layers // 8 else default
    if category == "attn_output":
        if sizes.experts == 8:
            return "Q5_K"
        return {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}.get(mix, default)
    return default


def _attn_v(mix: str, default: str, seen: int, sizes: Sizes) -> str:
    grouped = sizes.gqa >= 4
    chosen = default
    if mix == "Q2_K":
        chosen = "Q4_K" if grouped else "Q3_K"
    elif mix == "IQ3_XXS":
        chosen = "Q4_K" if grouped else "IQ3_XXS" if sizes.has_imatrix else "IQ3_S"
    elif mix == "IQ3_M" or (grouped and mix in ("Q2_K_S", "IQ3_XS", "IQ3_S")):
        chosen = "Q4_K"
    elif mix == "Q3_K_M":
        chosen = "Q5_K" if seen < 2 else "Q4_K"
    elif mix == "Q3_K_L" or (grouped and mix in ("IQ4_NL", "IQ4_XS")) or (mix == "Q4_K_S" and seen < 4):
        chosen = "Q5_K"
    elif mix in ("Q4_K_M", "Q5_K_M") and _more_bits(seen, sizes.attn_v):
        chosen = "Q6_K"
    if sizes.big and chosen in ("Q3_K", "Q4_K"):
        chosen = "Q5_K"
    return "Q8_0" if sizes.experts == 8 else chosen


def _ffn_down(mix: str, default: str, layer: int, sizes: Sizes) -> str:
    layers, falcon, early = sizes.layers, sizes.architecture == "falcon", layer < sizes.layers // 8
    more = _more_bits(layer, layers)
    if mix == "Q2_K":
        return "Q3_K"
    if mix == "IQ3_XXS" and not sizes.has_imatrix:
        return "Q4_K" if early else "Q3_K"
    if mix == "Q3_K_M":
        return "Q5_K" if layer < layers // 16 else "Q4_K" if more or not falcon else "Q3_K"
    if mix == "Q3_K_L":
        return "Q4_K" if falcon else "Q5_K"
    if mix == "Q4_K_M" and falcon:
        return "Q6_K" if layer < layers // 16 else "Q5_K" if more else "Q4_K"
    if mix in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if more else default
    if mix == "IQ3_M" and sizes.experts == 8 and more:
        return "Q4_K"
    if not early:
        return default
    if mix == "Q4_K_S":
        return default if falcon else "Q5_K"
    if mix in ("IQ4_NL", "IQ4_XS"):
        return default if sizes.has_imatrix else "Q5_K"
    if mix in ("Q4_0", "Q5_0"):  # with importance alone, the first layers can go astray
        return mix.replace("_0", "_1") if sizes.has_imatrix else default
    return "Q4_K" if mix in ("Q2_K_S", "IQ3_M") else default


def _attention(mix: str, default: str, category: str, sizes: Sizes) -> str:
    """attn_q, attn_k and attn_output; what counts as attn_v is chosen elsewhere."""
    if category == "attn_k" and sizes.experts == 8:
        return "Q8_0"
    if category in ("attn_q", "attn_k"):
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(mix, default)
    if sizes.architecture == "falcon":
        return "Q4_K" if mix == "Q3_K_L" else default
    if sizes.experts == 8:
        up = ("Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS")
        return "Q5_K" if mix in up else default
    richer = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
    return richer.get(mix, default)
