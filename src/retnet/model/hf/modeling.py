"""The language model as transformers' `PreTrainedModel`: the modules of `language_model`, their names, their states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import repeat
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from retnet.model.config import ModelConfig
from retnet.model.hf.cache import RetNetCache, require_states
from retnet.model.hf.config import RetNetConfig
from retnet.model.hf.generation import RecurrentGenerationMixin, require_one_segment
from retnet.model.hf.pretrained import RetNetPreTrainedModel, compute_constants, precise_parameters
from retnet.model.language_model import Backbone, Block, LanguageModel, initialise, laid_out, packing
from retnet.nn import Linear, Positions
from retnet.settings import UserError

_LOSS_OPTIONS = ("num_items_in_batch", "shift_labels", "ignore_index")


class RetNetBlock(GradientCheckpointingLayer, Block):  # type: ignore[misc]  # transformers has no types
    """A `Block` whose call is all three of its forms, so that hooks and gradient checkpointing see every one of them."""

    def forward(  # type: ignore[override]  # a call of all three forms
        self,
        x: Tensor,
        state: Any = None,  # noqa: ANN401
        cu_seqlens: Tensor | None = None,
        positions: Positions | None = None,
    ) -> tuple[Tensor, Any]:
        """The output, shaped as x, and the state after it, None without one before it.

        Args:
            x: [B,T,D], or [B,D] for one token from a state.
            state: of the mixer.
            cu_seqlens: int32 [N+1], bounds of documents packed in one row; a row of `state` each.
            positions: those of the mixer, made here by default.
        """
        if state is None:
            return Block.forward(self, x, cu_seqlens, positions), None
        with _fetched(self.mixer):
            if x.dim() == 2:
                return self.step(x, state, positions)
            return self.prefill(x, state, cu_seqlens, positions)


class RetNetModel(RetNetPreTrainedModel, Backbone):
    """The model below its head: tokens to features, [B,T,D]."""

    block_class = RetNetBlock

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__(config)
        self._build(config.model_config)
        if not self.embedding.weight.is_meta:
            initialise(self, config.model_config, None)
            self._fill()
        self._keep_in_fp32_modules_strict = precise_parameters(config.model_config)
        PreTrainedModel.post_init(self)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the embedding."""
        self.embedding = value  # type: ignore[assignment]  # whatever embeds

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: RetNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        token_type_ids: Tensor | None = None,
    ) -> BaseModelOutputWithPast:
        """Features of the given tokens.

        Args:
            input_ids: int64 [B,T], the tokens after those the cache has read.
            attention_mask: [B,T] or longer, its last T columns count; 0 where a token is padding, on any side.
            past_key_values: updated in place.
            inputs_embeds: [B,T,D], rows of the embedding in place of `input_ids`.
            use_cache: whether to make a cache where none is given; default: the configuration's, False in training.
            output_hidden_states: also return what every block reads, and the features, num_layers + 1 of [B,T,D].
            output_attentions: there are none.
            token_type_ids: zeros, as tokenizers give them; there are no segments.

        Raises:
            UserError: arguments that do not fit together.
        """
        require_one_segment(token_type_ids)
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give either input_ids or inputs_embeds")
        if output_attentions:
            raise UserError("retention has no attention weights; leave output_attentions unset")
        rows = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        B, T = rows.shape[:2]
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = RetNetCache() if past_key_values is None and use_cache else past_key_values
        mask = _padding(attention_mask, B, T)
        x = self._enter(rows if mask is None else rows[mask][None])
        bounds = None if mask is None else packing(mask)
        states = None if cache is None else self._states_of(cache, B, x)
        if T == 1 and mask is None and states is not None and not torch.is_grad_enabled():
            x = x[:, 0]  # a step, which has no gradient

        positions, hidden, after = self._positions(x, bounds, states), [x], []
        for block, state, shared in zip(self.blocks, states or repeat(None), positions, strict=False):
            x, state = block(x, state, bounds, shared)
            hidden.append(x)
            after.append(state)
        hidden[-1] = self.norm(x)
        if cache is not None:
            cache.advance(tuple(after), T)

        def out(x: Tensor) -> Tensor:
            return x.view(B, 1, -1) if x.dim() == 2 else x if mask is None else laid_out(x, mask)

        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=out(hidden[-1]),
            past_key_values=cache,
            hidden_states=tuple(map(out, hidden)) if wanted else None,
        )

    def _states_of(self, cache: RetNetCache, batch: int, x: Tensor) -> Any:  # noqa: ANN401
        require_states(cache)
        if cache.states is None:
            # where the weights are, unless they wait on a disk
            places = [p.device if p.device.type != "meta" else x.device for p in map(_weight, self._blocks())]
            return tuple(
                block.mixer.init_state(batch, device=place, dtype=x.dtype)
                for block, place in zip(self._blocks(), places, strict=True)
            )
        if cache.batch_size != batch:
            raise UserError(f"the cache has {cache.batch_size} rows, the input {batch}")
        if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
            cache.leave_inference_mode()
        return cache.states


