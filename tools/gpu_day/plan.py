"""What a GPU day consists of: steps made of parts, each with an estimate and a rank, and which of them fit into a time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib.util import find_spec
from typing import NamedTuple

STEPS = {
    "machine": "the card, its driver and versions; the ceilings of its matrix units and its memory",
    "verify": "every kernel against fp64, in memory full of NaN, with fresh seeds; torch's own contracts",
    "tune": "the tile table searched, the winners as a patch of the table",
    "ops": "each kernel beside the ceilings; the op beside FlashAttention and flash-linear-attention",
    "decode": "the step, and whole models, as CUDA graphs; a Llama with its KV cache beside them",
    "train": "tokens/s and memory of RetNet, Transformer, and Transformer with FlashAttention",
    "quality": "all architectures trained alike on the text of installed packages",
}
START = 10.0  # seconds until the process of a step has imported torch and woken the card
PAGE = 20.0  # seconds kept for the page at the end
GRACE = 75.0  # seconds that a step has to stop in an orderly way; a study has 60 for its jobs
GLANCE = 0.5  # seconds between looks at another process
PATIENCE = 3.0  # times its estimate that a part may take
AT_LEAST = 60.0  # seconds that it may take anyhow
POISONED = 3  # status of a step that has left the card unusable for itself
UNWRITABLE = 4  # and of one whose record cannot be written


class Part(NamedTuple):
    """What is measured, recorded and repeated as one.

    Attributes:
        step: that it belongs to.
        name: inside the step.
        seconds: expected on an H100, its kernels compiled anew.
        rank: parts are done rank by rank, so that none can cost one of a lower number its time. 1 is what a day is for,
            2 the measurement that it is judged by first, 3 completes it; 4 takes what is left; from 5 on, another call
            does it.
        what: it does, in words.
        least: seconds from which on it is begun, where it can stop at any time and go on later; 0: it cannot.
        needs: a module without which there is nothing to do.
    """

    step: str
    name: str
    seconds: float
    rank: int
    what: str
    least: float = 0.0
    needs: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """What it is called in the whole day."""
        return self.step, self.name

    @property
    def most(self) -> float:
        """Seconds after which it is ended; one that can stop at any time knows its end itself."""
        return max(AT_LEAST, PATIENCE * self.seconds)


PARTS = (
    Part("machine", "card", 5, 1, "what nvidia-smi and torch say, versions, what is missing"),
    Part("machine", "ceilings", 15, 1, "matrix products in bf16, fp16, TF32, fp32; reading, updating, copying"),
    Part("verify", "heads", 40, 1, "K/V 64/128, 128/256, 256/512 in every type, forward and backward"),
    Part("verify", "layouts", 35, 1, "ragged, packed, cut, carried, strided, γ = 1, kept states, short chunks"),
    Part("verify", "step", 15, 1, "the decoding step on slots, one token and several"),
    Part("verify", "rows", 20, 1, "rotation, head norm with gate, and a whole model"),
    Part("verify", "torch", 45, 3, "opcheck, one graph under torch.compile, CUDA graphs, export"),
    Part("verify", "far", 20, 3, "tensors of more than 2³¹ numbers"),
    Part("verify", "sizes", 75, 3, "K from 16 to 256 and V from 16 to 512, odd ones too"),
    Part("verify", "tiles", 30, 5, "the tiles of every other architecture in the table that fit this card"),
    Part("verify", "fuzz", 30, 5, "anything at all, from fresh seeds"),
    Part("tune", "state", 45, 3, "tiles of STATE, for all head shapes together; the winner against fp64"),
    Part("tune", "out-256", 50, 3, "tiles of OUT for scores contracted over 256; the winner against fp64"),
    Part("tune", "out-1024", 50, 3, "over 512"),
    Part("tune", "out-128", 45, 5, "over 128"),
    Part("tune", "out-64", 45, 5, "over 64"),
    Part("ops", "kernels", 45, 1, "TFLOP/s and GB/s of every kernel beside the ceilings"),
    Part("ops", "256-512", 75, 1, "the op at K 256, V 512, from 512 to 131,072 tokens, beside FlashAttention"),
    # some 140 configurations of its kernels: compiled by twelve processes first, then timed by one
    Part("ops", "fla-256-512", 150, 2, "beside flash-linear-attention at K 256, V 512", needs="fla"),
    Part("ops", "128-256", 50, 3, "at K 128, V 256"),
    Part("ops", "64-128", 50, 3, "at K 64, V 128"),
    Part("ops", "128-128", 40, 5, "at K and V 128"),
    Part("ops", "64-64", 40, 5, "at K and V 64"),
    Part("ops", "fla-128-128", 120, 5, "beside flash-linear-attention at K and V 128", needs="fla"),
    Part("ops", "fla-64-64", 120, 5, "at K and V 64", needs="fla"),
    Part("ops", "fla-128-256", 120, 6, "at K 128, V 256", needs="fla"),
    Part("ops", "fla-64-128", 120, 6, "at K 64, V 128", needs="fla"),
    Part("decode", "steps", 30, 1, "the step of the op, batch 1 to 256, share of bandwidth"),
    Part("decode", "1.3B", 60, 1, "a model of 1.3 B parameters, batch 1 to 256, beside a Llama at 2k, 8k, 32k"),
    Part("decode", "350M", 40, 3, "the same with 350 M"),
    Part("train", "1.3B", 60, 1, "1.3 B parameters at 2,048, 8,192 and 32,768 tokens, eagerly"),
    Part("train", "350M", 30, 3, "350 M parameters, eagerly"),
    Part("train", "1.3B-compiled", 75, 5, "1.3 B at 8,192 tokens under torch.compile"),
    Part("train", "350M-compiled", 60, 5, "350 M at 8,192 tokens under torch.compile"),
    # 18 runs, three at a time, of some 40 s of the card each, RWKV-4's 150 and the LSTM's 350; a second seed is 9 more
    Part("quality", "architectures", 800, 4, "nine architectures, at two learning rates; called again, on", 150),
    Part("quality", "second-seed", 400, 7, "a second seed of each, at its better learning rate", 150),
)  # fmt: skip


def choose(
    parts: Sequence[Part],
    done: Collection[tuple[str, str]],
    seconds: float,
    tried: Collection[tuple[str, str]] = (),
) -> list[Part]:
    """The parts that fit into a time, in the order in which they are done.

    Rank by rank, and inside a rank in the order of the day, each part is taken that still fits with what its process costs
    to start; one that can stop at any time is taken for what is left, and that is what its `seconds` then say.

    Args:
        parts: to choose from.
        done: those that need not be done.
        seconds: there are.
        tried: those that an earlier call did not finish; they come behind the others of their rank, for they may hang again.
    """
    left, chosen = seconds - PAGE, list[Part]()
    for part in sorted(parts, key=lambda part: (part.rank, part.key in tried)):
        start = 0.0 if chosen and _together(chosen[-1], part) else START
        if part.key not in done and (part.least or part.seconds) + start <= left:
            chosen.append(part._replace(seconds=min(part.seconds, left - start)))
            left -= chosen[-1].seconds + start
    return chosen


def processes(chosen: Sequence[Part]) -> list[list[Part]]:
    """The parts that one process does after the other: neighbours of one step and one rank."""
    found: list[list[Part]] = []
    for part in chosen:
        if found and _together(found[-1][-1], part):
            found[-1].append(part)
        else:
            found.append([part])
    return found


def expected(chosen: Sequence[Part]) -> float:
    """Seconds that these parts take, with the start of their processes and the page."""
    return sum(part.seconds for part in chosen) + START * len(processes(chosen)) + PAGE


def find(step: str, name: str) -> Part:
    """The part of this name."""
    return next(part for part in PARTS if part.key == (step, name))


def is_possible(part: Part) -> bool:
    """Whether what it needs is installed."""
    return not part.needs or find_spec(part.needs) is not None


def _together(a: Part, b: Part) -> bool:
    return (a.step, a.rank) == (b.step, b.rank)
