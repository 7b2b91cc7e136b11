"""One name, one meaning: a class of this package can be found by its name alone. Former names lead to what they named."""

import importlib
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import retnet

CLASS = re.compile(r"\s*class _*(\w+)[(:]")


def test_no_two_classes_have_one_name():
    root, places = Path(retnet.__file__).parent, defaultdict(list)
    for file in sorted(root.rglob("*.py")):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if found := CLASS.match(line):
                places[found[1]].append(f"{file.relative_to(root)}:{number}")
    assert len(places) > 100
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_the_engine_answers_to_its_former_name(monkeypatch):
    monkeypatch.delitem(sys.modules, "retnet.infer", raising=False)
    with pytest.warns(FutureWarning, match=r"retnet\.infer is now retnet\.engine"):
        infer = importlib.import_module("retnet.infer")
    engine = importlib.import_module("retnet.engine")
    assert all(getattr(infer, name) is getattr(engine, name) for name in engine.__all__)
    for former, now in {"run": "load", "sampling": "sampling", "stops": "stops"}.items():
        module = importlib.import_module(f"retnet.infer.{former}")
        assert module is importlib.import_module(f"retnet.engine.{now}")
    with pytest.raises(ImportError, match=r"Piece is gone: retnet\.engine\.Engine"):
        exec("from retnet.infer import Piece")
