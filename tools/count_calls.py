"""Counts what one layer costs beside its arithmetic: Python calls, torch operators and autograd nodes of each of its forms.

    python -m tools.count_calls            # of the default layer, 256 wide
    python -m tools.count_calls --mixer softmax --d-model 512

A call is a function of this package or of `torch.nn` that is entered; an operator one that torch's dispatcher sees; a node
one in the graph of the backward pass. They are the same on every machine, and are written down before and after a change
(docs/developing.md, "A kernel").
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import retnet
from retnet.mixers import MIXERS
from retnet.model import LanguageModel, ModelConfig
from retnet.ops.torch_private import TorchDispatchMode

OURS = str(Path(retnet.__file__).parent)
MODULES = str(Path(torch.nn.__file__).parent)


class Counted(NamedTuple):
    """Of one form of a layer."""

    ours: int  # calls of functions of this package
    modules: int  # of torch.nn
    operators: int
    nodes: int  # of the backward graph


class _Operators(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        self.count += 1
        return func(*args, **(kwargs or {}))


def counted(run: Callable[[], Any]) -> Counted:
    """Calls, operators and nodes of one run, after one that fills caches."""
    run()
    calls = {OURS: 0, MODULES: 0}

    def enter(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            for place in calls:
                calls[place] += frame.f_code.co_filename.startswith(place)

    sys.setprofile(enter)
    try:
        out = run()
    finally:
        sys.setprofile(None)
    with _Operators() as operators:
        run()
    return Counted(
        calls[OURS], calls[MODULES], operators.count, _nodes(out) if isinstance(out, Tensor) else 0
    )


def _nodes(out: Tensor) -> int:
    seen, open_ = set(), [out.grad_fn]
    while open_:
        node = open_.pop()
        if node is not None and node not in seen:
            seen.add(node)
            open_ += [following for following, _ in node.next_functions]
    return len(seen)


def layer_forms(config: ModelConfig, length: int) -> dict[str, Counted]:
    """Of the second of two layers: what the first does for both is not counted."""
    model = LanguageModel(config)
    block: Any = model.blocks[1]
    x = torch.randn(1, length, config.d_model, requires_grad=True)
    cu_seqlens = torch.tensor([0, length // 3, length], dtype=torch.int32)
    shared: tuple[Any, ...] = ()
    if hasattr(model, "_positions"):
        shared = (model._positions(x, cu_seqlens),)
    y = block(x, cu_seqlens, *shared)
    d_out = torch.randn_like(y)
    found = {
        "training, forward": counted(lambda: block(x, cu_seqlens, *shared)),
        "training, backward": counted(lambda: y.backward(d_out, retain_graph=True)),
    }
    with torch.no_grad():
        token, state = x[:, 0].detach(), model.init_state(1)
        if shared:
            shared = (model._positions(token, None, state),)
        found["decoding, step"] = counted(lambda: block.step(token, state[1], *shared))
    return found


def main() -> None:
    """Prints a line a form."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mixer", choices=list(MIXERS), default="retention")
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    config = ModelConfig(
        vocab_size=257, d_model=options.d_model, num_layers=2, mixer=MIXERS[options.mixer].Config()
    )
    print(f"{'':20}{'our calls':>12}{'torch.nn calls':>16}{'operators':>12}{'nodes':>8}")
    for name, c in layer_forms(config, options.length).items():
        print(f"{name:20}{c.ours:12}{c.modules:16}{c.operators:12}{c.nodes:8}")


if __name__ == "__main__":
    main()
