"""The step ``machine``: what the card is, what is installed beside it, and how fast its matrix units and memory are."""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec
from typing import Any

import torch

from retnet.host import product_rate, versions
from retnet.measure.clock import least_seconds, spread
from retnet.measure.limits import memory_bandwidth
from retnet.measure.records import seen
from retnet.measure.summary import Bars, Figure, Summary
from retnet.tables import MISSING, Table
from tools.gpu_day.notebook import Found
from tools.gpu_day.place import Place

ASKED = "name,driver_version,vbios_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "flash-linear-attention",
    "tokenizers",
    "safetensors",
    "matplotlib",
)
WITHOUT = {
    "triton": "nothing of this library's GPU kernels can run",
    "transformers": "no Llama stands beside decoding",
    "fla": "flash-linear-attention, of which it is a part, does not stand beside the op",
    "pytest": "verify borrows its comparisons from the tests, which import pytest",
    "jinja2": "there is no report of the study of quality",
    "matplotlib": "pages have no pictures",
}
PROPERTIES = (
    "name",
    "major",
    "minor",
    "total_memory",
    "multi_processor_count",
    "L2_cache_size",
    "shared_memory_per_block_optin",
    "regs_per_multiprocessor",
    "max_threads_per_multi_processor",
)
ROUNDS = 3


def card(place: Place) -> Found:
    """What nvidia-smi and torch say of the card; versions; what is missing and what is left out for it."""
    gpu: dict[str, Any] = {}
    if place.device.type == "cuda":
        about = torch.cuda.get_device_properties(place.device)
        gpu = {name: getattr(about, name) for name in PROPERTIES if hasattr(about, name)}
    return {
        "gpu": gpu,
        "nvidia_smi": _nvidia_smi(),
        "versions": versions(*PACKAGES),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if place.device.type == "cuda" else None,
        "missing": [
            f"{name} is not installed: {what}" for name, what in WITHOUT.items() if find_spec(name) is None
        ],
    }


def ceilings(place: Place) -> Found:
    """The most that this card does: matrix products of random numbers, and bytes between its memory and its cores."""
    size, megabytes = (256, 2) if place.rehearsal else (8192, 2048)
    rates: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, dtype, precision in (
            ("bf16", torch.bfloat16, "highest"),
            ("fp16", torch.float16, "highest"),
            ("TF32", torch.float32, "high"),
            ("fp32", torch.float32, "highest"),
        ):
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(precision)
            try:
                rates.setdefault(name, []).append(product_rate(dtype, size, device=place.device))
            finally:
                torch.set_float32_matmul_precision(before)
    bandwidth = memory_bandwidth(megabytes, device=place.device)
    source = torch.ones(megabytes << 18, device=place.device)
    target = torch.empty_like(source)
    moved: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, measure in bandwidth.items():
            moved.setdefault(name, []).append(measure())
        seconds = least_seconds(lambda: target.copy_(source), 5, place.device)
        moved.setdefault("copy", []).append(2 * source.nbytes / seconds)
    return {
        "size": size,
        "megabytes": megabytes,
        "flops_per_s": {name: vars(spread(rates[name])) for name in rates},
        "bytes_per_s": {name: vars(spread(moved[name])) for name in moved},
    }


def summarise(parts: dict[str, Found]) -> Summary:
    """The card, its ceilings, and what is missing."""
    tables, findings, figures = [], [], []
    if about := parts.get("card"):
        rows = [("card", str(about["gpu"].get("name", "none: a CPU")))]
        rows += [
            (key.replace("_", " "), f"{value:,}") for key, value in about["gpu"].items() if key != "name"
        ]
        rows += [(name, value or MISSING) for name, value in about["nvidia_smi"].items()]
        rows += [("CUDA of torch", str(about["cuda"] or about["hip"] or MISSING))]
        rows += [(name, version or MISSING) for name, version in about["versions"].items()]
        tables.append(Table("Card and versions", ("what", "is"), tuple(rows)))
        findings += [f"{sentence}." for sentence in about["missing"]]
    if top := parts.get("ceilings"):
        products = {name: seen(top["flops_per_s"], name, 1e-12) for name in top["flops_per_s"]}
        bytes_ = {name: seen(top["bytes_per_s"], name, 1e-9) for name in top["bytes_per_s"]}
        title = f"Ceilings: products of {top['size']:,}² random numbers; buffers of {top['megabytes']:,} MiB"
        rows = [(f"matrix products, {name}", f"{s.written(1)} TFLOP/s") for name, s in products.items()]
        rows += [(f"memory, {name}", f"{s.written(0)} GB/s") for name, s in bytes_.items()]
        tables.append(Table(title, ("what", "best of each of three rounds"), tuple(rows)))
        panels = (
            Bars("Matrix products", "TFLOP/s", tuple(products), tuple(products.values())),
            Bars("Memory", "GB/s, bytes read and written", tuple(bytes_), tuple(bytes_.values())),
        )
        figures.append(Figure("ceilings", panels))
        best, copy = products["bf16"].median, bytes_["copy"].median
        findings.append(f"Ceilings: {best:,.1f} TFLOP/s in bf16, {copy:,.0f} GB/s copied.")
    return Summary(tuple(tables), tuple(figures), tuple(findings))


def _nvidia_smi() -> dict[str, str]:
    """What the driver's own tool says; empty where it is not."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return {}
    words = [tool, f"--query-gpu={ASKED}", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = done.stdout.splitlines()[:1]
    if done.returncode or not values:
        return {}
    return dict(zip(ASKED.split(","), (value.strip() for value in values[0].split(",")), strict=False))


PARTS = {"card": card, "ceilings": ceilings}
