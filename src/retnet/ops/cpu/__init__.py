"""Retention and its products on a CPU: torch's batched products, and kernels compiled by numba."""
