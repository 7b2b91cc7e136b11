"""Imports go one way: no module needs one that needs it, not even inside a function."""

from graphlib import TopologicalSorter

import grimp

from retnet.mixers import MIXERS, MixerConfig


def test_no_module_imports_what_imports_it():
    graph = grimp.build_graph("retnet", exclude_type_checking_imports=True, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 100
    TopologicalSorter(imports).prepare()  # a CycleError names the circle


def test_every_mixer_can_be_chosen_by_its_name():
    assert {name: mixer.Config for name, mixer in MIXERS.items()}.items() <= MixerConfig.options().items()
