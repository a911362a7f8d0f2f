"""Products by packed weights: one public function, several implementations."""

from realm_jax.kernels.matmul import IMPLEMENTATIONS, Implementation, choose_impl, matmul

__all__ = ["IMPLEMENTATIONS", "Implementation", "choose_impl", "matmul"]
