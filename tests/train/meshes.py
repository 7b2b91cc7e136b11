"""What the ranks of tests/train/test_mesh.py compute: gradients of a model on every mesh, held against one process's."""

import functools
import itertools
import json
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from retnet.data import Batch
from retnet.mixers import H3Config, MixerConfig, RetentionConfig, SoftmaxConfig
from retnet.model import LanguageModel, ModelConfig
from retnet.model.checkpoint import load_into, verify
from retnet.model.language_model import fresh_weights
from retnet.model.sharded import PartWriter, local_part
from retnet.ops import context_parallel
from retnet.train.blocks import change_blocks, recompute_blocks
from retnet.train.config import ParallelConfig, TrainConfig
from retnet.train.distillation import LogitDistillation, MixerAlignment
from retnet.train.distributed import Ranks, complete, own_part, shard, take_parts
from retnet.train.gradients import scale, share_of_square
from retnet.train.objective import Objective, count
from retnet.train.optimizer import optimizers
from retnet.train.tensor_parallel import cuts, global_tensors
from tests.helpers.parity import relative

VOCABULARY = 31  # which nothing divides
DEVICE = torch.device("cpu")
BASE = ModelConfig(
    vocab_size=VOCABULARY,
    d_model=16,
    num_layers=2,
    mixer=RetentionConfig(num_heads=4, backend="torch"),
)


def with_mixer(*mixers: MixerConfig) -> ModelConfig:
    first, *others = mixers
    return replace(
        BASE,
        mixer=first,
        layers=tuple(mixer.name for mixer in mixers) if others else None,
        num_layers=max(len(mixers), 2),
        tie_embeddings=first.name == "retention" and not others,
        ffn="swiglu" if others else "gelu",
    )


RETENTION = {
    "retention": BASE,
    "no decay": with_mixer(replace(BASE.mixer, decay="none", rotary="halves", gate=False)),
    "paper's scores": with_mixer(replace(BASE.mixer, head_norm="none", score_norm="paper")),
    "norm of keys": with_mixer(replace(BASE.mixer, qk_norm=True)),
    "affine": with_mixer(replace(BASE.mixer, head_norm="rms", head_norm_affine=True, score_norm="decay")),
}


def hybrid(kv_heads: int) -> ModelConfig:
    """Of all mixers whose heads can be cut; those of softmax share keys, and norms of them."""
    softmax = SoftmaxConfig(num_heads=4, kv_heads=kv_heads, qk_norm=True, bias=True)
    layers = ("retention", "softmax", "gated_retention", "linear")
    return replace(BASE, layers=layers, mixers={"softmax": softmax}, num_layers=4)


def model_of(config: ModelConfig) -> LanguageModel:
    torch.manual_seed(3)
    return LanguageModel(config)


def sharded(config: ModelConfig, ranks: Ranks) -> LanguageModel:
    """The same, in parts."""
    torch.manual_seed(3)
    model = shard(config, DEVICE, ranks)
    take_parts(model, fresh_weights(config), ranks)
    return model


def batch(place: int) -> Batch:
    """Rows of 37 tokens, so that stretches end in mid-row and differ in length; some targets do not count."""
    g = torch.Generator().manual_seed(place)
    tokens, targets = (torch.randint(VOCABULARY, (3, 37), generator=g) for _ in range(2))
    targets[0, : 5 + place % 9] = -100
    bounds = torch.tensor([0, 9 + place % 9, 37, 70 - place % 9, 74, 111], dtype=torch.int32)
    return Batch(tokens, targets, bounds, (0, 1, 2, 3, 4))


def gradients(model, batches, read, tp=None) -> tuple[float, int]:
    losses, counted = 0.0, 0
    for each in batches:
        part = read(each)
        nats = Objective(model, z_loss=1e-2, tp=tp)(*part)
        nats.backward()
        losses, counted = losses + float(nats.detach()), counted + count(part[1])
    return losses, counted


def arranged(axes: ParallelConfig) -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD).arranged(axes, DEVICE)


def summed(model, ranks: Ranks, passes: range) -> list[float]:
    """Losses, targets and squared norm of the gradient of these passes, each made by the readers whose turn it is."""
    mine = map(batch, passes[ranks.reader :: ranks.axes.readers])
    losses, counted = gradients(model, mine, ranks.part, ranks.tp)
    share = [losses, counted] if ranks.counts else [0, 0]
    return ranks.sum([*share, share_of_square(model, ranks)], DEVICE)


