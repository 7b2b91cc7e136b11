"""Compiles a grammar in a process of its own, with little time and memory: of some the library takes minutes and gigabytes.

It is run as a file, and imports nothing of this package. Its end says whether the server may compile the grammar, which says
then what is wrong with it.
"""

import resource
import sys

MEMORY = 1 << 30  # bytes of address space
SECONDS = 2  # of CPU


def main() -> None:
    """Standard input is the grammar, as llguidance has them."""
    from llguidance import LLMatcher, LLTokenizer

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    LLMatcher(LLTokenizer("byte"), sys.stdin.read(), log_level=0)


if __name__ == "__main__":
    main()
