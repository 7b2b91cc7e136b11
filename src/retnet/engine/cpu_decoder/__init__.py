"""The compiled CPU decoder: one call a token through all layers of RetNets and hybrids, at the speed of the memory.

`model_weights` turns a model into the weight table of `table`, which `kernel` and `mixer_kernels` read; `decoder` is what
others use.
"""

from retnet.engine.cpu_decoder.decoder import CpuDecoder
from retnet.engine.cpu_decoder.table import NotCompiledError

__all__ = ["CpuDecoder", "NotCompiledError"]
