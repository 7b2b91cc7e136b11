"""Grammars that are too heavy to compile are refused, before the engine's thread would stand still for one."""

from __future__ import annotations

import asyncio
import sys
from collections import OrderedDict
from pathlib import Path

from retnet.engine import Grammar
from retnet.serve.errors import ApiError
from retnet.serve.grammar_worker import MEMORY, SECONDS

REMEMBERED = 4096  # grammars
LATEST = 60.0  # seconds until a worker is given up that gets no CPU


class GrammarCheck:
    """Tries grammars in a process of their own, each once; see `grammar_worker`."""

    def __init__(self) -> None:
        self._light: OrderedDict[int, None] = OrderedDict()  # hashes of those that may be compiled
        self._turn = asyncio.Semaphore(2)

    async def require_light(self, grammar: Grammar) -> None:
        """Refuses a grammar that takes too much time or memory.

        Raises:
            ApiError: it does.
            UserError: llguidance is missing, or it is no grammar.
        """
        source = grammar.source
        if (key := hash(source)) not in self._light:
            async with self._turn:
                if not await _is_light(source):
                    raise ApiError(
                        400,
                        f"this grammar takes more than {SECONDS} seconds or {MEMORY >> 20} MiB to compile; make it simpler",
                        code="grammar_too_complex",
                    )
        self._light[key] = None
        self._light.move_to_end(key)
        if len(self._light) > REMEMBERED:
            self._light.popitem(last=False)


async def _is_light(source: str) -> bool:
    """Whether a worker can compile it."""
    pipe, nowhere = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    file = str(Path(__file__).with_name("grammar_worker.py"))
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-I", file, stdin=pipe, stdout=nowhere, stderr=nowhere
    )
    try:
        async with asyncio.timeout(LATEST):
            await worker.communicate(source.encode())
    except TimeoutError:
        return False
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()
    return worker.returncode == 0
