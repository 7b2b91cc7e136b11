"""The compiled CPU decoder: one call a token through all layers of a RetNet, at the speed of the memory.

`reading` turns a model into the weight table of `table`, which `kernel` reads; `decoder` is what others use.
"""

from retnet.engine.cpu_decoder.decoder import CpuDecoder
from retnet.engine.cpu_decoder.table import NotCompiledError

__all__ = ["CpuDecoder", "NotCompiledError"]
