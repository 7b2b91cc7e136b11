"""One case after the other in a process of its own, against the law in fp64: `python -m tools.gpu_day.cases DEVICE`.

Reads a case as a line of JSON, answers with a line of JSON: ``errors`` (name → ‖got − want‖ / ‖want‖) beside what is
``allowed`` (one number, or one a name), or why the tiles were ``refused``, or how it ``failed``. Memory that nobody wrote
is NaN.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from retnet.mixers import RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.ops import apply_rotary, frequencies, head_norm, reference, retention, retention_steps
from retnet.ops.triton import capability, launch, tile_table
from tests.helpers.parity import random_inputs, relative
from tools.gpu_day.contracts import CONTRACTS
from tools.gpu_day.place import interpret_exactly

Case = dict[str, Any]
Answer = dict[str, Any]
ALLOWED = {"float32": 2e-6, "bfloat16": 5e-3, "float16": 1e-3}
CARD_LOST = 7  # exit status where the card no longer answers this process
GAMMAS = (1.0, 1 - 2**-5, 0.5, 1e-3)


def op(case: Case, device: torch.device) -> Answer:
    """Outputs, final state and all gradients of the op; cut into pieces, if the case says where."""
    dtype, lengths = getattr(torch, case["dtype"]), case.get("lengths")
    B, T, H, K, V = (case[name] for name in "BTHKV")
    rows = B if lengths is None else len(lengths)
    inputs: list[Any] = list(
        random_inputs(B, T, H, K, V, dtype=dtype, rows=rows, seed=case["seed"], device=device)
    )
    inputs[3] = inputs[3].detach() * 5 if case.get("state") else None
    gammas = (tuple(case.get("gammas", GAMMAS)) * H)[:H]
    log_decay = torch.tensor(gammas, dtype=torch.float64, device=device).log()
    options: dict[str, Any] = {"form": case.get("form", "chunkwise")}
    if lengths is not None:
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0)
        options["cu_seqlens"] = bounds.to(device, torch.int32)
    exact = [None if x is None else x.detach().double() for x in inputs]
    want = _results(exact, log_decay, case["seed"], "plain", [], backend="reference", **options)
    more = {"chunk_size": case.get("chunk"), "keep_states": case.get("keep", False), "backend": "triton"}
    with _tiles(case.get("tiles"), device):
        got = _results(
            inputs,
            log_decay.float(),
            case["seed"],
            case.get("layout", "plain"),
            case.get("cuts", []),
            **options,
            **more,
        )
    errors = {name: relative(got[name], want[name]) for name in want}
    return {"errors": errors, "allowed": ALLOWED[case["dtype"]]}


def _results(
    inputs: list[Any],
    log_decay: Tensor,
    seed: int,
    layout: str,
    cuts: list[int],
    **options: Any,  # noqa: ANN401
) -> dict[str, Tensor]:
    """Output, final state and gradients of every input under a random linear functional of both."""
    leaves = [None if x is None else _laid(x.detach(), layout).requires_grad_() for x in inputs]
    q, k, v, state = leaves
    parts, final = [], state
    bounds = [0, *cuts, q.shape[1]]
    for a, b in itertools.pairwise(bounds):
        out, final = retention(q[:, a:b], k[:, a:b], v[:, a:b], log_decay, final, **options)
        parts.append(out)
    out = torch.cat(parts, dim=1) if cuts else parts[0]
    g = torch.Generator().manual_seed(seed + 1)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in (out, final)]
    loss = (out * weights[0]).sum() + (final * weights[1]).sum()
    wanted = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(loss, wanted, materialize_grads=True)
    names = ["dq", "dk", "dv", "dstate"][: len(grads)]
    return {"out": out.detach(), "final state": final.detach(), **dict(zip(names, grads, strict=True))}


def _laid(x: Tensor, layout: str) -> Tensor:
    """The same numbers, lying otherwise in memory."""
    if layout == "heads first" and x.dim() == 4:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "slice":
        return torch.cat([x, torch.full_like(x, float("nan"))], dim=-1)[..., : x.shape[-1]]
    if layout == "every second":
        return torch.stack([x, torch.full_like(x, float("nan"))], dim=-1)[..., 0]
    return x.clone()


@contextmanager
def _tiles(named: str | dict[str, Any] | None, device: torch.device) -> Iterator[None]:
    """Kernels run with the tiles of another architecture, or with other rows in the table of this one."""
    if named is None:
        yield
        return
    name = named if isinstance(named, str) else tile_table.family(capability.architecture(device))
    asked, launch.architecture = launch.architecture, lambda device: name
    try:
        with table_with(name, {} if isinstance(named, str) else named):
            yield
    finally:
        launch.architecture = asked


@contextmanager
def table_with(name: str, rows: dict[str, Any]) -> Iterator[None]:
    """The tile table of an architecture has some other rows, as `replaced` has them."""
    before = tile_table.TABLES.get(name)
    tile_table.TABLES[name] = replaced(tile_table.table(name), rows)
    try:
        yield
    finally:
        if before is None:
            del tile_table.TABLES[name]
        else:
            tile_table.TABLES[name] = before


def replaced(table: tile_table.ArchitectureTiles, rows: dict[str, Any]) -> tile_table.ArchitectureTiles:
    """The table with some other rows, as JSON has them: ``{"state": […], "step": […], "out": {width: […]}}``."""
    state = tile_table.StateTiles(*rows["state"]) if rows.get("state") else table.state
    step = tile_table.StepTiles(*rows["step"]) if rows.get("step") else table.step
    out = {int(width): tile_table.OutTiles(*tiles) for width, tiles in rows.get("out", {}).items()}
    return tile_table.ArchitectureTiles(state, dict(sorted((table.out | out).items())), step)


def step(case: Case, device: torch.device) -> Answer:
    """Some tokens on slots out of order, padding among them; the pool stays as it is elsewhere."""
    dtype = getattr(torch, case["dtype"])
    B, T, H, K, V = (case[name] for name in "BTHKV")
    q, k, v, _ = (
        x.detach() for x in random_inputs(B, T, H, K, V, dtype=dtype, seed=case["seed"], device=device)
    )
    log_decay = torch.tensor((GAMMAS * H)[:H], dtype=torch.float64, device=device).log()
    g = torch.Generator().manual_seed(case["seed"])
    pool = torch.randn(B + 3, H, K, V, generator=g).to(device)
    order = torch.randperm(B + 3, generator=g)[:B]
    order[0] = -1
    slots = order.to(device, torch.int32)
    wanted, before = pool.double(), pool.clone()
    with _tiles(case.get("tiles"), device):
        got = retention_steps(q, k, v, log_decay.float(), pool, slots, backend="triton")
    exact = [x.double() for x in (q, k, v)]
    want = torch.stack(
        [
            reference.retention_step(*(x[:, t] for x in exact), log_decay, wanted, slots, K**-0.5)
            for t in range(T)
        ],
        dim=1,
    )
    untouched = [row for row in range(B + 3) if row not in order.tolist()]
    same = torch.equal(pool[untouched], before[untouched])
    errors = {"out": relative(got, want), "state": relative(pool, wanted), "other rows": float(not same)}
    return {
        "errors": errors,
        "allowed": {"out": ALLOWED[case["dtype"]], "state": ALLOWED["float32"], "other rows": 0.0},
    }


def rotary(case: Case, device: torch.device) -> Answer:
    """Rotation at positions as far as 10⁷, and its gradients."""
    dtype = getattr(torch, case["dtype"])
    B, T, H, K = (case[name] for name in "BTHK")
    q, k, *_ = random_inputs(B, T, H, K, 1, dtype=dtype, seed=case["seed"], device=device)
    g = torch.Generator().manual_seed(case["seed"])
    position = torch.randint(-9, 10**7, (B, T), generator=g).to(device)
    theta, found = frequencies(K).to(device), []
    for backend, leaves in (("triton", (q, k)), ("reference", (_exact(q), _exact(k)))):
        turned = apply_rotary(*leaves, position, theta, case["layout"], backend)
        found.append([*turned, *_gradients(turned, leaves)])
    names = ("q", "k", "dq", "dk")
    errors = {name: relative(a, b) for name, a, b in zip(names, *found, strict=True)}
    return {"errors": errors, "allowed": ALLOWED[case["dtype"]]}


def norm(case: Case, device: torch.device) -> Answer:
    """Norm and gate of heads, with weights, and all gradients."""
    dtype = getattr(torch, case["dtype"])
    B, T, H, V = (case[name] for name in "BTHV")
    o, _, _, _ = random_inputs(B, T, H, V, 1, dtype=dtype, seed=case["seed"], device=device)
    gate = random_inputs(B, T, 1, H * V, 1, dtype=dtype, seed=case["seed"] + 1, device=device)[0][:, :, 0]
    gate = gate.detach().requires_grad_()
    weight, bias = (
        random_inputs(1, 1, 1, H * V, 1, dtype=torch.float32, seed=case["seed"] + n, device=device)[0][
            0, 0, 0
        ]
        .detach()
        .requires_grad_()
        for n in (2, 3)
    )
    leaves: list[Any] = [o, gate, weight, bias if case["norm"] == "group" else None]
    found = []
    for backend, given in (
        ("triton", leaves),
        ("reference", [None if x is None else _exact(x) for x in leaves]),
    ):
        y = head_norm(
            given[0], given[1], case["norm"], weight=given[2], bias=given[3], eps=1e-4, backend=backend
        )
        found.append([y, *_gradients([y], [x for x in given if x is not None])])
    names = ("y", "do", "dgate", "dweight", "dbias")[: len(found[0])]
    errors = {name: relative(a, b) for name, a, b in zip(names, *found, strict=True)}
    return {"errors": errors, "allowed": ALLOWED[case["dtype"]]}


def model(case: Case, device: torch.device) -> Answer:
    """A whole language model in fp32: logits and the gradient of all weights."""
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        torch.manual_seed(case["seed"])
        mixer = RetentionConfig(num_heads=2, backend=backend)
        config = ModelConfig(vocab_size=97, d_model=case["d_model"], num_layers=2, mixer=mixer)
        net = LanguageModel(config).to(device=device)
        net = net.to(dtype=dtype)
        tokens = torch.randint(97, (2, case["T"] + 1), generator=torch.Generator().manual_seed(1)).to(device)
        logits = net(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        grads = torch.autograd.grad(loss, list(net.parameters()))
        found.append((logits.detach(), torch.cat([x.flatten() for x in grads])))
    errors = {name: relative(a, b) for name, a, b in zip(("logits", "gradients"), *found, strict=True)}
    return {"errors": errors, "allowed": 3e-5}


def contract(case: Case, device: torch.device) -> Answer:
    """One of torch's contracts; any error is one too many."""
    with _unpoisoned():
        errors = CONTRACTS[case["name"]](device)
    return {"errors": errors, "allowed": 1e-5}


