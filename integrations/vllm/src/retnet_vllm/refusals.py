"""What cannot be served, refused by its name before a weight is read; vLLM itself would go on without a word."""

from __future__ import annotations

from vllm.config import VllmConfig

from retnet.mixers import MIXERS
from retnet.model.config import ModelConfig
from retnet.settings import UserError


def refuse_settings(config: VllmConfig) -> None:
    """Refuses settings of vLLM that our layers would ignore.

    Raises:
        UserError: one of them is set.
    """
    parallel, cache = config.parallel_config, config.cache_config
    wide = ("auto", "float32")
    settings = {
        "quantization": (config.model_config.quantization, (None,)),
        "speculative_config": (config.speculative_config, (None,)),
        "pipeline_parallel_size": (parallel.pipeline_parallel_size, (1,)),
        "mamba_cache_dtype": (cache.mamba_cache_dtype, wide),
        "mamba_ssm_cache_dtype": (cache.mamba_ssm_cache_dtype, wide),
        "use_replayssm": (cache.use_replayssm, (False,)),
    }
    for name, (value, allowed) in settings.items():
        if value not in allowed:
            words = " or ".join(map(repr, allowed))
            raise UserError(f"{name} is {value!r}, which retnet-vllm does not serve; allowed: {words}")


def refuse_mixers(config: ModelConfig) -> None:
    """Refuses mixers whose states do not fit a page.

    Raises:
        UserError: a layer has one.
    """
    for layer, kind in enumerate(config.mixers_by_layer):
        if getattr(kind, "score_norm", None) == "torchscale":
            raise UserError(
                f"layer {layer} has score_norm = 'torchscale', which no state can carry; convert the model with "
                "score_norm = 'decay'"
            )
        if MIXERS[kind.name].caches and kind.name != "softmax":
            raise UserError(
                f"layer {layer} is {kind.name!r}, whose state grows with every token and has no place in vLLM's pages; "
                "`retnet serve` serves it"
            )
