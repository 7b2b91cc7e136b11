"""Modules that take seconds to import: imported by the first test that uses them, not by each process that finds tests."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest


class Lazy:
    """Has what the module of this name has, and imports it at the first question."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, word: str) -> Any:
        if word.startswith("_"):  # pytest asks all that stands in a file for some
            raise AttributeError(word)
        return getattr(import_module(self._name), word)


def needs(name: str) -> pytest.MarkDecorator:
    """A mark of tests that are skipped where this package is not installed; it is not imported."""
    return pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed")


transformers, hf = Lazy("transformers"), Lazy("retnet.model.hf")
