"""Language models: configuration, modules, cost model, checkpoint files."""

from retnet.model.config import ModelConfig
from retnet.model.language_model import Block, LanguageModel
from retnet.model.quantise import quantise
from retnet.model.stepper import ModelState, Stepper

__all__ = ["Block", "LanguageModel", "ModelConfig", "ModelState", "Stepper", "quantise"]
