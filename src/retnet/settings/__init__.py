"""Settings: frozen dataclasses whose numbers are in range, and the TOML files and command lines they are read from.

A configuration is a tree of frozen dataclasses. `build` makes one from plain data, `load` from a file, the files it is
based on and the command line, `dump` writes it back so that loading the result gives the same object.
"""

from retnet.errors import UserError
from retnet.settings.build import Choice, build, differences, dump, dump_changed, nearest
from retnet.settings.checks import PATH, At, Checked, Count, Items
from retnet.settings.files import (
    COMMAND_LINE,
    config_path,
    load,
    merge,
    parse_overrides,
    read_toml,
    shipped_configs,
)

__all__ = [
    "COMMAND_LINE",
    "PATH",
    "At",
    "Checked",
    "Choice",
    "Count",
    "Items",
    "UserError",
    "build",
    "config_path",
    "differences",
    "dump",
    "dump_changed",
    "load",
    "merge",
    "nearest",
    "parse_overrides",
    "read_toml",
    "shipped_configs",
]
