"""A study of a measure that says what it is told to: `said` replaces its summary."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from retnet.measure.summary import Summary
from retnet.studies import protocols, study


@dataclass(frozen=True)
class Inner:
    width: int = 20000
    decay: float = 1e-05
    on: bool = True


@dataclass(frozen=True)
class Said(protocols.Measure):
    name: Literal["said"]
    rows: tuple[dict[str, Any], ...] = ({"label": "A", "deep": {"er": 1}}, {"label": "<B> & co", "x": [1, 2]})
    inner: Inner = field(default_factory=Inner)
    lengths: tuple[int, ...] = ()

    said = Summary()

    def count(self):
        return 4

    def summarise(self, results):
        return self.said


@pytest.fixture
def said(monkeypatch):
    """The class, to be told its summary."""
    monkeypatch.setattr(Said, "said", Summary())
    return Said


@pytest.fixture(scope="session")
def tiny_study():
    return study.Study("A <tiny> study", 'First\nlines.\n\n\nSecond & "last".\n', Said("said"), hours=0.5)