def far(case: Case, device: torch.device) -> Answer:
    """More than 2³¹ numbers in v: the last tokens, which remember only those just before them.

    Every γ is 1 − 2⁻⁵, so that what lies 3,000 tokens back counts less than fp64 can tell.
    """
    H, K, V, tail = case["H"], case["K"], case["V"], min(4096, case["T"] // 2)
    T = case["T"]
    g = torch.Generator(device).manual_seed(case["seed"])
    q, k, v = (
        torch.randn(1, T, H, width, device=device, dtype=torch.bfloat16, generator=g) for width in (K, K, V)
    )
    log_decay = torch.full((H,), 1 - 2**-5, dtype=torch.float64, device=device).log()
    out, final = retention(q, k, v, log_decay.float(), backend="triton")
    last = [x[:, -tail:].double() for x in (q, k, v)]
    want, want_final = retention(*last, log_decay, backend="reference")
    keep = tail // 4
    errors = {"out": relative(out[:, -keep:], want[:, -keep:]), "final state": relative(final, want_final)}
    del out, want
    first = min(tail, 1024)
    d_out = torch.zeros_like(v)
    d_out[:, -first:] = torch.randn(1, first, H, V, device=device, dtype=torch.bfloat16, generator=g)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(retention(*leaves, log_decay.float(), backend="triton")[0], leaves, d_out)
    exact = [x.detach().requires_grad_() for x in last]
    want_grads = torch.autograd.grad(
        retention(*exact, log_decay, backend="reference")[0], exact, d_out[:, -tail:].double()
    )
    for name, got, wanted in zip(("dq", "dk", "dv"), grads, want_grads, strict=True):
        errors[name] = relative(got[:, -keep:], wanted[:, -keep:])
    return {"errors": errors, "allowed": ALLOWED["bfloat16"]}


def _exact(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_()


def _gradients(outputs: Any, leaves: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    g = torch.Generator().manual_seed(0x9E37)
    loss = sum(
        (y.double() * torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.device)).sum()
        for y in outputs
    )
    return torch.autograd.grad(loss, [x for x in leaves if x is not None])


KINDS: dict[str, Callable[[Case, torch.device], Answer]] = {
    "op": op, "step": step, "rotary": rotary, "norm": norm, "model": model, "contract": contract, "far": far,
}  # fmt: skip


@contextmanager
def _unpoisoned() -> Iterator[None]:
    """opcheck and inductor compare and trace more than our memory."""
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def answer(case: Case, device: torch.device) -> Answer:
    """What came of a case."""
    try:
        return KINDS[case["kind"]](case, device)
    except RuntimeError as error:
        if "do not fit" in str(error):
            return {"refused": str(error).splitlines()[0]}
        return _failed(error)
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> Answer:
    traceback.print_exc()
    return {"failed": f"{type(error).__name__}: {error}"[:2000]}


def main() -> None:
    """Answers until the questions end, or the card no longer does."""
    device, said = torch.device(sys.argv[1]), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    interpret_exactly()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills memory that is handed out with NaN
    for line in sys.stdin:
        case = json.loads(line)
        found = answer(case, device)
        print(json.dumps(found), file=said, flush=True)
        if device.type == "cuda":
            with suppress(RuntimeError):
                torch.cuda.synchronize(device)
                torch.cuda.empty_cache()  # others work on the card, too
                continue
            sys.exit(CARD_LOST)


if __name__ == "__main__":
    main()
