"""Lightning attention is retention: transformers' own MiniMax with its linear layers computed by the retention op.

MiniMax's linear layers (arXiv 2501.08313) are retention with γ_h = exp(−slope_h), scale 1 and no rotation, over queries,
keys and values behind SiLU; then one RMS norm over all heads and a sigmoid gate.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.models.minimax.modeling_minimax import (
    MiniMaxCache,
    MiniMaxLightningAttention,
    MiniMaxModel,
    apply_mask_to_padding_states,
)

from retnet.ops import CHUNK, retention, retention_step
from retnet.settings import UserError

M = TypeVar("M", bound=nn.Module)


def use_retention(model: M) -> M:
    """Has every lightning attention layer of a model compute by the retention op, in place.

    Weights, buffers, state dict and cache keep their names and shapes; the function is the same, up to rounding, and so is
    that of a cache that either way of computing has filled. Chunks that continue a cache are computed at once instead of
    token by token, and the cache becomes a `RetentionCache`, for beams and pieces of a prompt to be right. States are fp32,
    or fp64 beside fp64 weights, where transformers' have the type of the weights.

    Args:
        model: transformers' `MiniMaxForCausalLM`, or any module with such layers.

    Returns:
        The same model.

    Raises:
        UserError: there is no such layer.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, MiniMaxLightningAttention)]
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no layer of lightning attention; give transformers' MiniMaxForCausalLM or "
            "MiniMaxModel, with 'linear_attention' among its layer_types"
        )
    for layer in layers:
        layer.__class__ = RetentionLightningAttention
    for inner in model.modules():
        if isinstance(inner, MiniMaxModel):  # it masks by what a cache says before its layers see it
            inner.register_forward_pre_hook(_before, with_kwargs=True)
    return model


class RetentionCache(MiniMaxCache):  # type: ignore[misc]  # transformers has no types
    """transformers' cache, whose linear states follow their beams, and whose tokens are counted where keys are.

    transformers' own leaves linear states where they are when beams change places, and counts tokens in layer 0, which may
    have no keys: then pieces that continue a cache get wrong positions and masks.
    """

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that have been read, whichever layer is asked."""
        return max((layer.get_seq_length() for layer in self.layers), default=0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys after these queries, and the place of the first of them."""
        return self.get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows become those of beam_idx [B], in every layer."""
        super().reorder_cache(beam_idx)
        self.linear_cache: list[Any] = [
            x.index_select(0, beam_idx.to(x.device)) if isinstance(x, Tensor) else x
            for x in self.linear_cache
        ]


def _mend(cache: MiniMaxCache | None) -> None:
    if type(cache) is MiniMaxCache:
        cache.__class__ = RetentionCache


def _before(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _mend(kwargs.get("past_key_values"))


class RetentionLightningAttention(MiniMaxLightningAttention):  # type: ignore[misc]  # transformers has no types
    """transformers' layer, its weights as they are, with the op in place of loops over blocks and tokens."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MiniMaxCache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [B,T,D] → [B,T,D], and the state after them [B,H,K,K].

        Args:
            hidden_states: what the layer reads.
            position_embeddings: without effect, for nothing is rotated here.
            attention_mask: [B,T], 0 where a token is padding, which adds nothing to the state.
            past_key_values: holds the state before the first token, and after this call that after the last one.
            cu_seq_lens_q: int32 [N+1], bounds of documents packed in one row (B = 1), which then do not see each other.
            kwargs: without effect.

        Raises:
            ValueError: packed documents together with a cache.
        """
        if cu_seq_lens_q is not None and past_key_values is not None:
            raise ValueError("packed documents (cu_seq_lens_q) cannot continue a cache; set use_cache=False")
        qkv = apply_mask_to_padding_states(self.act_fn(self.qkv_proj(hidden_states)), attention_mask)
        q, k, v = qkv.unflatten(-1, (self.num_attention_heads, -1)).chunk(3, dim=-1)  # [B,T,H,K] each
        before = None if past_key_values is None else past_key_values.get_linear_cache(self.layer_idx)
        heads, state = self._retain(q, k, v, before if isinstance(before, Tensor) else None, cu_seq_lens_q)
        gate = torch.sigmoid(self.output_gate(hidden_states))
        if past_key_values is not None:
            _mend(past_key_values)
            past_key_values.set_linear_cache(self.layer_idx, state)
        return self.out_proj(gate * self.norm(heads.flatten(-2))), state

    def _retain(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Heads [B,T,H,K] and the state after them; the one before is left as it is."""
        wide = torch.promote_types(q.dtype, torch.float32)
        log_decay = -self.slope_rate.flatten().to(
            wide
        )  # from the buffer: it may have been rounded with the weights
        state = None if state is None else state.to(wide)
        if q.shape[1] == 1 and state is not None and not torch.is_grad_enabled():
            state = state.clone(memory_format=torch.contiguous_format)
            return retention_step(q[:, 0], k[:, 0], v[:, 0], log_decay, state, scale=1.0)[:, None], state
        form = "parallel" if q.shape[1] <= CHUNK else "chunkwise"
        return retention(q, k, v, log_decay, state, cu_seqlens, scale=1.0, form=form)
