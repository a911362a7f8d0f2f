"""Whole models and files in other formats: mixes, rules, importance, calibration."""

from realm_jax.quantizer.calibrate import calibrate
from realm_jax.quantizer.imatrix import Imatrix, read_imatrix, write_imatrix
from realm_jax.quantizer.mixes import choose_formats
from realm_jax.quantizer.models import quantize_model

__all__ = ["Imatrix", "calibrate", "choose_formats", "quantize_model", "read_imatrix", "write_imatrix"]
