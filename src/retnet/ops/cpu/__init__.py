"""CPU kernels compiled by numba: chunkwise retention, packed GEMM, skinny GEMM and GEMV, state update."""
