"""What `generate` of transformers needs to know of a recurrent model."""

# ruff: noqa: ANN401 (transformers' own arguments are handed on)

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from retnet.model.hf.cache import RetNetCache, require_states
from retnet.settings import UserError

# What `generate` keeps for its ways of decoding and hands on with the model's own arguments.
_MODE_ARGUMENTS = ("tokenizer", "assistant_tokenizer", "assistant_model", "streamer", "synced_gpus")


def require_one_segment(token_type_ids: Tensor | None) -> None:
    """Lets pass what tokenizers give with every text, and refuses what a model without segments would not see.

    Raises:
        UserError: the ids tell segments of a text apart.
    """
    if token_type_ids is not None and not torch.compiler.is_compiling() and token_type_ids.any():
        raise UserError(
            "token_type_ids tell segments of a text apart, which this model has no embeddings for; leave them out"
        )


class RecurrentGenerationMixin(GenerationMixin):  # type: ignore[misc]  # transformers has no types
    """`generate` with a `RetNetCache`: greedy, sampling, beams; prompts padded on the left, read in pieces, continued."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of the next call. Padding stands before a text, so only its reading needs the mask."""
        if next_sequence_length is not None and next_sequence_length < 1:
            raise UserError(
                f"the cache has read {input_ids.shape[1] - next_sequence_length} tokens, and the prompt has "
                f"{input_ids.shape[1]}; give the whole text, and at least one token that is new"
            )
        for name in _MODE_ARGUMENTS:
            kwargs.pop(name, None)
        segments = kwargs.pop("token_type_ids", None)
        if is_first_iteration:
            require_one_segment(segments)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if not is_first_iteration and inputs.get("past_key_values") is not None:
            inputs.pop("attention_mask", None)
        return inputs

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Called by `generate`, which else would make a cache of keys and values."""
        if generation_config.cache_implementation not in (None, "dynamic"):  # transformers' own default
            raise UserError(
                f"cache_implementation is {generation_config.cache_implementation!r}, but the state of a recurrent "
                "model is constant in size and always whole; leave it unset"
            )
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
        if mask is not None and not mask[:, -1].all():
            raise UserError("a prompt ends in padding; pad on the left: padding_side='left'")
        if cache is None:
            if generation_config.use_cache is not False:
                model_kwargs["past_key_values"] = RetNetCache()
            return
        require_states(cache)
        cache._is_user_defined = True
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        if copies > 1 and cache.batch_size == batch_size:
            cache.batch_repeat_interleave(copies)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses.

        Raises:
            UserError: always.
        """
        raise UserError(
            "generate_batch pages keys and values, which a recurrent model has none of; use generate"
        )
