"""One name, one meaning: a class of this package can be found by its name alone."""

import re
from collections import defaultdict
from pathlib import Path

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
