"""Retention on CUDA and ROCm GPUs, in three Triton kernels, and in three more what stands around it in a layer.

`operators` has the functions behind the operators of torch (`retnet.ops.operators`), `chunkwise_kernels` and `step_kernel`
the kernels, and `launch` is what brings tensors to them, imported when an operator first runs. `rotary_norm_operators`,
`rotary_norm_kernels` and `rotary_norm_launch` are the same for rotation and for head norm with gate, which memory bounds.
`tile_table` is the table of tiles, `autotune` the opt-in search for better ones; `capability` says what cannot run and why.
Kernels are named after op, form and backend: `retention_chunkwise_state_triton`, `head_norm_triton`, ….
"""
