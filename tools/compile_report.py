"""`python -m tools.compile_report [ARCHITECTURE …]`: see `triton_report`."""

import argparse
import os
import sys
from importlib.util import find_spec

from retnet.ops.triton import tile_table

_WHAT = "Compiles every kernel for GPUs that are not there, and prints what each needs."
ARCHITECTURES = [name for name in tile_table.TABLES if name != "default"]


def main(arguments: list[str] | None = None) -> int:
    """0 if every kernel is within the limits of its architecture, 1 if one is not, 2 if nothing could be compiled."""
    parser = argparse.ArgumentParser(prog="python -m tools.compile_report", description=_WHAT)
    parser.add_argument(
        "architectures", nargs="*", metavar="ARCHITECTURE", help=f"{', '.join(ARCHITECTURES)}; default: all"
    )
    chosen = parser.parse_args(arguments).architectures or ARCHITECTURES
    for name in chosen:
        if name not in ARCHITECTURES:
            parser.error(f"unknown architecture {name!r}; allowed: {', '.join(ARCHITECTURES)}")
    if find_spec("triton") is None:
        parser.error("Triton is not installed; pip install 'retnet[triton]'")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set, which interprets kernels instead of compiling them; unset it")
    from tools.triton_report import print_report

    return 1 if print_report(chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
