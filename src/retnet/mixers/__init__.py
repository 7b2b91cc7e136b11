"""Sequence mixers: one file each, one protocol (`Mixer`), one table."""

from retnet.mixers.base import Mixer, MixerConfig, State, TrainingForm
from retnet.mixers.gated_retention import GatedRetention, GatedRetentionConfig
from retnet.mixers.h3 import H3, H3Config
from retnet.mixers.hyena import Hyena, HyenaConfig
from retnet.mixers.linear import LinearAttention, LinearConfig
from retnet.mixers.lstm import LSTM, LstmConfig
from retnet.mixers.retention import MultiScaleRetention, RetentionState
from retnet.mixers.retention_config import RetentionConfig
from retnet.mixers.rwkv4 import Rwkv4Config, TimeMix
from retnet.mixers.s4d import S4D, S4DConfig, S4DMixer
from retnet.mixers.softmax import SoftmaxAttention, SoftmaxConfig

MIXERS: dict[str, type[Mixer]] = {
    "retention": MultiScaleRetention,
    "gated_retention": GatedRetention,
    "softmax": SoftmaxAttention,
    "linear": LinearAttention,
    "rwkv4": TimeMix,
    "s4d": S4DMixer,
    "h3": H3,
    "hyena": Hyena,
    "lstm": LSTM,
}

__all__ = [
    "H3",
    "LSTM",
    "MIXERS",
    "S4D",
    "GatedRetention",
    "GatedRetentionConfig",
    "H3Config",
    "Hyena",
    "HyenaConfig",
    "LinearAttention",
    "LinearConfig",
    "LstmConfig",
    "Mixer",
    "MixerConfig",
    "MultiScaleRetention",
    "RetentionConfig",
    "RetentionState",
    "Rwkv4Config",
    "S4DConfig",
    "S4DMixer",
    "SoftmaxAttention",
    "SoftmaxConfig",
    "State",
    "TimeMix",
    "TrainingForm",
]
