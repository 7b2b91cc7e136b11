"""Models of other architectures with random weights as GGUF files, of as many parameters as one of ours.

Llama, RWKV-7 and Mamba-2, in fp32 or 8 bits (Q8_0: blocks of 32 int8 weights with an fp16 scale), as llama.cpp reads them.
Names and shapes of the weights are those of its loader; what its quantiser leaves in fp32 stays in fp32 here too. Random
weights are as fast as learned ones: nothing that a forward pass does depends on their values.
"""

# ruff: noqa: ANN401 (gguf has no types)

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retnet.measure.sizes import TOLERANCE, equal_width
from retnet.settings import UserError

FORMATS = ("fp32", "8 bits")
HEAD = 64  # width of a head, in all three
STATE, CONVOLUTION = 128, 4  # of Mamba-2: numbers a channel keeps, taps of its convolution (as in its paper)
BLOCK = 32  # weights that share a scale; rows of quantised matrices are multiples of it
BYTES = 256
ASCII = 128  # ids below are characters: in the head, rows of the others are zero, so that none of them is ever likeliest


class TensorSpec(NamedTuple):
    """One tensor: everywhere `fill`, or normal numbers where that is None."""

    name: str
    shape: tuple[int, ...]
    fill: float | None = None
    quantised: bool = False  # in a file of 8 bits


class PeerSize(NamedTuple):
    """How large a model is."""

    layers: int
    width: int  # of the residual stream
    inner: int  # of the feed-forward network, or of Mamba-2's mixer


class Family(NamedTuple):
    """A family of models, as llama.cpp lays it out."""

    name: str  # in GGUF
    title: str
    tied: bool  # whether the head is the embedding; RWKV-7 has to have one of its own
    depth: int  # layers for one of a Transformer, usually
    expansion: float  # inner ÷ width, usually
    units: tuple[int, int]  # what width and inner are multiples of
    layer: Callable[[PeerSize, int], list[TensorSpec]]  # the weights of the layer with this number
    ends: Callable[[PeerSize], list[TensorSpec]]  # norms before and after all layers
    describe: Callable[[Any, PeerSize], None]  # tells a GGUFWriter what this family needs


def weights(family: Family, size: PeerSize, vocab_size: int) -> Iterator[TensorSpec]:
    """All tensors of a model, the embedding first."""
    yield _matrix("token_embd", vocab_size, size.width)
    yield from family.ends(size)
    for number in range(size.layers):
        yield from family.layer(size, number)
    if not family.tied:
        yield _matrix("output", vocab_size, size.width)


def parameters(family: Family, size: PeerSize, vocab_size: int) -> int:
    """Weights that a step reads: all, the head once, but not an embedding beside it, of which a step reads one row."""
    first, other = (_count(family.layer(size, number)) for number in (0, 1))
    return vocab_size * size.width + _count(family.ends(size)) + first + (size.layers - 1) * other


def equal_size(family: Family, count: int, vocab_size: int, width: int, layers: int) -> PeerSize:
    """The size of about `count` parameters whose shape is nearest to the usual one beside a Transformer.

    Args:
        family: one of `FAMILIES`.
        count: parameters, counted as `parameters` does.
        vocab_size: rows of the head.
        width: of the model to be compared with.
        layers: of the model to be compared with.

    Raises:
        UserError: no such size comes within 2 %.
    """
    depth, (step, unit) = layers * family.depth, family.units
    found: list[tuple[float, PeerSize]] = []
    for one_depth, one_width in itertools.product(_around(depth, 1), _around(width, step)):
        shape = PeerSize(one_depth, one_width, 0)
        with suppress(UserError):
            inner = equal_width(count, partial(_with_inner, family, shape, vocab_size), family.title, unit)
            wrong = abs(_with_inner(family, shape, vocab_size, inner) / count - 1)
            ratios = (one_depth / depth, one_width / width, inner / (family.expansion * one_width))
            odd = sum(abs(math.log(ratio)) for ratio in ratios)
            found.append((10 * wrong + odd, shape._replace(inner=inner)))
    if not found:
        raise UserError(
            f"no {family.title} of about {depth} layers of width {width} comes within {TOLERANCE:.0%} of "
            f"{count:,} parameters; take a larger model"
        )
    return min(found)[1]


def _with_inner(family: Family, shape: PeerSize, vocab_size: int, inner: int) -> int:
    return parameters(family, shape._replace(inner=inner), vocab_size)


