"""Retention, rotary embedding, head norm, decay schedules and GEMM, as functions of tensors.

Legend, used in every shape comment of the project:

    B batch    T tokens    H heads    K query/key width per head    V value width per head
    C chunk length    N packed documents    D model width

`retention` is one function in three forms; `retention_step` is its decoding step on slots of state.
`apply_rotary` turns pairs of queries and keys by position; `head_norm` is the norm and gate behind retention;
`log_decays` makes the γ of each head.
"""

from retnet.ops.chunkwise import CHUNK
from retnet.ops.decay import Decay, log_decays
from retnet.ops.dispatch import BACKENDS
from retnet.ops.linear import product
from retnet.ops.norm import NORMS, head_norm
from retnet.ops.recompute import Remade, product_of
from retnet.ops.retention import FORMS, retention, retention_step, retention_steps
from retnet.ops.rotary import (
    LAYOUTS,
    SPACINGS,
    apply_rotary,
    computes_angles,
    frequencies,
    positions,
    rotate,
    rotation,
)

__all__ = [
    "BACKENDS",
    "CHUNK",
    "FORMS",
    "LAYOUTS",
    "NORMS",
    "SPACINGS",
    "Decay",
    "Remade",
    "apply_rotary",
    "computes_angles",
    "frequencies",
    "head_norm",
    "log_decays",
    "positions",
    "product",
    "product_of",
    "retention",
    "retention_step",
    "retention_steps",
    "rotate",
    "rotation",
]
