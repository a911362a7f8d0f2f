"""Adapters: low-rank deltas beside packed weights; applied, stacked, loaded and saved, merged."""

from realm_jax.kernels.delta import Delta as Delta
from realm_jax.lora.adapter import TARGETS as TARGETS
from realm_jax.lora.adapter import Adapter as Adapter
from realm_jax.lora.adapter import fit as fit
from realm_jax.lora.adapter import init_adapter as init_adapter
from realm_jax.lora.adapter import refresh_norms as refresh_norms
from realm_jax.lora.files import load_adapter as load_adapter
from realm_jax.lora.files import save_adapter as save_adapter
from realm_jax.lora.merge import unmerge as unmerge
from realm_jax.lora.stack import combine as combine
from realm_jax.lora.stack import deltas_for as deltas_for
from realm_jax.lora.stack import select as select
from realm_jax.lora.stack import stack as stack