def write(family: Family, size: PeerSize, vocab_size: int, kind: str, path: Path) -> None:
    """Writes a model with random weights, the same for the same arguments.

    Args:
        family: one of `FAMILIES`.
        size: how large.
        vocab_size: tokens; the first 256 are bytes, the rest have made-up texts.
        kind: ``"fp32"`` or ``"8 bits"``.
        path: of the GGUF file.

    Raises:
        UserError: it cannot be written.
        ImportError: gguf is not installed.
    """
    import gguf

    writer = gguf.GGUFWriter(path, family.name)
    writer.add_context_length(2**20)
    writer.add_embedding_length(size.width)
    writer.add_block_count(size.layers)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if kind == "8 bits" else gguf.LlamaFileType.ALL_F32)
    family.describe(writer, size)
    _add_vocabulary(writer, vocab_size)
    random = np.random.default_rng(0)
    for weight in weights(family, size, vocab_size):
        values = _values(weight, random)
        if weight.name == ("token_embd.weight" if family.tied else "output.weight"):
            values[ASCII:] = 0  # half a character would not be sent before the other half
        if kind == "8 bits" and weight.quantised:
            eight = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(weight.name, gguf.quants.quantize(values, eight), raw_dtype=eight)
        else:
            writer.add_tensor(weight.name, values)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; set TMPDIR to a place with room") from None
    finally:
        writer.close()


def _values(weight: TensorSpec, random: np.random.Generator) -> np.ndarray:
    if weight.fill is not None:
        return np.full(weight.shape, weight.fill, np.float32)
    return random.standard_normal(weight.shape, np.float32) * np.float32(weight.shape[-1] ** -0.5)


