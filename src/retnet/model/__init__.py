"""Language models: configuration, modules, cost model, checkpoint files."""

from retnet.model.config import ModelConfig
from retnet.model.language_model import Block, LanguageModel, ModelState
from retnet.model.quantise import quantise

__all__ = ["Block", "LanguageModel", "ModelConfig", "ModelState", "quantise"]
