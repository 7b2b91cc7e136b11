"""What the ranks of tests/train/test_mesh.py compute: gradients of a model on every mesh, held against one process's."""

import itertools
import sys

import torch
import torch.distributed as dist

from retnet.data import Batch
from retnet.mixers import H3Config, RetentionConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.train.config import ParallelConfig
from retnet.train.distributed import Ranks, complete, shard
from retnet.train.gradients import scale, share_of_square
from retnet.train.objective import Objective, count
from retnet.train.trainer import recompute_blocks
from tests.helpers.parity import relative
from tests.helpers.ranks import main

VOCABULARY = 31
MODELS = {
    "retention": RetentionConfig(num_heads=2, backend="torch"),
    "no decay": RetentionConfig(num_heads=2, backend="torch", decay="none", rotary="halves", gate=False),
    "paper's scores": RetentionConfig(num_heads=2, backend="torch", head_norm="none", score_norm="paper"),
    "affine": RetentionConfig(
        num_heads=2, backend="torch", head_norm="rms", head_norm_affine=True, score_norm="decay"
    ),
}


def model_of(mixer) -> LanguageModel:
    torch.manual_seed(3)
    return LanguageModel(ModelConfig(vocab_size=VOCABULARY, d_model=16, num_layers=2, mixer=mixer))


def batch(place: int) -> Batch:
    """Rows of 37 tokens, so that stretches end in mid-row and differ in length; some targets do not count."""
    g = torch.Generator().manual_seed(place)
    tokens, targets = (torch.randint(VOCABULARY, (3, 37), generator=g) for _ in range(2))
    targets[0, : 5 + place] = -100
    bounds = torch.tensor([0, 9 + place, 37, 70 - place, 74, 111], dtype=torch.int32)
    return Batch(tokens, targets, bounds, (0, 1, 2, 3, 4))


def gradients(model, batches, read, device) -> tuple[float, int]:
    losses, counted = 0.0, 0
    for each in batches:
        part = read(each)
        nats = Objective(model)(*part)
        nats.backward()
        losses, counted = losses + float(nats.detach()), counted + count(part[1])
    return losses, counted


def compared(axes: ParallelConfig, mixer, recompute: bool = False, passes: int = 1) -> dict[str, float]:
    """Relative errors of loss, gradients and their norm; each reader makes so many passes."""
    device = torch.device("cpu")
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD).arranged(axes, device)
    model, whole = shard(model_of(mixer), device, ranks), model_of(mixer)
    if recompute:
        recompute_blocks(model)
    all_passes = range(passes * axes.readers)
    want, targets = gradients(whole, map(batch, all_passes), lambda each: each[:3], device)
    mine = map(batch, all_passes[ranks.reader :: axes.readers])
    sums = gradients(model, mine, ranks.part, device)
    parameters = list(model.parameters())
    total, counted, square = ranks.sum([*sums, share_of_square(parameters, ranks)], device)
    assert counted == targets
    norm = torch.nn.utils.get_total_norm([p.grad for p in whole.parameters()])
    errors = {"loss": abs(total / want - 1), "norm": abs(square**0.5 / float(norm) - 1)}
    scale(parameters, 0.5, ranks)
    for (name, p), q in zip(whole.named_parameters(), parameters, strict=True):
        errors[name] = relative(complete(q.grad, ranks), 0.5 * p.grad)
    return errors


def cases() -> dict[str, dict[str, float]]:
    torch.set_default_dtype(torch.float64)
    found, world = {}, dist.get_world_size()
    sizes = [n for n in (1, 2, 4) if world % n == 0]
    for replicate, cp in itertools.product(sizes, sizes):
        if world % (replicate * cp):
            continue
        axes = ParallelConfig(replicate=replicate, cp=cp).of(world)
        for name, mixer in itertools.islice(MODELS.items(), 1 if cp == 1 else None):
            found[f"{axes}, {name}"] = compared(axes, mixer)
        found[f"{axes}, recomputed, accumulated"] = compared(axes, MODELS["retention"], True, passes=2)
        if cp == 1:
            found[f"{axes}, h3"] = compared(axes, H3Config())
    return found


if __name__ == "__main__":
    main(cases, sys.argv)
