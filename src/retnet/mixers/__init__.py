"""Sequence mixers: one file each, one protocol (`Mixer`), one table."""

from retnet.mixers.base import Linear, Mixer, MixerConfig, State
from retnet.mixers.retention import MultiScaleRetention, RetentionConfig, RetentionState

MIXERS: dict[str, type[Mixer]] = {
    "retention": MultiScaleRetention,
}

__all__ = [
    "MIXERS",
    "Linear",
    "Mixer",
    "MixerConfig",
    "MultiScaleRetention",
    "RetentionConfig",
    "RetentionState",
    "State",
]