def compared(
    axes: ParallelConfig, config: ModelConfig, change=lambda model, ranks: None, passes: int = 1
) -> dict[str, float]:
    """Relative errors of loss, gradients and their norm; each reader makes so many passes."""
    ranks = arranged(axes)
    model, whole = sharded(config, ranks), model_of(config)
    change(model, ranks)
    every = range(passes * axes.readers)
    want, targets = gradients(whole, map(batch, every), lambda each: each[:3])
    total, counted, square = summed(model, ranks, every)
    assert counted == targets
    norm = torch.nn.utils.get_total_norm([p.grad for p in whole.parameters()])
    errors = {"loss": abs(total / want - 1), "norm": abs(square**0.5 / float(norm) - 1)}
    scale(list(model.parameters()), 0.5, ranks)
    got = global_tensors({name: p.grad for name, p in model.named_parameters()}, model, ranks.mesh)
    for name, p in whole.named_parameters():
        errors[name] = relative(complete(got[name], ranks), 0.5 * p.grad)
    return errors


def trained(axes: ParallelConfig, config: ModelConfig, steps: int = 30) -> dict[str, float]:
    """The largest relative error of the losses of so many steps with AdamW and clipping.

    And how far weights that ranks of tensor parallelism have alike have moved apart.
    """
    ranks, c = arranged(axes), TrainConfig(learning_rate=3e-3, clip=1.0)
    one, whole = Ranks(), model_of(config)
    models = (sharded(config, ranks), ranks), (whole, one)
    curves = []
    for model, those in models:
        (optimizer,), losses = optimizers(model, c), []
        for step in range(steps):
            total, counted, square = summed(model, those, range(2 * step, 2 * step + 2))
            losses.append(total / counted)
            scale(list(model.parameters()), min(1.0, c.clip / math.sqrt(square)), those)
            optimizer.step()
            model.zero_grad()
        curves.append(losses)
    assert curves[0][-1] < curves[0][0]
    model, apart = models[0][0], 0.0
    for name, p in model.named_parameters():
        if name not in cuts(model):
            own = own_part(p.detach(), ranks)
            others = [torch.empty_like(own) for _ in range(axes.tp)]
            dist.all_gather(others, own, group=ranks.tp.group)
            apart = max(apart, *(float((x - own).abs().max()) for x in others))
    return {"losses": max(abs(a / b - 1) for a, b in zip(*curves, strict=True)), "apart": apart}


def distilled(axes: ParallelConfig) -> dict[str, float]:
    """Gradients of a student that learns from a teacher, of which each process has a part as it has of the student."""
    ranks, errors = arranged(axes), {}
    of_teacher = with_mixer(SoftmaxConfig(num_heads=4, kv_heads=2))
    for kind in (MixerAlignment, LogitDistillation):
        pairs = {}
        for name, place in (("whole", model_of), ("parts", functools.partial(sharded, ranks=ranks))):
            student, teacher = place(BASE), place(of_teacher).requires_grad_(False)
            learn = kind(student, teacher)
            turns = range(axes.readers) if name == "whole" else [ranks.reader]
            losses = [learn(*batch(turn)[:3]) for turn in turns]
            for nats in losses:
                nats.backward()
            pairs[name] = student, float(sum(nats.detach() for nats in losses))
        (whole, want), (student, own) = pairs["whole"], pairs["parts"]
        (got,) = ranks.sum([own], DEVICE)
        errors[f"{kind.__name__}, loss"] = abs(got / want - 1)
        found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        wanted = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
        assert found.keys() == wanted.keys()
        for name, x in global_tensors(found, student, ranks.mesh).items():
            errors[f"{kind.__name__}, {name}"] = relative(complete(x, ranks), wanted[name])
    return errors


def overlapped(axes: ParallelConfig) -> dict[str, float]:
    """0 if a gate and its gradient are computed while states travel."""
    ranks, model, events = arranged(axes), model_of(replace(BASE, num_layers=1)), []
    mixer = model.blocks[0].mixer
    mixer.context = ranks.context
    mixer.gate_proj.register_forward_hook(lambda *_: events.append("gate"))
    mixer.gate_proj.weight.register_hook(lambda _: events.append("gate"))
    gathers = context_parallel._Gathers
    plain = gathers.begin, gathers.end

    def noted(name, function):
        def noting(*args):
            events.append(name)
            return function(*args)

        return noting

    gathers.begin, gathers.end = noted("begin", plain[0]), noted("end", plain[1])
    gradients(model, [batch(0)], ranks.part)
    gathers.begin, gathers.end = plain
    return {"order": float(events != ["begin", "gate", "end"] * 2)}


