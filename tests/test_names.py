"""One name, one meaning: a class of this package can be found by its name alone."""

import ast
from collections import defaultdict
from pathlib import Path

import retnet


def test_no_two_classes_have_one_name():
    root, places = Path(retnet.__file__).parent, defaultdict(list)
    for file in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(f"{file.relative_to(root)}:{node.lineno}")
    assert len(places) > 100
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