class RetNetForCausalLM(RetNetPreTrainedModel, RecurrentGenerationMixin):
    """The language model: logits of the next token, loss, `generate`."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embedding.weight"}

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__(config)
        self.model = RetNetModel(config)
        self.lm_head = Linear(config.d_model, config.vocab_size)
        self._keys_to_ignore_on_save = {"lm_head.weight"} if config.tie_embeddings else set()
        if not self.lm_head.weight.is_meta:
            self._init_weights(self.lm_head)
            self._fill()
        PreTrainedModel.post_init(self)

    @classmethod
    def from_language_model(cls, model: LanguageModel, **kwargs: Any) -> RetNetForCausalLM:  # noqa: ANN401
        """The same model with the same tensors, not copies; `kwargs` are transformers' own settings (`bos_token_id` …)."""
        config = RetNetConfig.from_model_config(model.config, dtype=model.embedding.weight.dtype, **kwargs)
        with torch.device("meta"):
            ours = cls(config)
        tensors = model.state_dict(keep_vars=True)
        ours.load_state_dict({_theirs(name): tensor for name, tensor in tensors.items()}, assign=True)
        return _completed(ours, model, model.config)

    def to_language_model(self) -> LanguageModel:
        """The same model with the same tensors, not copies, as a `LanguageModel`."""
        with torch.device("meta"):
            model = LanguageModel(self.config.model_config)
        names = {_theirs(name): name for name in model.state_dict()}
        tensors = self.state_dict(keep_vars=True)
        strange = sorted(tensors.keys() ^ names.keys())
        strange += [name for name, x in tensors.items() if type(x) not in (nn.Parameter, Tensor)]
        if strange:
            raise UserError(
                f"this model is no longer a plain language model (tensors {', '.join(strange[:3])} …); "
                "merge its adapters and undo its quantisation first"
            )
        model.load_state_dict({names[k]: v for k, v in tensors.items()}, assign=True)
        return _completed(model, self, model.config)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the head."""
        self.lm_head = new_embeddings  # type: ignore[assignment]  # whatever makes logits

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: RetNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        token_type_ids: Tensor | None = None,
        **loss_options: Any,  # noqa: ANN401
    ) -> CausalLMOutputWithPast:
        """Logits [B,T,vocab_size] (zero where a token is padding), and the loss if there are labels.

        Args:
            input_ids: see `RetNetModel.forward`, as for all that is not listed here.
            attention_mask: as there.
            past_key_values: as there.
            inputs_embeds: as there.
            labels: int64 [B,T], usually `input_ids`: shifted inside, −100 is ignored, and so is a label whose token
                comes right after padding, for nothing predicts it.
            use_cache: as there.
            output_hidden_states: as there.
            output_attentions: as there.
            logits_to_keep: only of the last so many tokens, or of the tokens with these indices; 0: of all.
            token_type_ids: as there.
            loss_options: `num_items_in_batch`, by which the summed loss is divided, `shift_labels`, `ignore_index`.

        Raises:
            UserError: arguments that do not fit together, or are not known.
        """
        for name, value in loss_options.items():
            if name not in _LOSS_OPTIONS and value is not None:
                positions = "; positions come from attention_mask and the cache" if "position" in name else ""
                raise UserError(f"forward takes no {name}{positions}; leave it out")
        read = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            token_type_ids=token_type_ids,
        )
        logits = self.lm_head(_kept(read.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            if attention_mask is not None:
                padding = attention_mask[:, -labels.shape[1] :] == 0
                labels = labels.masked_fill(F.pad(padding[:, :-1], (1, 0)), -100)
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **loss_options)
        return CausalLMOutputWithPast(loss, logits, read.past_key_values, read.hidden_states)


def _fetched(mixer: nn.Module) -> AbstractContextManager[None]:
    """Weights that accelerate keeps on a disk are fetched by hooks of `forward`, which is not what is called here."""
    return _hooked(mixer) if hasattr(mixer, "_hf_hook") else nullcontext()


@contextmanager
def _hooked(mixer: nn.Module) -> Iterator[None]:
    hooked: list[Any] = [
        m for m in mixer.modules() if hasattr(m, "_hf_hook") and not isinstance(m, nn.Linear)
    ]
    for module in hooked:
        module._hf_hook.pre_forward(module)
    try:
        yield
    finally:
        for module in hooked:
            module._hf_hook.post_forward(module, None)


def _kept(x: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Tokens of x [B,T,D] that logits are wanted of, as transformers has it since 5.20; vLLM wants an older one.

    The last so many (0: all), those at the same indices [N] or at each row's own [B,N], or those of a bool mask [B,T].
    """
    if isinstance(logits_to_keep, int):
        return x[:, -logits_to_keep:]
    if logits_to_keep.dim() == 2 and logits_to_keep.dtype != torch.bool:
        return torch.take_along_dim(x, logits_to_keep[..., None], dim=1)
    return x[logits_to_keep] if logits_to_keep.dim() == 2 else x[:, logits_to_keep]


def _padding(attention_mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """bool [B,T], False where a token is padding; None where there is none."""
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != batch or shape[1] < tokens:
        raise UserError(f"attention_mask has shape {shape}; allowed: [B,T] = {(batch, tokens)}, or longer")
    mask = attention_mask[:, shape[1] - tokens :] != 0
    return None if mask.all() else mask


def _weight(module: nn.Module) -> Tensor:
    return next(module.parameters())


def _theirs(name: str) -> str:
    """The name of a tensor of `LanguageModel` in the Hugging Face model."""
    return "lm_head.weight" if name == "head.weight" else f"model.{name}"


def _completed(made: Any, source: nn.Module, config: ModelConfig) -> Any:  # noqa: ANN401
    """A model made on the meta device, once it has its tensors."""
    compute_constants(made, config)
    return made.train(source.training)
