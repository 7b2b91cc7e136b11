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


def refuse_ranks(config: ModelConfig, ranks: int) -> None:
    """Refuses models that cannot be cut over so many ranks.

    Raises:
        UserError: a mixer whose heads do not stand by themselves, or heads or widths that are no multiple of `ranks`.
    """
    if ranks == 1:
        return
    for layer, (kind, (_, width)) in enumerate(
        zip(config.mixers_by_layer, config.ffns_by_layer, strict=True)
    ):
        shared = [name for name in ("kv_heads", "qk_norm") if getattr(kind, name, None)]
        if shared or not MIXERS[kind.name].head_axes:
            why = f"which share {' and '.join(shared)}" if shared else "which do not stand by themselves"
            raise UserError(
                f"tensor_parallel_size is {ranks}, and layer {layer} is {kind.name!r}, whose heads, {why}, cannot be on "
                "several devices; allowed: 1"
            )
        groups = getattr(kind, "head_norm_groups", None) or kind.num_heads
        cut = {
            "heads": kind.num_heads,
            "groups of its head norm": groups,
            "numbers in the width of its FFN": width,
        }
        for what, number in cut.items():
            if number % ranks:
                raise UserError(
                    f"tensor_parallel_size is {ranks}, and layer {layer} has {number} {what}, no multiple of it; "
                    f"allowed: divisors of {number}"
                )
