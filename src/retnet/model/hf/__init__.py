"""The models as citizens of Hugging Face's world: importing this registers them with transformers' Auto classes.

The only room that imports transformers. `model_type` is ``"retentive_network"``; folders open with
``AutoModelForCausalLM.from_pretrained`` as soon as this module has been imported, or with ``trust_remote_code=True``.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from retnet.model.hf.cache import RetNetCache
from retnet.model.hf.config import RetNetConfig
from retnet.model.hf.folder import check_folder, write_folder
from retnet.model.hf.modeling import RetNetForCausalLM, RetNetModel
from retnet.model.hf.pretrained import RetNetPreTrainedModel
from retnet.model.hf.tokenizer import hf_tokenizer

__all__ = [
    "RetNetCache",
    "RetNetConfig",
    "RetNetForCausalLM",
    "RetNetModel",
    "RetNetPreTrainedModel",
    "check_folder",
    "hf_tokenizer",
    "write_folder",
]

# exist_ok: a folder opened with trust_remote_code has transformers register what it finds there, which is this
AutoConfig.register(RetNetConfig.model_type, RetNetConfig, exist_ok=True)
AutoModel.register(RetNetConfig, RetNetModel, exist_ok=True)
AutoModelForCausalLM.register(RetNetConfig, RetNetForCausalLM, exist_ok=True)
AutoTokenizer.register(RetNetConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
