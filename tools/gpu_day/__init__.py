"""Everything that has to be learned from a GPU, in one command: `python -m tools.gpu_day` (docs/gpu.md)."""
