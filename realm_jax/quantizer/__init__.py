"""Whole models and files in other formats: mixes, rules, importance, calibration."""

from realm_jax.quantizer.calibrate import calibrate
from realm_jax.quantizer.files import quantize_file
from realm_jax.quantizer.imatrix import Imatrix, read_imatrix, write_imatrix
from realm_jax.quantizer.merge_report import MergeReport, merge_report, sample_chunks
from realm_jax.quantizer.merging import merge, weight_errors
from realm_jax.quantizer.mixes import choose_formats
from realm_jax.quantizer.models import quantize_model
from realm_jax.quantizer.report import Report, TensorReport, Totals

__all__ = [
    "Imatrix",
    "MergeReport",
    "Report",
    "TensorReport",
    "Totals",
    "calibrate",
    "choose_formats",
    "merge",
    "merge_report",
    "quantize_file",
    "quantize_model",
    "read_imatrix",
    "sample_chunks",
    "weight_errors",
    "write_imatrix",
]