def _add_vocabulary(writer: Any, vocab_size: int) -> None:
    """A byte-level BPE of one merge, which prompts given as token ids never meet, but llama.cpp insists on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (b for b in range(BYTES) if b not in printable)
    letter = {b: chr(b) for b in printable} | {b: chr(BYTES + n) for n, b in enumerate(others)}
    texts = [letter[b] for b in range(BYTES)] + [f"<{n}>" for n in range(BYTES, vocab_size)]
    writer.add_vocab_size(vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts[:vocab_size])
    writer.add_token_types([1] * vocab_size)  # ordinary ones
    writer.add_token_merges([f"{letter[116]} {letter[104]}"])
    writer.add_eos_token_id(vocab_size - 1)
    writer.add_add_bos_token(False)


def _around(usual: float, unit: int) -> range:
    """Multiples of `unit` from half to one and a half of what is usual."""
    least = max(1, round(usual / 2 / unit))
    return range(unit * least, max(int(1.5 * usual), unit * least) + 1, unit)


def _count(found: list[TensorSpec]) -> int:
    return sum(math.prod(weight.shape) for weight in found)


def _matrix(name: str, rows: int, columns: int, quantised: bool = True) -> TensorSpec:
    return TensorSpec(f"{name}.weight", (rows, columns), quantised=quantised)


def _layer_norm(name: str, width: int) -> list[TensorSpec]:
    return [TensorSpec(f"{name}.weight", (width,), 1.0), TensorSpec(f"{name}.bias", (width,), 0.0)]


def _llama_layer(size: PeerSize, number: int) -> list[TensorSpec]:
    at, D, F = f"blk.{number}", size.width, size.inner
    return [
        TensorSpec(f"{at}.attn_norm.weight", (D,), 1.0),
        *(_matrix(f"{at}.attn_{name}", D, D) for name in ("q", "k", "v", "output")),
        TensorSpec(f"{at}.ffn_norm.weight", (D,), 1.0),
        _matrix(f"{at}.ffn_gate", F, D),
        _matrix(f"{at}.ffn_up", F, D),
        _matrix(f"{at}.ffn_down", D, F),
    ]


def _describe_llama(writer: Any, size: PeerSize) -> None:
    writer.add_feed_forward_length(size.inner)
    writer.add_head_count(size.width // HEAD)
    writer.add_head_count_kv(size.width // HEAD)
    writer.add_rope_dimension_count(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)


def _ranks(width: int) -> dict[str, int]:
    """Of the small matrices of RWKV-7 that make decay (w), learning rate (a), value mix (v) and gate (g).

    The rule of its authors' training code: multiples of 32 near a power of the width.
    """

    def near(power: float, factor: float) -> int:
        return 32 * max(1, round(math.pow(width, power) * factor / 32))

    return {"w": near(0.5, 1.8), "a": near(0.5, 1.8), "v": near(0.5, 1.3), "g": near(0.8, 0.6)}


def _rwkv7_layer(size: PeerSize, number: int) -> list[TensorSpec]:
    at, D, F = f"blk.{number}", size.width, size.inner
    ranks = _ranks(D)
    # it mixes no values of an earlier layer, and its loader expects the learning rate's rank there
    if number == 0:
        ranks["v"] = ranks["a"]
    small = [
        _matrix(f"{at}.time_mix_{name}{part}", *shape, quantised=False)
        for name, rank in ranks.items()
        for part, shape in ((1, (rank, D)), (2, (D, rank)))
    ]
    fills = {"w0": -1.0, "a0": 0.0, "v0": 0.0, "k_k": 0.8, "k_a": 1.0, "r_k": 0.1}
    return [
        *_layer_norm(f"{at}.attn_norm", D),
        *_layer_norm(f"{at}.attn_norm_2", D),
        *_layer_norm(f"{at}.time_mix_ln", D),
        *small,
        *(TensorSpec(f"{at}.time_mix_{name}.weight", (D,), fill) for name, fill in fills.items()),
        TensorSpec(f"{at}.time_mix_lerp_fused.weight", (6, 1, 1, D), 0.5),
        *(_matrix(f"{at}.time_mix_{name}", D, D) for name in ("key", "value", "receptance", "output")),
        TensorSpec(f"{at}.channel_mix_lerp_k.weight", (1, 1, D), 0.5),
        _matrix(f"{at}.channel_mix_key", F, D),
        _matrix(f"{at}.channel_mix_value", D, F),
    ]


def _describe_rwkv7(writer: Any, size: PeerSize) -> None:
    ranks = _ranks(size.width)
    writer.add_feed_forward_length(size.inner)
    writer.add_head_count(0)
    writer.add_wkv_head_size(HEAD)
    writer.add_layer_norm_eps(1e-5)
    writer.add_decay_lora_rank(ranks["w"])
    writer.add_iclr_lora_rank(ranks["a"])
    writer.add_value_residual_mix_lora_rank(ranks["v"])
    writer.add_gate_lora_rank(ranks["g"])
    writer.add_token_shift_count(2)


def _mamba2_layer(size: PeerSize, number: int) -> list[TensorSpec]:
    at, D, inner = f"blk.{number}", size.width, size.inner
    heads, channels = inner // HEAD, inner + 2 * STATE  # one group: B and C are shared by all heads
    return [
        TensorSpec(f"{at}.attn_norm.weight", (D,), 1.0),
        _matrix(f"{at}.ssm_in", inner + channels + heads, D),
        TensorSpec(f"{at}.ssm_conv1d.weight", (channels, CONVOLUTION)),
        TensorSpec(f"{at}.ssm_conv1d.bias", (channels,), 0.0),
        TensorSpec(f"{at}.ssm_dt.bias", (heads,), -4.0),
        TensorSpec(f"{at}.ssm_a", (heads, 1), -1.0),
        TensorSpec(f"{at}.ssm_d", (heads, 1), 1.0),
        TensorSpec(f"{at}.ssm_norm.weight", (1, inner), 1.0),
        _matrix(f"{at}.ssm_out", D, inner),
    ]


def _describe_mamba2(writer: Any, size: PeerSize) -> None:
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_conv_kernel(CONVOLUTION)
    writer.add_ssm_inner_size(size.inner)
    writer.add_ssm_state_size(STATE)
    writer.add_ssm_time_step_rank(size.inner // HEAD)
    writer.add_ssm_group_count(1)


def _rms_end(size: PeerSize) -> list[TensorSpec]:
    return [TensorSpec("output_norm.weight", (size.width,), 1.0)]


def _rwkv7_ends(size: PeerSize) -> list[TensorSpec]:
    return [*_layer_norm("token_embd_norm", size.width), *_layer_norm("output_norm", size.width)]


FAMILIES = (
    Family("llama", "Llama", True, 1, 8 / 3, (HEAD, BLOCK), _llama_layer, _rms_end, _describe_llama),
    Family("rwkv7", "RWKV-7", False, 1, 4.0, (HEAD, BLOCK), _rwkv7_layer, _rwkv7_ends, _describe_rwkv7),
    Family("mamba2", "Mamba-2", True, 2, 2.0, (BLOCK, HEAD), _mamba2_layer, _rms_end, _describe_mamba2),
)
