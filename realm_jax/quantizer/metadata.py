"""What a quantized file says of itself: the keys that llama-quantize sets. Called by `files` and `models`."""

from collections.abc import Mapping

from realm_jax.gguf.split import SPLIT_KEYS
from realm_jax.gguf.types import Field, ValueType
from realm_jax.quantizer.imatrix import Imatrix
from realm_jax.quantizer.mixes import COPY, file_type_id

QUANTIZATION_VERSION = 2  # ggml's GGML_QNT_VERSION
LONGEST_TEXT = 127  # bytes of a text that llama-quantize puts into the metadata


def quantized_fields(fields: Mapping[str, Field], format: str, imatrix: Imatrix | None) -> dict[str, Field]:
    """The metadata of a file that was quantized to the (resolved) mix or format of that name.

    As llama-quantize has it: the file is one, not a part of a split model; it says with which version of the formats,
    to what, and with which importance matrix it was quantized. A format without a file type leaves none.
    """
    fields = {key: field for key, field in fields.items() if key not in SPLIT_KEYS}
    fields["general.quantization_version"] = Field(ValueType.UINT32, QUANTIZATION_VERSION)
    number = file_type_id(format)
    if number is not None:
        fields["general.file_type"] = Field(ValueType.UINT32, number)
    elif format != COPY:
        fields.pop("general.file_type", None)
    return fields if imatrix is None else fields | _imatrix_fields(imatrix)


def _imatrix_fields(imatrix: Imatrix) -> dict[str, Field]:
    fields = {}
    for key, text in (("file", imatrix.source), ("dataset", next(iter(imatrix.datasets), ""))):
        if text:
            cut = text.encode("utf-8", "surrogateescape")[:LONGEST_TEXT].decode("utf-8", "ignore")
            fields[f"quantize.imatrix.{key}"] = Field(ValueType.STRING, cut)
    fields["quantize.imatrix.entries_count"] = Field(ValueType.UINT32, len(imatrix.values))
    if imatrix.chunks > 0:
        fields["quantize.imatrix.chunks_count"] = Field(ValueType.UINT32, imatrix.chunks)
    return fields
