"""The compiled CPU decoder: one call a token through all layers of a RetNet, at the speed of the memory.

`reading` turns a model into the weight table of `table`, which `kernel` reads; `stepper` is what others use.
"""

from retnet.engine.cpu_decoder.stepper import Stepper

__all__ = ["Stepper"]
