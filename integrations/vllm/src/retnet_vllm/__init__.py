"""A plugin of vLLM that serves RetNets from their Hugging Face folders: `register` is its entry point."""

import logging
from importlib.metadata import version

ARCHITECTURE = "RetNetForCausalLM"  # as config.json of the folders names it
BACKEND = "RETNET"  # a member of vLLM's `MambaAttentionBackendEnum`
TESTED = "0.32."  # versions of vLLM

logger = logging.getLogger(__name__)


def register() -> None:
    """Makes the configuration, the model and the backend of its states known to vLLM; called in each of its processes."""
    import vllm
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

    from retnet_vllm.config import ServedConfig

    if not vllm.__version__.startswith(TESTED):
        logger.warning(
            "retnet-vllm %s was tested with vLLM %sx alone, and this is %s; if it fails, install that",
            version("retnet-vllm"),
            TESTED,
            vllm.__version__,
        )
    AutoConfig.register(ServedConfig.model_type, ServedConfig, exist_ok=True)
    if BACKEND not in MambaAttentionBackendEnum.__members__:
        MambaAttentionBackendEnum.register(BACKEND, "retnet_vllm.backend.StateBackend")
    ModelRegistry.register_model(ARCHITECTURE, "retnet_vllm.model:RetNetForCausalLM")
