"""The language model as vLLM's: the modules of `retnet.model`, whose states are in vLLM's pages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsMambaPrefixCaching
from vllm.model_executor.models.utils import maybe_prefix
from vllm.utils.torch_utils import set_default_torch_dtype

from retnet.model.config import ModelConfig, Residual
from retnet.model.language_model import Backbone, Block
from retnet.nn import Linear
from retnet.settings import UserError
from retnet.train.tensor_parallel import Cut, check_heads, cut_block, cuts
from retnet_vllm.pages import StatePages, Step, TokenPages, largest_page, pages_of
from retnet_vllm.refusals import refuse_mixers, refuse_settings


class PagedBlock(Block):
    """A `Block` whose mixer is run by whoever keeps its states."""

    def forward(self, x: Tensor, pages: StatePages | TokenPages, step: Step | None) -> Tensor:  # type: ignore[override]  # pages, not bounds
        """x [T,D] → [T,D]; outside of a step one sequence from its beginning, whose state nobody wants."""
        if step is None:
            return Block.forward(self, x[None])[0]
        normed = self.mixer_norm(x)
        return self._close(x, normed, pages.mix(normed, step))

    def _add(self, x: Tensor, normed: Tensor, branch: Tensor, residual: Residual) -> Tensor:
        """Of several ranks each has some heads and a part of the FFN's width, and makes a summand of either output."""
        return super()._add(x, normed, tensor_model_parallel_all_reduce(branch), residual)


class RetNetForCausalLM(Backbone, HasInnerState, IsHybrid, SupportsMambaPrefixCaching):
    """Tokens to logits, on states that vLLM's scheduler hands out, copies and takes back.

    vLLM's word for models with states is hybrid, whether or not a layer has keys and values of tokens.

    Raises:
        UserError: a mixer, or a setting of vLLM, that cannot be served.
    """

    block_class: ClassVar[type[Block]] = PagedBlock

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: ModelConfig = vllm_config.model_config.hf_config.model_config
        refuse_settings(vllm_config)
        refuse_mixers(config)
        ranks = get_tensor_model_parallel_world_size()
        # the vocabulary is on each
        check_heads(replace(config, vocab_size=None), ranks, "tensor_parallel_size")
        self.config, self.rank = config, get_tensor_model_parallel_rank()
        device = torch.empty(0).device
        with torch.device("meta"), set_default_torch_dtype(torch.float32):
            self._build(config)
            self.head = Linear(config.d_model, self.embedding.num_embeddings)
        self._cuts: dict[str, Cut] = {}
        if ranks > 1:
            for block in self._blocks():
                cut_block(block, self.rank, ranks)
            self._cuts = {name: cut for name, cut in cuts(self).items() if name.startswith("blocks.")}
        # Moves of a whole module, so that mixers keep in fp32 what they do, and compute their constants.
        self.to(vllm_config.model_config.dtype).to_empty(device=device)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.pages = [
            pages_of(
                block.mixer, block.mixer_kind, maybe_prefix(prefix, f"blocks.{number}.mixer"), vllm_config
            )
            for number, block in enumerate(self._blocks())
        ]
        # among the modules, where vLLM prepares attention after it has read the weights
        self.attention = nn.ModuleList(p.attention for p in self.pages if isinstance(p, TokenPages))

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """Shape of the largest page of a rank."""
        numbers = largest_page(vllm_config.model_config.hf_config.model_config)
        return ((numbers // vllm_config.parallel_config.tensor_parallel_size,),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Type of the numbers in a page."""
        return (torch.float32,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, ...]:
        """How prefix caching copies a page: whole, for a state is not a window of tokens."""
        return (get_temporal_copy_spec,)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Rows of the embedding, [T] → [T,D]."""
        return self.embedding(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,  # noqa: ANN401  (vLLM has no type for them)
        inputs_embeds: Tensor | None = None,
        **_: Any,  # noqa: ANN401  (as above)
    ) -> Tensor:
        """What the head reads of all tokens of a step, [T] → [T,D]; `positions` are those in their sequences, [T]."""
        x = self._enter(self.embedding(input_ids) if inputs_embeds is None else inputs_embeds)
        batches: Any = get_forward_context().attn_metadata
        step = Step(batches, positions) if batches else None  # none: vLLM measures memory
        for block, pages in zip(self.blocks, self.pages, strict=True):
            x = block(x, pages, step)
        return self.norm(x)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[B,D] → [B,vocab_size]."""
        return self.head(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Takes the tensors of a folder; every one has to have its place, and every place its tensor.

        Raises:
            UserError: tensors that are missing, unknown, misshapen, or not numbers.
        """
        places = dict(self.named_parameters())  # tied weights once
        found, wrong = set(), []
        for theirs, tensor in weights:
            name = "head.weight" if theirs == "lm_head.weight" else theirs.removeprefix("model.")
            if name not in places:
                wrong.append(f"{theirs} is not part of the model")
                continue
            found.add(name)
            shape, begin = self._whole(name, places[name])
            if tensor.shape != shape:
                wrong.append(f"{theirs} has shape {tuple(tensor.shape)} instead of {tuple(shape)}")
            elif not tensor.isfinite().all():
                wrong.append(f"{theirs} has values that are NaN or infinite")
            else:
                own = tuple(slice(b, b + n) for b, n in zip(begin, places[name].shape, strict=True))
                with torch.no_grad():
                    places[name].copy_(tensor[own])
        wrong += [f"{name} is missing" for name in places.keys() - found]
        if wrong:
            raise UserError(f"the folder does not fit its configuration: {'; '.join(sorted(wrong))}")
        return found

    def _whole(self, name: str, part: Tensor) -> tuple[torch.Size, list[int]]:
        """The shape of the whole of what this rank has a part of, and where that begins."""
        shape, begin = list(part.shape), [0] * part.dim()
        cut = self._cuts.get(name)
        if cut is not None:
            shape[cut.axis], begin[cut.axis] = cut.size, self.rank * part.shape[cut.axis]
        return torch.Size(shape), begin
