"""Retention on CUDA and ROCm GPUs, in three Triton kernels, and in three more what stands around it in a layer.

`operators` has the functions behind the operators of torch (`retnet.ops.operators`), `kernels` and `step` are the kernels,
and `launch` is what brings tensors to them, imported when an operator first runs. `row_operators`, `row_kernels` and
`row_launch` are the same for rotation and for head norm with gate, which memory bounds. `tile_table` is the table of tiles,
`autotune` the opt-in search for better ones; `capability` says what cannot run and why.
"""
