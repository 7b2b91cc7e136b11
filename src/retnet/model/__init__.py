"""Language models: configuration, modules, cost model, checkpoint files."""

from retnet.model.config import ModelConfig
from retnet.model.language_model import Block, LanguageModel, ModelState

__all__ = ["Block", "LanguageModel", "ModelConfig", "ModelState"]