def recomputed(model, ranks: Ranks) -> None:
    recompute_blocks(model)


def compiled(model, ranks: Ranks) -> None:
    """Blocks as graphs, and what ranks exchange between these; the code that inductor makes of graphs is not the matter."""
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")  # dynamo asks whether there is one
    ranks.leave_uncompiled()
    change_blocks(model, functools.partial(torch.compile, dynamic=True, backend="aot_eager"))


def resharded(folder: Path) -> dict[str, float]:
    """Tensors that two ranks write are read by one and by four, cut in other ways."""
    g = torch.Generator().manual_seed(1)
    whole = {
        name: torch.randn(shape, generator=g) for name, shape in (("w", (5, 7)), ("b", (3,)), ("step", ()))
    }
    pair, pairs = dist.new_group([0, 1]), DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("pair", "in"))
    four, path = init_device_mesh("cpu", (4,)), folder / "resharded"

    def cut(x: torch.Tensor, mesh, *placements) -> torch.Tensor:
        placements = placements if x.dim() else [Replicate()] * mesh.ndim
        return distribute_tensor(x, mesh, placements, src_data_rank=None)

    if dist.get_rank() < 2:
        writer = PartWriter(pair)
        held = {name: local_part(cut(x, pairs["in"], Shard(0))) for name, x in whole.items()}
        held["step"] = local_part(whole["step"])
        writer.write(
            path,
            {"model": held, "optimizer": {f"{name}/m": part for name, part in held.items()}},
            begin=lambda: path.mkdir(),
            check=lambda tensors: None,
            finish=lambda files: (path / "manifest.json").write_text(json.dumps({"files": files})),
        ).complete.result()
        writer.close()
    dist.barrier()
    verify(path)
    found = {}
    for kind, end in (("model", ""), ("optimizer", "/m")):
        wanted = {name + end: x for name, x in whole.items()}
        ways = {
            "whole": {name: torch.zeros_like(x) for name, x in wanted.items()},
            "in four": {name: cut(torch.zeros_like(x), four, Shard(0)) for name, x in wanted.items()},
            "replicated": {
                name: cut(torch.zeros_like(x), pairs, Replicate(), Shard(0)) for name, x in wanted.items()
            },
            "other axes": {
                name: cut(torch.zeros_like(x), pairs, Shard(0), Shard(x.dim() - 1))
                for name, x in wanted.items()
            },
        }
        for way, tensors in ways.items():
            load_into(tensors, path, kind)
            for name, x in tensors.items():
                full = x.full_tensor() if isinstance(x, DTensor) else x
                found[f"{way}, {name}"] = float((full - wanted[name]).abs().max())
    return {"loss": 0.0, **found}


def cases() -> dict[str, dict[str, float]]:
    """All axes on every mesh; what depends on how a layer is cut only where that is all that happens."""
    torch.set_default_dtype(torch.float64)
    found, world = {}, dist.get_world_size()
    for sizes in itertools.product((1, 2, 4), repeat=4):
        if math.prod(sizes) != world:
            continue
        axes = ParallelConfig(*sizes)
        found[f"{axes}, recomputed, accumulated"] = compared(axes, BASE, recomputed, passes=2)
        if axes.cp * axes.tp == world:
            for name, config in RETENTION.items():
                found[f"{axes}, {name}"] = compared(axes, config)
        if axes.shard == 2 and axes.replicate == 2:
            found[f"{axes}, distilled"] = distilled(axes)
        if axes.cp == world:
            found[f"{axes}, overlapped"] = overlapped(axes)
        if axes in (ParallelConfig(1, 1, 4, 1), ParallelConfig(1, 2, 2, 1), ParallelConfig(2, 2, 1, 1)):
            name, config = ("hybrid", hybrid(axes.tp)) if axes.tp > 1 else ("h3", with_mixer(H3Config()))
            found[f"{axes}, {name}"] = compared(axes, config)
        if axes == ParallelConfig(1, 1, 2, 2):
            found[f"{axes}, compiled"] = compared(axes, replace(BASE, num_layers=1), compiled)
        if axes == ParallelConfig(1, 2, 2, 1):
            found[f"{axes}, trained"] = trained(axes, replace(BASE, layers=("retention", "softmax")))
    if world == 4:
        found["resharded"] = resharded(Path(sys.argv[4]))
    return found
