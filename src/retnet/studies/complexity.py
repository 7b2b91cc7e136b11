"""The measure ``complexity``: how the cost of each sequence mixer grows with the length, in use and in training.

One mixer alone is measured, without feed-forward layers and head, whose constant cost would hide how the rest grows.
Exponents are slopes of medians in log-log, nothing subtracted; lengths are so long that a cache is larger than those of a
CPU. Which mixers are trained in parallel along time is not asserted: one sequence alone is compared with many.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from retnet.host import choose_device, fast_dtype, keep_freed_memory
from retnet.io import write_text
from retnet.measure.clock import Contender, interleave, median_seconds, wait
from retnet.measure.contexts import Contexts
from retnet.measure.memory import GIB, free_memory, kept_for_backward
from retnet.measure.summary import Summary
from retnet.mixers import MIXERS, Mixer, MixerConfig, TrainingForm
from retnet.settings import At, Checked, Count, Items, UserError, nearest
from retnet.studies.complexity_summary import summarise
from retnet.studies.protocols import Job, Measure, Result, Results, Tell, part_of

Lengths = Annotated[tuple[int, ...], Items(5, rising_from=2)]  # an exponent from fewer says little


@dataclass(frozen=True)
class Using(Checked):
    """Decoding, token by token.

    Attributes:
        d_model: width.
        num_heads: of the mixers that can choose.
        batch: sequences at once.
        lengths: tokens of context.
        rounds: in each of which every length is measured.
        seconds: of one length in one round.
    """

    d_model: Count = 256
    num_heads: Count = 4
    batch: Count = 4
    lengths: Lengths = (4096, 8192, 16384, 32768, 65536)
    rounds: Count = 7
    seconds: Annotated[float, At(above=0)] = 0.15


@dataclass(frozen=True)
class Learning(Checked):
    """Forward and backward passes, as many tokens at each length: those of the longest.

    Attributes:
        d_model: width; small, for projections cost the same at all lengths.
        num_heads: of the mixers that can choose.
        lengths: of a sequence; each must divide the longest.
        rows: sequences side by side that one alone is compared with, at the middle length.
        rounds: in each of which every length is measured.
    """

    d_model: Count = 64
    num_heads: Count = 1
    lengths: Lengths = (512, 1024, 2048, 4096, 8192)
    rows: Annotated[int, At(least=2)] = 16
    rounds: Count = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if uneven := [n for n in self.lengths if max(self.lengths) % n]:
            raise UserError(
                f"length {uneven[0]} does not divide the longest, {max(self.lengths)}; change one"
            )


@dataclass(frozen=True)
class ComplexityJob(Job):
    """One mixer: time and memory of a step, of training, and of what training keeps, over lengths."""

    name: Literal["complexity"]
    mixer: str
    using: Using
    learning: Learning
    device: str = "auto"

    def run(self, folder: Path, tell: Tell) -> Result | None:
        """Both halves; one that was finished before an interruption is not measured again."""
        torch.manual_seed(0)
        keep_freed_memory()
        device = choose_device(self.device)
        parts = [partial(_using, self.mixer, self.using, device)]
        for form in MIXERS[self.mixer].training_forms:
            parts.append(partial(_learning, self.mixer, form, self.learning, device))
        found = []
        for number, part in enumerate(parts):
            found.append(_once(folder / f"part-{number}.json", part, part_of(tell, number, len(parts))))
        using, *learning = found
        return {"mixer": self.mixer, "device": device.type, "using": using, "learning": learning}


@dataclass(frozen=True)
class ComplexityMeasure(Measure):
    """The table of architectures (paper §1), measured: one job a mixer.

    Attributes:
        mixers: rows of `MIXERS`; empty: all.
        using: what is decoded.
        learning: what is trained.
        device: ``"auto"`` is a GPU if there is one; numbers are bf16 there, fp32 on a CPU.
    """

    name: Literal["complexity"]
    mixers: tuple[str, ...] = ()
    using: Using = field(default_factory=Using)
    learning: Learning = field(default_factory=Learning)
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for mixer in self.mixers:
            if mixer not in MIXERS:
                raise UserError(f"unknown mixer {mixer!r}; {nearest(mixer, MIXERS)}")
            for part in (self.using, self.learning):
                _config(mixer, part.num_heads)

    def check(self) -> None:
        """Refuses lengths whose caches, or whose matrix of scores, no memory here would hold."""
        device = choose_device(self.device)
        have, most = free_memory(device), self.need(device)
        if most > have:
            raise UserError(
                f"complexity needs about {most / GIB:.1f} GiB of memory at these lengths, {have / GIB:.1f} GiB are free on "
                f"{device}; take shorter lengths, a smaller batch or another --scale"
            )

    def need(self, device: torch.device) -> int:
        """Bytes, about: three caches of the longest context, or four matrices of scores of the longest sequence."""
        size, a, b = fast_dtype(device).itemsize, self.using, self.learning
        caches = 3 * 2 * a.batch * max(a.lengths) * a.d_model * size
        return max(caches, 4 * b.num_heads * max(b.lengths) ** 2 * size)

    def count(self) -> int:
        """One a mixer."""
        return len(self.mixers or MIXERS)

    def jobs(self, out: Path, results: Results, failed: Collection[str]) -> dict[str, Job]:
        """Mixer → its job."""
        return {
            mixer: ComplexityJob("complexity", mixer, self.using, self.learning, self.device)
            for mixer in self.mixers or MIXERS
        }

    def summarise(self, results: Results) -> Summary:
        """The table of architectures, the numbers behind it, and both as curves."""
        return summarise(self.mixers or tuple(MIXERS), results)


def _using(name: str, c: Using, device: torch.device, tell: Tell) -> Result:
    mixer = _mixer(name, c.d_model, c.num_heads, device).eval()
    contexts = Contexts(mixer, c.d_model)
    contexts.read((1, *c.lengths), lambda seen: tell(seen / max(c.lengths) / 2))
    contenders = [
        Contender(str(n), partial(contexts.seconds, n, c.batch, c.seconds)) for n in (1, *c.lengths)
    ]
    samples = interleave(contenders, {}, c.rounds, lambda _, part=0.0: tell(0.5 + 0.5 * part))
    seconds = [[s.seconds / c.batch for s in samples[x.name]] for x in contenders]
    return {
        "d_model": c.d_model,
        "batch": c.batch,
        "lengths": list(c.lengths),
        "seconds": seconds[1:],  # of a token, by length and round
        "first": seconds[0],  # the same after one token alone
        "state_bytes": [contexts.state_bytes(n, 1) for n in c.lengths],
    }


def _learning(name: str, form: TrainingForm, c: Learning, device: torch.device, tell: Tell) -> Result:
    mixer = _mixer(name, c.d_model, c.num_heads, device, **form.settings)
    tokens = max(c.lengths)
    middle = c.lengths[len(c.lengths) // 2]
    shapes = [(tokens // n, n) for n in c.lengths]
    shapes += [shape for shape in ((1, middle), (c.rows, middle)) if shape not in shapes]
    contenders = [Contender(str(shape), partial(_pass, mixer, *shape, c.d_model)) for shape in shapes]
    samples = interleave(contenders, {}, c.rounds, lambda _, part=0.0: tell(part))
    seconds = {
        (rows, n): [s.seconds / (rows * n) for s in samples[x.name]]
        for x, (rows, n) in zip(contenders, shapes, strict=True)
    }
    return {
        "form": form.name,
        "d_model": c.d_model,
        "tokens": tokens,
        "lengths": list(c.lengths),
        "seconds": [seconds[tokens // n, n] for n in c.lengths],  # of a token, by length and round
        "alone": {
            "length": middle,
            "rows": c.rows,
            "one": seconds[1, middle],
            "many": seconds[c.rows, middle],
        },
        "kept_bytes": [_kept(mixer, n, c.d_model) for n in c.lengths],  # of one sequence
    }


def _pass(mixer: Mixer, rows: int, length: int, d_model: int) -> float:
    """Seconds of a forward and a backward pass."""
    x = _input(mixer, rows, length, d_model)

    def both() -> None:
        y = mixer(x)
        torch.autograd.backward(y, torch.ones_like(y))
        wait(x.device)

    seconds = median_seconds(both, 1, warmup=0)
    mixer.zero_grad(set_to_none=True)
    return seconds


def _kept(mixer: Mixer, length: int, d_model: int) -> int:
    x = _input(mixer, 1, length, d_model)
    return kept_for_backward(lambda: mixer(x), mixer.parameters())


def _input(mixer: Mixer, rows: int, length: int, d_model: int) -> torch.Tensor:
    weight = next(mixer.parameters())
    return torch.randn(rows, length, d_model, device=weight.device, dtype=weight.dtype, requires_grad=True)


def _mixer(name: str, d_model: int, num_heads: int, device: torch.device, **settings: Any) -> Mixer:  # noqa: ANN401
    config = _config(name, num_heads, **settings)
    return MIXERS[name](d_model, config).to(device, fast_dtype(device))


def _config(name: str, num_heads: int, **settings: Any) -> MixerConfig:  # noqa: ANN401
    kind = MIXERS[name].Config
    if any(f.name == "num_heads" for f in fields(kind)):
        settings["num_heads"] = num_heads
    config: MixerConfig = kind(**settings)
    return config


def _once(file: Path, measure: Callable[[Tell], Result], tell: Tell) -> Result:
    """What a file holds, or what is measured now and left there."""
    if not file.exists():
        write_text(file, json.dumps(measure(tell)))
    found: Result = json.loads(file.read_text(encoding="utf-8"))
    return found
