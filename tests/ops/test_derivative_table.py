"""A table: every op × every way of asking for a derivative. Each cell is right."""

import pytest
import torch
import torch.nn.functional as F

from retnet.ops import apply_rotary, frequencies, head_norm, positions, product, product_of, retention
from retnet.ops.clamped import clamped_retention
from tests.helpers.derivatives import WAYS, assert_right_or_refused

GAMMAS = torch.tensor([1.0, 0.9], dtype=torch.float64).log()


def random(*shapes):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g) for shape in shapes]


def op_of(backend):
    def run(q, k, v, state):
        out, final = retention(q, k, v, GAMMAS.to(state.dtype), state, chunk_size=3, backend=backend)
        return torch.cat([out.flatten(), final.flatten()])

    return run


def clamped(q, k, v):
    return clamped_retention(q, k, v, GAMMAS.to(q.dtype))


def turned(layout):
    def run(q, k):
        return torch.cat(apply_rotary(q, k, positions(5), frequencies(4), layout))

    return run


def normed(o, gate, weight):
    return head_norm(o, gate, "group", weight=weight, eps=0.1)


def hidden(x):
    return F.gelu(x)


def recomputed(x, weight):
    return product_of(hidden, weight, x, lead=2)


HEADS = random((1, 7, 2, 3), (1, 7, 2, 3), (1, 7, 2, 2), (1, 2, 3, 2))
ROWS = random((2, 40, 5), (4, 5))  # more than the 64 from which oneDNN multiplies
# op: the function, its law, the inputs
TABLE = {
    "retention, torch": (op_of("torch"), op_of("reference"), HEADS),
    "retention, numba": (op_of("numba"), op_of("reference"), HEADS),
    "retention, reference": (op_of("reference"), op_of("reference"), HEADS),
    "clamped retention": (clamped, clamped, HEADS[:3]),
    "rotary, interleaved": (turned("interleaved"), turned("interleaved"), random((2, 5, 2, 4), (2, 5, 2, 4))),
    "rotary, halves": (turned("halves"), turned("halves"), random((2, 5, 2, 4), (2, 5, 2, 4))),
    "head norm": (normed, normed, random((2, 3, 2, 4), (2, 3, 8), (8,))),
    "product": (product, F.linear, ROWS),
    "product of": (recomputed, lambda x, weight: F.linear(hidden(x), weight), ROWS),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch loops where it has no rule
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TABLE)
def test_right(name, way):
    f, law, inputs = TABLE[name]
    assert_right_or_refused(way, f, inputs, law, tolerance=1e-4)
