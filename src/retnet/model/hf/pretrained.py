"""What the models share as transformers sees it: loading, saving, filling of weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from retnet.mixers import MIXERS, Mixer, MixerConfig
from retnet.model.config import ModelConfig
from retnet.model.hf.config import RetNetConfig
from retnet.model.hf.folder import check_folder, save, seal, unseal
from retnet.model.wrapped import ReadsWrapped
from retnet.settings import UserError


class RetNetPreTrainedModel(ReadsWrapped, PreTrainedModel):  # type: ignore[misc]  # transformers has no types
    """Loading, saving and filling of weights."""

    config: RetNetConfig
    config_class = RetNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["RetNetBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _is_stateful = True  # transformers then refuses assisted generation, which would have to take tokens back
    _supports_context_parallel = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Called by transformers for new rows of embeddings and head; all else is filled by us or by a checkpoint."""
        config = self.config.model_config
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02 if config.init == "normal" else config.d_model**-0.5)

    def _fill(self) -> None:
        """Marks what our own initialisation has filled, so that transformers' leaves it alone."""
        for module in self.modules():
            module._is_hf_initialized = True

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str] | None, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """As in transformers; a local folder is checked first, see `retnet.model.hf.check_folder`.

        Raises:
            UserError: the folder is damaged, its weights do not fit its configuration, or are no numbers.
        """
        if kwargs.get("use_safetensors") is False or kwargs.get("gguf_file"):
            raise UserError("weights are read from safetensors only: leave use_safetensors and gguf_file")
        if kwargs.get("ignore_mismatched_sizes"):
            raise UserError("every weight has to fit: do without ignore_mismatched_sizes")
        if name is not None and os.path.isdir(name):
            folder = Path(name, kwargs.get("subfolder") or "")
            check_folder(folder, variant=kwargs.get("variant"), head=issubclass(cls, GenerationMixin))
        if kwargs.get("state_dict") is None:
            kwargs["use_safetensors"] = True  # a pickle is never opened
        result = super().from_pretrained(name, *args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        compute_constants(model, model.config.model_config)  # made on the meta device, they have no values
        return result

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """As in transformers, and beside it the code file for ``trust_remote_code`` and the manifest of all hashes.

        Raises:
            UserError: `push_to_hub`, which would upload the folder before it is complete.
        """
        if kwargs.pop("push_to_hub", False):
            raise UserError("save_pretrained writes a folder; to upload one, call model.push_to_hub(repo_id)")
        if is_main_process:
            unseal(Path(save_directory), kwargs.get("variant"))
        save(self, Path(save_directory), is_main_process, **kwargs)
        if is_main_process:
            seal(Path(save_directory))

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing is left to do: every folder is written with the code file that ``trust_remote_code`` needs."""


def compute_constants(model: nn.Module, config: ModelConfig) -> None:
    """Fills the buffers of mixers that no checkpoint holds (γ, angles), where they are; from meta, beside their weights."""
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    for mixer, kind in zip(mixers, config.mixers_by_layer, strict=True):
        _compute_constants(mixer, _unfilled(config.d_model, kind))


def _compute_constants(mixer: Mixer, unfilled: Mixer) -> None:
    weight = next(mixer.parameters())
    # `to_empty` makes a mixer compute its constants, of the precision that weights of this type ask for
    fresh = unfilled.to(weight.dtype).to_empty(device="cpu")
    for name, constant in fresh.named_buffers():
        path, _, leaf = name.rpartition(".")
        parent = mixer.get_submodule(path)
        if leaf in parent._non_persistent_buffers_set:
            place = mixer.get_buffer(name).device
            setattr(parent, leaf, constant.to(weight.device if place.type == "meta" else place))


def precise_parameters(config: ModelConfig) -> set[str]:
    """Names of the parameters that their mixer keeps in fp32 whatever the type of the others."""
    kinds, found = config.mixers_by_layer, set()
    for kind in set(map(kinds.index, kinds)):  # the first layer of each
        narrowed = _unfilled(config.d_model, kinds[kind]).float().to(torch.bfloat16)
        layers = [number for number, other in enumerate(kinds) if other == kinds[kind]]
        places = ["*"] if len(layers) == len(kinds) else layers
        wide = [name for name, x in narrowed.named_parameters() if x.dtype is not torch.bfloat16]
        found |= {f"blocks.{place}.mixer.{name}" for place in places for name in wide}
    return found


def _unfilled(d_model: int, kind: MixerConfig) -> Mixer:
    with torch.device("meta"):
        return MIXERS[kind.name](d_model, kind)
