"""Retention and the few other primitives, as functions of tensors.

Legend, used in every shape comment of the project:

    B batch    T tokens    H heads    K query/key width per head    V value width per head
    C chunk length    N packed documents    D model width

`retention` is one function in three forms; `retention_step` is its decoding step on slots of state.
`rotate` turns pairs of queries and keys by position; `log_decays` makes the γ of each head.
"""

from retnet.ops.decay import Decay, log_decays
from retnet.ops.decode import Core, Plan, Shell, block_plan, retention_block
from retnet.ops.products import product
from retnet.ops.retention import BACKENDS, CHUNK, FORMS, retention, retention_step, retention_steps
from retnet.ops.rotary import LAYOUTS, SPACINGS, frequencies, positions, rotate, rotation

__all__ = [
    "BACKENDS",
    "CHUNK",
    "FORMS",
    "LAYOUTS",
    "SPACINGS",
    "Core",
    "Decay",
    "Plan",
    "Shell",
    "block_plan",
    "frequencies",
    "log_decays",
    "positions",
    "product",
    "retention",
    "retention_block",
    "retention_step",
    "retention_steps",
    "rotate",
    "rotation",
]
