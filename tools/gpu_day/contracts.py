"""What torch asks of operators, checked on the card: opcheck, one graph under compile, CUDA graphs, export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from retnet.measure.graphs import captured
from retnet.ops import apply_rotary, frequencies, head_norm, log_decays, reference, retention
from tests.helpers.parity import random_inputs, relative


class _Layer(torch.nn.Module):
    """The smallest module with projections, rotation, retention, norm and gate."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(64, 2 * 96)
        self.register_buffer("log_decay", log_decays("paper", 2))
        self.register_buffer("theta", frequencies(16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, gate = self.project(x).unflatten(-1, (2, 96)).split([16, 16, 32, 32], dim=-1)
        position = torch.arange(x.shape[1], device=x.device)[None]
        q, k = apply_rotary(q, k, position, self.theta, backend="triton")
        out, _ = retention(q, k, v, self.log_decay, backend="triton")
        return head_norm(out, gate.flatten(-2), backend="triton")


def _opcheck(device: torch.device) -> dict[str, float]:
    ops = torch.ops.retnet
    log_decay = log_decays("paper", 2).to(device)
    for bounds in (None, torch.tensor([0, 9, 9, 20], device=device)):
        rows = None if bounds is None else 3
        q, k, v, s = random_inputs(1, 20, 2, 16, 32, dtype=torch.float32, rows=rows, device=device)
        call = (q, k, v, log_decay, s, bounds, 0.25, 16)
        torch.library.opcheck(ops.retention_chunkwise_triton, (*call, False))
        call = tuple(x.detach() if isinstance(x, Tensor) else x for x in call)
        out, final, _ = ops.retention_chunkwise_triton(*call, False)
        torch.library.opcheck(ops.retention_chunkwise_triton_backward, (*call, out, final, None, False))
    for slots in (None, torch.tensor([4, -1], dtype=torch.int32, device=device)):
        q, k, v = (torch.randn(2, 2, n, device=device) for n in (16, 16, 32))
        pool = torch.randn(5, 2, 16, 32, device=device)
        torch.library.opcheck(ops.retention_step_triton, (q, k, v, log_decay, pool, slots, 0.25))
    return {"violations": 0.0}


def _compiled(device: torch.device) -> dict[str, float]:
    """One graph for any length, by inductor (in the interpreter, which inductor cannot call, by aot_eager)."""
    torch.compiler.reset()
    module = _Layer().to(device)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled: Any = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    errors = {}
    for T in (40, 56, 77):
        x, found = torch.randn(2, T, 64, device=device), []
        for run in (module, compiled):
            out = run(x)
            out.square().sum().backward()
            assert module.project.weight.grad is not None
            found.append((out.detach(), module.project.weight.grad.clone()))
            module.zero_grad()
        for name, a, b in zip(("out", "gradient"), *found, strict=True):
            errors[f"{name}, T {T}"] = relative(b, a)
    return errors


def _graphed(device: torch.device) -> dict[str, float]:
    """Forward and backward, of rows and packed, and a step, replayed on numbers that were not there at capture."""
    packed = torch.tensor([0, 9, 9, 300], dtype=torch.int32, device=device)
    return _graphed_training(device, None) | _graphed_training(device, packed) | _graphed_step(device)


def _graphed_training(device: torch.device, bounds: Tensor | None) -> dict[str, float]:
    log_decay = log_decays("paper", 2).to(device)
    leaves = random_inputs(1, 300, 2, 32, 64, dtype=torch.bfloat16, device=device)[:3]
    d_out = torch.randn(1, 300, 2, 64, device=device, dtype=torch.bfloat16)
    made: list[Tensor] = []

    def both() -> None:
        out, _ = retention(*leaves, log_decay, cu_seqlens=bounds, backend="triton")
        made[:] = (out.detach(), *torch.autograd.grad(out, leaves, d_out))

    replay = captured(both, device)
    there = [*made]
    with torch.no_grad():
        for x in (*leaves, d_out):
            x.normal_()
    replay()
    found = [x.clone() for x in (there if device.type == "cuda" else made)]
    both()
    names = [f"{name}{'' if bounds is None else ', packed'}" for name in ("out", "dq", "dk", "dv")]
    return {name: relative(a, b) for name, a, b in zip(names, found, made, strict=True)}


def _graphed_step(device: torch.device) -> dict[str, float]:
    log_decay = log_decays("paper", 2).to(device)
    q, k, v = (torch.randn(4, 2, n, device=device) for n in (32, 32, 64))
    pool = torch.zeros(4, 2, 32, 64, device=device)
    run = captured(
        lambda: torch.ops.retnet.retention_step_triton(q, k, v, log_decay, pool, None, 0.25), device
    )
    pool.zero_()
    for _ in range(3):
        run()
    want = torch.zeros_like(pool, dtype=torch.float64)
    for _ in range(3):
        reference.retention_step(q.double(), k.double(), v.double(), log_decay.double(), want, None, 0.25)
    return {"state after three steps": relative(pool, want)}


def _exported(device: torch.device) -> dict[str, float]:
    module = _Layer().to(device).eval()
    length = torch.export.Dim("T", min=2)
    program = torch.export.export(
        module, (torch.randn(2, 40, 64, device=device),), dynamic_shapes=({1: length},)
    )
    x = torch.randn(2, 59, 64, device=device)
    return {"out": relative(program.module()(x), module(x))}


CONTRACTS: dict[str, Callable[[torch.device], dict[str, float]]] = {
    "opcheck": _opcheck,
    "compile": _compiled,
    "graphs": _graphed,
    "export": _exported,
}
