"""What vLLM's scheduler decided for a step, in the words of our mixers: pages, positions, bounds of documents."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor
from vllm.v1.kv_cache_interface import MambaSpec


class StateBackend(AttentionBackend):
    """Tells vLLM who describes a step to layers whose state has a constant size."""

    @staticmethod
    def get_name() -> str:
        """The name in vLLM's logs."""
        return "RETNET"

    @staticmethod
    def get_builder_cls() -> type[StepBatchBuilder]:
        """Who describes a step."""
        return StepBatchBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        """True: a page holds a state, not the keys and values of tokens."""
        return True


@dataclass(frozen=True)
class StepBatch:
    """The sequences of one step of vLLM; those with a single token stand first, and are decoded as rows of a batch.

    The others are pieces of prompts, which are read as documents packed in one row.

    Attributes:
        pages: where the state of each sequence is, int64 [N].
        position: tokens of each that were read in earlier steps, int64 [N].
        begun: pages of the sequences that begin in this step, whose content is another's, int64.
        rows: how many sequences are decoded.
        cu_seqlens: bounds of the pieces of prompts, counted from the first of them, int32 [N − rows + 1].
        tokens: of the step; what stands behind them is padding.
    """

    pages: Tensor
    position: Tensor
    begun: Tensor
    rows: int
    cu_seqlens: Tensor
    tokens: int


class StepBatchBuilder(AttentionMetadataBuilder[StepBatch]):
    """Makes a `StepBatch` once a step for all layers whose states have one shape."""

    reorder_batch_threshold = 1  # vLLM puts sequences with a single token first

    def __init__(
        self, kv_cache_spec: MambaSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> StepBatch:
        """Reads nothing from a device: vLLM has lengths on the host as well."""
        step = common_attn_metadata
        bounds = step.query_start_loc_cpu.tolist()
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        rows = next((row for row, length in enumerate(lengths) if length != 1), len(lengths))
        mode = self.vllm_config.cache_config.mamba_cache_mode
        pages = mamba_get_block_table_tensor(step.block_table_tensor, step.seq_lens, self.kv_cache_spec, mode)
        pages = pages[: len(lengths), 0].long()
        seen = step.seq_lens_cpu_upper_bound  # exact without speculation, which the model refuses
        ends = (step.seq_lens.cpu() if seen is None else seen).tolist()
        begun = [i for i, length in enumerate(lengths) if length and ends[i] == length]
        return StepBatch(
            pages=pages,
            position=step.compute_num_computed_tokens()[: len(lengths)].long(),
            begun=pages[begun],
            rows=rows,
            cu_seqlens=step.query_start_loc[rows:] - bounds[rows],
            tokens=bounds[-1],
        )
