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
START = 7.0  # seconds until the process of a step has imported torch and woken the card
PAGE = 15.0  # seconds kept for the page at the end
GRACE = 75.0  # seconds that a step has to stop in an orderly way; a study has 60 for its jobs
DAY = 4  # the last rank of a day; what comes behind it is more than was asked for
GLANCE = 0.5  # seconds between looks at another process
PATIENCE = 3.0  # times its estimate that a part may take
AT_LEAST = 85.0  # seconds that it may take anyhow: a case of `verify` that hangs is named after 60
SLOWER = 4.0  # times as long may a part take in a rehearsal, whose machine may have more to do
POISONED = 3  # status of a step that has left the card unusable for itself
UNWRITABLE = 4  # and of one whose record cannot be written


class Part(NamedTuple):
    """What is measured, recorded and repeated as one.

    Attributes:
        step: that it belongs to.
        name: inside the step.
        seconds: expected on an H100 beside 16 cores, its kernels compiled anew.
        rank: what matters most has the lowest. 1 is what a day is for, 2 the measurement that it is judged by first, 3
            completes it, 4 takes what is left of it; from 5 on, it is more than a day has to hold.
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

    def most(self, rehearsal: bool = False) -> float:
        """Seconds after which it is ended; one that can stop at any time knows its end itself."""
        return max(AT_LEAST, PATIENCE * self.seconds) * (SLOWER if rehearsal else 1.0)

    def is_worth(self, seconds: float) -> bool:
        """Whether it is begun where so much is left; half of `least`, for its process took some of what was planned."""
        return seconds > self.least / 2


# Seconds are reckoned, not seen: a kernel takes a core 1.2 s to compile (seen here, on an EPYC), 14 cores compile at a time;
# what is timed takes 0.15 s a round and contender, in three rounds at least; training moves 2.7 TB/s, 0.4 Pflop/s.
PARTS = (
    Part("machine", "card", 7, 1, "what nvidia-smi and torch say, versions, what is missing"),
    Part("machine", "ceilings", 8, 1, "matrix products in bf16, fp16, TF32, fp32; reading, updating, copying"),
    # 180 cases, 430 s of a core
    Part("verify", "kernels", 60, 1, "K/V 64/128, 128/256, 256/512 in every type; every layout; the step; a model"),
    # 58 cases, 450 s of a core
    Part("verify", "shapes", 52, 3, "K 16…256, V 16…512; all tiles of the table; opcheck, compile, graphs, export"),
    Part("verify", "far", 15, 3, "tensors of more than 2³¹ numbers"),
    Part("verify", "fuzz", 35, 5, "anything at all, from fresh seeds"),
    # the neighbours of a row, some 15 of two to six kernels, are compiled in 8 s and timed in 5; checking takes 10
    Part("tune", "state", 28, 3, "tiles of STATE, for all head shapes together; the winner against fp64"),
    Part("tune", "step", 18, 3, "tiles of STEP, from memory; the winner against fp64"),
    Part("tune", "out-64", 21, 3, "tiles of OUT for scores contracted over 64; the winner against fp64"),
    Part("tune", "out-128", 23, 3, "over 128"),
    Part("tune", "out-256", 23, 3, "over 256"),
    Part("tune", "out-1024", 21, 3, "over 512"),
    Part("ops", "kernels", 25, 1, "TFLOP/s and GB/s of every kernel beside the ceilings"),
    Part("ops", "256-512", 28, 1, "the op at K 256, V 512, from 512 to 131,072 tokens, beside FlashAttention"),
    # some 180 configurations of its kernels, 360 s of a core, are compiled in 27 s beside 12 of importing, and timed in 8
    Part("ops", "fla-256-512", 72, 2, "beside flash-linear-attention at K 256, V 512", needs="fla"),
    Part("ops", "128-256", 22, 3, "at K 128, V 256"),
    Part("ops", "fla-128-256", 52, 3, "beside flash-linear-attention at K 128, V 256", needs="fla"),
    Part("ops", "64-128", 20, 3, "at K 64, V 128"),
    Part("ops", "fla-64-128", 42, 3, "beside flash-linear-attention at K 64, V 128", needs="fla"),
    Part("ops", "fla-128-128", 50, 5, "beside flash-linear-attention at K and V 128", needs="fla"),
    Part("ops", "fla-64-64", 42, 5, "at K and V 64", needs="fla"),
    Part("ops", "128-128", 22, 6, "at K and V 128, beside FlashAttention"),
    Part("ops", "64-64", 20, 6, "at K and V 64"),
    Part("decode", "steps", 20, 1, "the step of the op, batch 1 to 256, share of bandwidth"),
    Part("decode", "1.3B", 42, 1, "a model of 1.3 B parameters, batch 1 to 256, beside a Llama at 2k, 8k, 32k"),
    Part("decode", "350M", 25, 3, "the same with 350 M"),
    # 9 s a round of three kinds and lengths, four times, and 14 of making both models, anew for each length, and compiling
    Part("train", "1.3B", 50, 1, "1.3 B parameters at 2,048, 8,192 and 32,768 tokens, eagerly"),
    Part("train", "350M", 21, 3, "350 M parameters, eagerly"),
    # three graphs of 12 s, forward and backward, and 4 s a round
    Part("train", "1.3B-compiled", 50, 3, "1.3 B at 8,192 tokens under torch.compile"),
    Part("train", "350M-compiled", 40, 3, "350 M at 8,192 tokens under torch.compile"),
    # of the card: 16 s each for RetNet and both Transformers, 20 S4D, 30 Hyena, 36 RWKV-4 and gated retention, 59 the LSTM,
    # 75 H3, at two rates; 40 for text and tokens. All else that runs do, others overlap
    Part("quality", "architectures", 650, 4, "nine architectures, at two learning rates; called again, on", 150),
    Part("quality", "second-seed", 325, 7, "a second seed of each, at its better learning rate", 150),
)  # fmt: skip


def choose(
    parts: Sequence[Part],
    done: Collection[tuple[str, str]],
    seconds: float,
    tried: Collection[tuple[str, str]] = (),
) -> list[Part]:
    """The parts that fit into a time, in the order in which they are done.

    Where all of a day fits, step by step; else rank by rank, so that nothing can cost a part of a lower number its time.
    One that can stop at any time is taken for what is left, and that is what its `seconds` then say.

    Args:
        parts: to choose from.
        done: those that need not be done.
        seconds: there are.
        tried: those that an earlier call did not finish; they come behind the others of their rank, for they may hang again.
    """
    waiting = sorted(
        (part for part in parts if part.key not in done), key=lambda part: (part.rank, part.key in tried)
    )
    day = [part for part in waiting if part.rank <= DAY]
    steps = sorted(day, key=lambda part: list(STEPS).index(part.step))
    if expected([part._replace(seconds=part.least or part.seconds) for part in steps]) <= seconds:
        waiting = [*steps, *(part for part in waiting if part.rank > DAY)]
    left, chosen = seconds - PAGE, list[Part]()
    for part in waiting:
        start = 0.0 if chosen and chosen[-1].step == part.step else START
        if (part.least or part.seconds) + start <= left:
            chosen.append(part._replace(seconds=min(part.seconds, left - start)))
            left -= chosen[-1].seconds + start
    return chosen


def processes(chosen: Sequence[Part]) -> list[list[Part]]:
    """The parts that one process does after the other: neighbours of one step."""
    found: list[list[Part]] = []
    for part in chosen:
        if found and found[-1][-1].step == part.step:
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
