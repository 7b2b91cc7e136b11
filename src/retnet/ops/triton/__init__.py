"""Retention on CUDA and ROCm GPUs, in three Triton kernels.

`operators` defines the operators of torch; `kernels` and `step` are the kernels and `launch` is what brings tensors to
them, imported when an operator first runs; `configs` is the table of tiles, `tuning` the opt-in search for better ones;
`support` says what cannot run and why; `report`, which is `python -m retnet.ops.triton`, compiles everything for GPUs
that are not there.
"""
