"""What Triton can run: versions, devices, head sizes, types; every refusal says the way out."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from retnet.ops.torch_private import constant_in_traces, is_differentiated
from retnet.ops.triton.tile_table import MAX_KEY_DIM, MAX_VALUE_DIM

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("chunkwise", "parallel")


class Refused(NamedTuple):
    """Versions of Triton that must not run these kernels, and why."""

    first: tuple[int, ...]
    before: tuple[int, ...]
    why: str


REFUSED = (
    Refused((0,), (3, 6), "it is older than any these kernels were tested with"),
    # Bugs that the kernels avoid, so that their versions are not refused (rules of `chunkwise_kernels`): 3.4 to 3.7.0
    # miscompile a product of a transposed product on Hopper; 3.6 to 3.8.0 two products into one accumulator on Blackwell.
)


def refusal(version: str) -> str | None:
    """Why a version of Triton cannot be used; None if it can."""
    number = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    for bad in REFUSED:
        if bad.first <= number < bad.before:
            return f"Triton is {version}, and {bad.why}; install one from 3.6 to 3.9"
    return None


def missing(device: str) -> str | None:
    """Why no kernel runs on tensors of this device ("cuda", "cuda:1", "cpu"); None if they do. Asked once a device."""
    return _missing(device)


constant_in_traces(missing)


@cache
def _missing(device: str) -> str | None:
    where = torch.device(device)
    if where.type not in ("cuda", "cpu"):
        return f"tensors are on {device}; Triton runs on CUDA and ROCm"
    if find_spec("triton") is None:
        return (
            "Triton is not installed; pip install 'retnet[triton]' (it comes along with CUDA builds of torch)"
        )
    import triton

    if (why := refusal(triton.__version__)) is not None:
        return why
    if where.type == "cpu":
        from retnet.ops.triton.chunkwise_kernels import INTERPRETED

        if not INTERPRETED:
            return "tensors are on cpu, where Triton runs in its interpreter alone (TRITON_INTERPRET=1, for tests)"
    elif torch.version.hip is None and torch.cuda.get_device_capability(where) < (8, 0):
        return f"{torch.cuda.get_device_name(where)} is older than compute capability 8.0 (Ampere)"
    return None


def unfit_heads(width: int, *tensors: Tensor | None, constant: Tensor | None = None) -> str | None:
    """Why the kernels around retention cannot run on heads of this width and on these tensors; None if they can."""
    if constant is not None and is_differentiated(constant):
        return "sums requires a gradient, which the kernels do not compute"
    for x in tensors:
        if x is not None and x.dtype not in KERNEL_DTYPES:
            return f"a tensor has type {x.dtype}; allowed: {', '.join(map(str, KERNEL_DTYPES))}"
    if not 1 <= width <= MAX_VALUE_DIM:
        return f"heads have width {width}; allowed: from 1 to {MAX_VALUE_DIM}"
    return None


def unsupported(q: Tensor, v: Tensor, form: str) -> str | None:
    """Why the kernels cannot run these arguments; None if they can."""
    if q.dtype not in KERNEL_DTYPES:
        return f"q has type {q.dtype}; allowed: {', '.join(map(str, KERNEL_DTYPES))}"
    if q.shape[-1] > MAX_KEY_DIM or v.shape[-1] > MAX_VALUE_DIM:
        return f"heads are {q.shape[-1]}/{v.shape[-1]} (K/V); allowed: up to {MAX_KEY_DIM}/{MAX_VALUE_DIM}"
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        return f"heads are {q.shape[-1]}/{v.shape[-1]} (K/V); allowed: from 1/1"
    if form not in FORMS:
        return f"form is {form!r}; allowed: {', '.join(map(repr, FORMS))}"
    return None


@cache
def architecture(device: torch.device) -> str:
    """The name under which `tile_table` has its row: "sm_90", "gfx942"; the interpreter runs Hopper's."""
    if device.type == "cpu":
        return "sm_90"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
